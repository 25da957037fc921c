"""Writes checkpoints between steps: by the clock, when validation improves, when asked to stop, and on errors."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from torch import Tensor

from seqzoo.hub.files import WriteError
from seqzoo.train.checkpoints import finite
from seqzoo.train.interruption import Aborted, Interrupted, Interruption
from seqzoo.train.run_folder import RunFolder


class Checkpointing(lightning.Callback):
    """Keeps ``last`` and ``best`` in the folder of a run.

    A checkpoint always describes the moment after a step with all that belongs to it (its row of metrics, its
    validation), so that a run that continues from it does nothing twice and leaves nothing out.

    Args:
        run: The folder.
        minutes: Time between two checkpoints.
        steps: Updates between two, additionally; None means the clock alone.
        interruption: Asked after every step whether to stop.
        metric: Name of the validation's result by which a checkpoint is best.
        greatest: Whether the best is the greatest, and not the least.
    """

    def __init__(
        self,
        run: RunFolder,
        minutes: float,
        steps: int | None,
        interruption: Interruption,
        metric: str = "validation_bpb",
        greatest: bool = False,
    ) -> None:
        self._metric = metric
        self._sign = -1.0 if greatest else 1.0
        self.best: float | None = None
        self.best_step = 0
        self.saved_step = 0
        self._run = run
        self._every_seconds = 60.0 * minutes
        self._every_steps = steps
        self._interruption = interruption
        self._saved_at = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock, and shows with a first checkpoint that the disk takes one."""
        self.saved_step = trainer.global_step
        if self.saved_step == 0:
            self._save(trainer, self._run.last)
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        """The end of a step, unless its validation is still to come."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not _validation_follows(trainer):
            self._after_step(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """The end of a step with validation; a new best one is kept."""
        if trainer.sanity_checking or self._metric not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self._metric])
        if self.best is None or self._sign * value < self._sign * self.best:
            self.best, self.best_step = value, trainer.global_step
            self._save(trainer, self._run.best)
        self._after_step(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The end, where another callback ended training before its last step."""
        if trainer.global_step > self.saved_step:
            self._save(trainer, self._run.last)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keeps the steps since the last checkpoint, unless saving is what failed or the numbers are spoilt.

        Of several processes others may be dead or elsewhere, and a checkpoint needs all of them.
        """
        if isinstance(exception, (Interrupted, Aborted, WriteError)) or trainer.global_step <= self.saved_step:
            return
        if trainer.world_size > 1:
            return
        if finite(pl_module.state_dict()):
            self._save(trainer, self._run.last)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Sets Lightning's counters to the end of the step, whatever hook saves."""
        loops = checkpoint["loops"]["fit_loop"]
        batches = trainer.global_step * trainer.accumulate_grad_batches
        progress = loops["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            for name in counts:
                counts[name] = batches
        for part in ("total", "current"):
            for name in loops["epoch_loop.val_loop.batch_progress"][part]:
                loops["epoch_loop.val_loop.batch_progress"][part][name] = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what a checkpoint kept."""
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def _after_step(self, trainer: Any) -> None:
        step = trainer.global_step
        due = time.monotonic() - self._saved_at >= self._every_seconds or step == trainer.max_steps
        due = due or (self._every_steps is not None and step % self._every_steps == 0)
        requested = self._interruption.requested
        # clocks differ, and signals come to the processes between different steps
        due = trainer.strategy.reduce_boolean_decision(due, all=False)
        requested = trainer.strategy.reduce_boolean_decision(requested, all=False)
        if due or requested:
            self._save(trainer, self._run.last)
        if requested:
            raise Interrupted

    def _save(self, trainer: Any, path: Path) -> None:
        trainer.save_checkpoint(path, weights_only=False)
        if path == self._run.last:
            self.saved_step = trainer.global_step
            self._saved_at = time.monotonic()


def _validation_follows(trainer: Any) -> bool:
    every = trainer.val_check_interval
    if not trainer.enable_validation or not isinstance(every, int):
        return False
    return (trainer.fit_loop.total_batch_idx + 1) % every == 0
