"""Lightning modules: a model, its loss, its optimiser and its schedule."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import cast

import lightning.pytorch as lightning
import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.mixer import State
from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.parameters import parameter_groups
from seqzoo.train.data.windows import IGNORED
from seqzoo.train.finite import check_finite
from seqzoo.train.schedule import warmup_cosine


class LanguageModeling(lightning.LightningModule):
    """Next-token prediction with AdamW, a linear warm-up and a cosine to zero.

    A training batch is integers (B, T + 1). A validation batch is inputs and labels, both (B, T), the next part of the
    same B streams as the batch before it.

    Args:
        config: The model.
        lr: Highest learning rate.
        weight_decay: Of matrices; modules may ask for their own.
        beta1: AdamW's average of gradients.
        beta2: AdamW's average of squared gradients.
        warmup_steps: Updates in which the learning rate rises.
        carry_state: Whether validation hands the state from window to window; without, every window starts afresh,
            which models whose state grows with the length need.
        sample_prompt: What the sample at the end continues.
        sample_length: Tokens of the sample.
        sample_temperature: Of the sample; 0 always takes the likeliest token.
        seed: Seed of the dropout; the command sets it from its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.95,
        warmup_steps: int = 100,
        carry_state: bool = True,
        sample_prompt: str = "\n",
        sample_length: int = 600,
        sample_temperature: float = 0.8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("lr", lr, 0.0),
            ("warmup_steps", warmup_steps, 0),
            ("sample_length", sample_length, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.model = LanguageModel(config)
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = (beta1, beta2)
        self.warmup_steps = warmup_steps
        self.carry_state = carry_state
        self.sample_prompt = sample_prompt
        self.sample_length = sample_length
        self.sample_temperature = sample_temperature
        self.seed = seed
        self._state: list[State] | None = None
        self._nats = 0.0
        self._count = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the groups that the model's modules ask for."""
        groups = parameter_groups(self.model, self.lr, self.weight_decay)
        for group in groups:
            group["peak_lr"] = group["lr"]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Sets the learning rate and the random state, both from the step alone."""
        step = self.trainer.global_step
        factor = warmup_cosine(step, self.warmup_steps, self.trainer.max_steps)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        torch.manual_seed(
            step_seed(self.seed, self.global_rank, step, batch_idx % self.trainer.accumulate_grad_batches)
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The mean loss of a batch.

        Raises:
            NonFiniteLoss: If it is NaN or infinite; names the layer that first made it so.
        """
        ids, labels = batch[:, :-1].long(), batch[:, 1:].long()
        loss = cast("Tensor", self.model.loss(ids, labels))
        check_finite(loss, self.model, ids, step=self.trainer.global_step)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forgets what the validation before has left."""
        self._state, self._nats, self._count = None, 0.0, 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds the next window of every stream."""
        nats, count, self._state = self.score(batch, self._state)
        self._nats += nats
        self._count += count

    def on_validation_epoch_end(self) -> None:
        """Makes ``validation_bpb`` known to callbacks."""
        sums = torch.tensor([self._nats, float(self._count)], dtype=torch.float64, device=self.device)
        nats, count = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self._state = None
        self.log("validation_bpb", nats / max(count, 1.0) / math.log(2.0), logger=False)

    def score(self, batch: tuple[Tensor, Tensor], state: list[State] | None) -> tuple[float, int, list[State] | None]:
        """The summed loss in nats of a window, how many tokens it has, and the state that the next one takes."""
        ids, labels = batch
        logits, after = self.model(ids, state, return_state=self.carry_state)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return float(nats), int((labels != IGNORED).sum()), after

    @torch.no_grad()
    def bits_per_token(self, windows: Iterable[tuple[Tensor, Tensor]]) -> float:
        """The mean over all tokens of validation windows, in bits, with dropout off."""
        training = self.training
        self.eval()
        state: list[State] | None = None
        total, count = 0.0, 0
        for batch in windows:
            ids, labels = (part.to(self.device) for part in batch)
            nats, tokens, state = self.score((ids, labels), state)
            total, count = total + nats, count + tokens
        self.train(training)
        return total / max(count, 1) / math.log(2.0)


def step_seed(*numbers: int) -> int:
    """A seed of 63 bits from a few integers, so that dropout depends on the step and not on what ran before."""
    text = ",".join(str(number) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
