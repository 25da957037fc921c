"""What all modules that train have in common: AdamW over the groups that a model asks for, and the schedule."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch

from seqzoo.mixer import nearest
from seqzoo.parameters import parameter_groups
from seqzoo.train.refinement import RefinedSchedule
from seqzoo.train.schedule import SCHEDULES, rate_factor


class OptimisedModule(lightning.LightningModule):
    """A module whose ``model`` AdamW trains, with a learning rate that follows from the step alone.

    With ``schedule="schedule_free"`` it is "The Road Less Scheduled"'s AdamW, https://arxiv.org/abs/2405.15682, of the
    package schedulefree. Its weights in training are not those to judge and keep, which
    :class:`seqzoo.train.averaging.ScheduleFreeWeights` gives.

    Args:
        model: What is trained.
        lr: Highest learning rate.
        weight_decay: Of matrices; modules may ask for their own.
        betas: AdamW's averages of gradients and of squared gradients.
        warmup_steps: Updates in which the learning rate rises.
        schedule: How it falls, as of :func:`seqzoo.train.schedule.rate_factor`.
        seed: Of the dropout.
        refined_from: The folder of the run whose gradient norms make the schedule ``"refined"``.

    Raises:
        ValueError: If a number is negative, there is no such schedule, its package is missing, or it does not fit the
            model or ``refined_from``.
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
        refined_from: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("warmup_steps", warmup_steps)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if schedule not in SCHEDULES:
            raise ValueError(f"there is no schedule {schedule!r}; {nearest(schedule, SCHEDULES)}")
        if (schedule == "refined") != (refined_from is not None):
            raise ValueError(
                "schedule='refined' and refined_from, the folder of an earlier run, belong together, got "
                f"schedule={schedule!r} and refined_from={refined_from!r}"
            )
        if schedule == "schedule_free":
            _check_schedule_free(model)
        self.refined = None if refined_from is None else RefinedSchedule.of_run(Path(refined_from).expanduser())
        self.refined_from = refined_from
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
        if self.schedule == "schedule_free":
            from schedulefree import AdamWScheduleFree

            return AdamWScheduleFree(groups, lr=self.lr, betas=self.betas)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the learning rate and the random state, both from the step alone."""
        step = self.trainer.global_step
        factor = rate_factor(step, self.warmup_steps, self.trainer.max_steps, self.schedule, self.refined)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        torch.manual_seed(
            step_seed(self.seed, self.global_rank, step, batch_idx % self.trainer.accumulate_grad_batches)
        )


def _check_schedule_free(model: torch.nn.Module) -> None:
    if importlib.util.find_spec("schedulefree") is None:
        raise ValueError("schedule='schedule_free' needs the package schedulefree: pip install 'seqzoo[schedulefree]'")
    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ValueError(
            "schedule='schedule_free' judges other weights than it trains, of which norm='batch' has no statistics; "
            "use norm='rms' or 'layer', or another schedule"
        )


def step_seed(*numbers: int) -> int:
    """A seed of 63 bits from a few integers, so that dropout depends on the step and not on what ran before."""
    text = ",".join(str(number) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
