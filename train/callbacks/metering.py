"""Measures loss and speed, and hands them to the loggers."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from seqzoo.train.data.language import LanguageData
from seqzoo.train.data.windows import replica, tokens_of

# Euclidean, and the sum of absolute values
NORMS = {"gradient_norm": 2.0, "gradient_l1": 1.0}


class Metering(lightning.Callback):
    """Sums losses, bytes and seconds of the steps; logs means over the steps since the last row.

    Validation, checkpoints and the time for which a run lay still do not count as time. The sums are part of the
    checkpoint, so a resumed run logs the rows that an uninterrupted one would have logged.
    """

    speed = "bytes_per_second"

    def __init__(self) -> None:
        self.seconds = 0.0
        self.bytes = 0
        self.loss: float | None = None
        self.validation_bpb: float | None = None
        # the share of the last batches that is no padding; of packed documents, were they filled up
        self.packing: float | None = None
        self._since: dict[str, float] = {"loss": 0.0, "batches": 0, "bytes": 0, "seconds": 0.0, "room": 0}
        self._begin = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=50)
        self._norms: dict[str, float] = {}

    @property
    def bytes_per_second(self) -> float:
        """Over the whole run."""
        return self.bytes / self.seconds if self.seconds else 0.0

    @property
    def recent_bytes_per_second(self) -> float:
        """Over the last steps, which the compilation in the first ones soon leaves."""
        return sum(size for size, _ in self._recent) / max(sum(seconds for _, seconds in self._recent), 1e-9)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        """Starts the clock."""
        self._begin = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Measures the gradients before they are clipped, in the steps that become rows."""
        if not self._becomes_row(trainer, trainer.global_step + 1):
            return
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        for name, order in NORMS.items():
            norm = torch.nn.utils.get_total_norm(gradients, order)
            self._norms[name] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        """Adds the step; every ``log_every_n_steps`` updates it is a row."""
        # reading the loss waits for the device, so it comes before the clock is read
        loss = float(outputs["total"])
        seconds = time.perf_counter() - self._begin
        # of packed documents the groups of processes have unequally many
        size, room = trainer.strategy.reduce(
            torch.tensor([self.size(batch), self.room(batch)], device=pl_module.device), reduce_op="sum"
        ).tolist()
        shared = trainer.world_size // replica(trainer)[1]
        size, room = round(size / shared * self.scale(trainer)), round(room / shared * self.scale(trainer))
        self.loss = loss
        self.seconds += seconds
        self.bytes += size
        self._recent.append((size, seconds))
        for name, value in (("loss", loss), ("batches", 1), ("bytes", size), ("seconds", seconds), ("room", room)):
            self._since[name] += value
        step = trainer.global_step
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if accumulating or not self._becomes_row(trainer, step):
            return
        mean = self._since["loss"] / self._since["batches"]
        row = {
            "train_loss": mean,
            "train_bpb": mean / math.log(2.0) / self.scale(trainer),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            self.speed: round(self._since["bytes"] / max(self._since["seconds"], 1e-9)),
            "seconds": round(self.seconds, 3),
            **self._norms,
        }
        if self._since["room"]:
            self.packing = row["packing"] = self._since["bytes"] / self._since["room"]
        self._since = dict.fromkeys(self._since, 0)
        self._log(trainer, row)

    def size(self, batch: Any) -> int:
        """Tokens that a batch predicts."""
        return tokens_of(batch)

    def scale(self, trainer: Any) -> float:
        """Bytes of a token."""
        data = getattr(trainer, "datamodule", None)
        return data.bytes_per_token("training") if isinstance(data, LanguageData) else 1.0

    def room(self, batch: Any) -> int:
        """Bytes that it would predict without padding; 0 of batches that have none."""
        return getattr(batch, "capacity", 0)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """A row with the validation's result."""
        if "validation_bpb" not in trainer.callback_metrics or trainer.sanity_checking:
            return
        self.validation_bpb = float(trainer.callback_metrics["validation_bpb"])
        row = {"validation_bpb": self.validation_bpb, "seconds": round(self.seconds, 3)}
        perplexity = float(trainer.callback_metrics["validation_perplexity"])
        self._log(trainer, {**row, "validation_perplexity": perplexity})

    def _becomes_row(self, trainer: Any, step: int) -> bool:
        return step % trainer.log_every_n_steps == 0 or step == trainer.max_steps

    def _log(self, trainer: Any, row: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(row, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "seconds": self.seconds,
            "bytes": self.bytes,
            "loss": self.loss,
            "validation_bpb": self.validation_bpb,
            "packing": self.packing,
            "since": dict(self._since),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what a checkpoint kept."""
        self.seconds, self.bytes = state_dict["seconds"], state_dict["bytes"]
        self.loss, self.validation_bpb = state_dict["loss"], state_dict["validation_bpb"]
        # a checkpoint of an earlier version has neither
        self.packing = state_dict.get("packing")
        self._since = {"room": 0, **state_dict["since"]}
