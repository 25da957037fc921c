"""What all modules that train have in common: AdamW over the groups that a model asks for, and the schedule."""

from __future__ import annotations

import hashlib
from typing import Any

import lightning.pytorch as lightning
import torch

from seqzoo.mixer import nearest
from seqzoo.parameters import parameter_groups
from seqzoo.train.schedule import SCHEDULES, rate_factor


class OptimisedModule(lightning.LightningModule):
    """A module whose ``model`` AdamW trains, with a learning rate that follows from the step alone.

    Args:
        model: What is trained.
        lr: Highest learning rate.
        weight_decay: Of matrices; modules may ask for their own.
        betas: AdamW's averages of gradients and of squared gradients.
        warmup_steps: Updates in which the learning rate rises.
        schedule: How it falls, as of :func:`seqzoo.train.schedule.rate_factor`.
        seed: Of the dropout.

    Raises:
        ValueError: If a number is negative, or there is no such schedule.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        warmup_steps: int,
        schedule: str,
        seed: int,
    ) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("warmup_steps", warmup_steps)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if schedule not in SCHEDULES:
            raise ValueError(f"there is no schedule {schedule!r}; {nearest(schedule, SCHEDULES)}")
        self.model: Any = model
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.seed = seed

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the groups that the model's modules ask for."""
        groups = parameter_groups(self.model, self.lr, self.weight_decay)
        for group in groups:
            group["peak_lr"] = group["lr"]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the learning rate and the random state, both from the step alone."""
        step = self.trainer.global_step
        factor = rate_factor(step, self.warmup_steps, self.trainer.max_steps, self.schedule)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        torch.manual_seed(
            step_seed(self.seed, self.global_rank, step, batch_idx % self.trainer.accumulate_grad_batches)
        )


def step_seed(*numbers: int) -> int:
    """A seed of 63 bits from a few integers, so that dropout depends on the step and not on what ran before."""
    text = ",".join(str(number) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
