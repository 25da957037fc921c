"""A live line with loss, speed and remaining time; plain lines where the output is no terminal."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as lightning
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor

from seqzoo.train.callbacks.metering import Metering
from seqzoo.train.environment import memory_in_use

PLAIN_SECONDS = 15.0


class ProgressDisplay(lightning.Callback):
    """Shows how training goes.

    Args:
        console: Where.
        meter: What is shown; it must stand before this callback.
    """

    def __init__(self, console: Console, meter: Metering) -> None:
        self._console = console
        self._meter = meter
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._first = (0, 0.0)
        self._shown = 0.0
        self._average: float | None = None
        self._device = torch.device("cpu")
        self._token_bytes = 1.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens the line."""
        self._first = (trainer.global_step, time.monotonic())
        self._device = pl_module.device
        self._token_bytes = self._meter.scale(trainer)
        self._shown = time.monotonic()
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[measured]}"),
                TimeElapsedColumn(),
                console=self._console,
                refresh_per_second=4,
                expand=True,
            )
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._task = self._progress.add_task("", total=total, completed=trainer.global_step, measured="")
            self._progress.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        """Moves the line; without a terminal prints one now and then."""
        loss = self._meter.loss
        if loss is not None:
            # single batches are noisy
            self._average = loss if self._average is None else 0.9 * self._average + 0.1 * loss
        step, total = trainer.global_step, trainer.max_steps if trainer.max_steps > 0 else None
        if self._progress is not None:
            self._progress.update(self._task, completed=step, total=total, measured=self._words(step, total))
        elif time.monotonic() - self._shown >= PLAIN_SECONDS or step == total:
            self._shown = time.monotonic()
            self._console.print(f"step {step}/{total or '?'}  {self._words(step, total)}", highlight=False)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """A line for each validation."""
        value = self._meter.validation_bpb
        if value is not None and not trainer.sanity_checking:
            words = f"step {trainer.global_step}: validation {value:.3f} bits per byte"
            if self._token_bytes != 1.0:
                words += f", perplexity {float(trainer.callback_metrics['validation_perplexity']):.4g}"
            self._console.print(words, highlight=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Closes the line."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Closes the line, so that what follows does not run into it."""
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _words(self, step: int, total: int | None) -> str:
        words, size, speed = [], self._token_bytes, self._meter.recent_bytes_per_second
        if self._average:
            # of a byte's perplexity nobody thinks
            perplexity = "" if size == 1.0 else f", perplexity {math.exp(self._average):.4g}"
            words.append(f"loss {self._average:.3f} ({self._average / math.log(2.0) / size:.3f} bpb{perplexity})")
        if self._meter.validation_bpb is not None:
            words.append(f"val {self._meter.validation_bpb:.3f}")
        words.append(f"{quantity(speed)}B/s" if size == 1.0 else f"{quantity(speed / size)}tokens/s")
        return "  ".join([*words, *self._rest(step, total)])

    def _rest(self, step: int, total: int | None) -> list[str]:
        filled = [] if self._meter.packing is None else [f"{100.0 * self._meter.packing:.1f} % filled"]
        return [*filled, f"{quantity(float(memory_in_use(self._device)))}B", *self._left(step, total)]

    def _left(self, step: int, total: int | None) -> list[str]:
        done = step - self._first[0]
        if total is None:
            return ["measuring the speed"]
        if done == 0:
            return []
        left = (time.monotonic() - self._first[1]) / done * (total - step)
        return [f"{duration(left)} left"]


def quantity(value: float) -> str:
    """A number to three digits with the letter of its thousands: ``41.2 k``."""
    for letter in ("", "k", "M", "G"):
        if abs(value) < 999.5 or letter == "G":
            break
        value /= 1000.0
    return f"{value:.3g} {letter}"


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
