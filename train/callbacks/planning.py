"""Turns minutes into a number of steps, once, from the speed of the first steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as lightning
from torch import Tensor

from seqzoo.train.configuration import ConfigurationError
from seqzoo.train.data.windows import tokens_of

SKIPPED = 3
MEASURED = 8
# a step that takes this many times the median waits for something that does not return: what is compiled or read first
STALLED = 4.0
SHARE = 0.03
REPORT_SECONDS = 6.0
# a forward pass alone is a third of a step; validation moves more, so half is on the safe side
FORWARD_SHARE = 0.5
# what the measured speed may be too high by
MARGIN = 0.97


def plan_steps(
    *, budget: float, elapsed: float, done: int, step: float, validation: float, every: int, final: float
) -> int:
    """How many steps fit into a time.

    Args:
        budget: Seconds of the whole run.
        elapsed: Seconds that are over.
        done: Steps that are over.
        step: Seconds of a step.
        validation: Seconds of a validation during training.
        every: Steps between two of those; 0 means there are none.
        final: Seconds of what follows training.

    Returns:
        Steps of the whole run, at least one more than are over.
    """
    remaining = budget * MARGIN - elapsed - final
    each = step + (validation / every if every else 0.0)
    return done + max(1, int(remaining / each))


def steady(seconds: list[float]) -> list[float]:
    """The steps that tell how long later ones take: those that did not stall."""
    most = STALLED * statistics.median(seconds)
    return [each for each in seconds if each <= most]


class StepsFromMinutes(lightning.Callback):
    """Measures the first steps, skipping those that compile, warm up or stall, then sets ``max_steps`` for good.

    From then on nothing depends on the clock: the schedule and the end follow from the step alone.

    Args:
        minutes: For training with its validations, and the report.
        warmup_steps: Of the schedule, which does not depend on the number of steps until they are over.
        decided: Called with the number of steps, before the next step, to write it down.
    """

    def __init__(self, minutes: float, warmup_steps: int, decided: Callable[[int], None]) -> None:
        if not minutes > 0:
            raise ConfigurationError(f"minutes must be positive, got {minutes}")
        if warmup_steps <= SKIPPED + 1:
            raise ConfigurationError(
                f"minutes are turned into steps during the warm-up: model.warmup_steps must be above {SKIPPED + 1}, "
                f"got {warmup_steps}; or give trainer.max_steps"
            )
        self.budget = 60.0 * minutes
        self.warmup_steps = warmup_steps
        self._decided = decided
        self._began = 0.0
        self._first = 0
        self._last = 0.0
        self._seconds: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock; a run that was killed before the decision measures again."""
        self._began = time.perf_counter()
        self._first, self._seconds = trainer.global_step, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        """Decides as soon as enough steps are measured, at the latest when the warm-up ends."""
        if trainer.max_steps != -1 or (batch_idx + 1) % trainer.accumulate_grad_batches != 0:
            return
        now, step = time.perf_counter(), trainer.global_step
        since, self._last = now - self._last, now
        if step - self._first <= SKIPPED:
            return
        self._seconds.append(since)
        measured = steady(self._seconds)
        enough = len(measured) >= MEASURED and sum(measured) >= SHARE * self.budget
        enough = enough or step >= self.warmup_steps - 1 or now - self._began > self.budget / 2
        # the processes' clocks differ
        if trainer.strategy.reduce_boolean_decision(enough, all=False):
            steps = self._plan(trainer, batch, now - self._began, sum(measured) / len(measured))
            steps = trainer.strategy.broadcast(steps)
            trainer.fit_loop.epoch_loop.max_steps = steps
            self._decided(steps)

    def _plan(self, trainer: Any, batch: Tensor, elapsed: float, step_seconds: float) -> int:
        data = trainer.datamodule
        windows = data.val_dataloader()
        # the report judges the test texts as well
        tested = len(data.test_dataloader()) if "test" in data.sides else 0
        per_byte = FORWARD_SHARE * step_seconds / (tokens_of(batch) * trainer.accumulate_grad_batches)
        per_window = per_byte * windows.context * len(windows.starts)
        limit = trainer.limit_val_batches
        used = min(limit, len(windows)) if isinstance(limit, int) else int(limit * len(windows))
        return plan_steps(
            budget=self.budget,
            elapsed=elapsed,
            done=trainer.global_step,
            step=step_seconds,
            validation=used * per_window,
            every=trainer.val_check_interval if isinstance(trainer.val_check_interval, int) else 0,
            final=(len(windows) + tested) * per_window + REPORT_SECONDS,
        )
