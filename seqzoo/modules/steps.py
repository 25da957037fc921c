"""Decay by a step that follows from the input, ``-exp(A_log) softplus(raw + dt_bias)``, and how its parts begin."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.modules.options import check_number


def step_of(raw: Tensor, bias: Tensor) -> Tensor:
    """``softplus(raw + bias)``, in float32 at least."""
    dtype = accumulator(raw.dtype)
    return F.softplus(raw.to(dtype) + bias.to(dtype))


def reset_step_bias(bias: Tensor, dt_min: float = 0.001, dt_max: float = 0.1, dt_init_floor: float = 1e-4) -> None:
    """Draws steps log-uniformly, https://arxiv.org/abs/2312.00752, section 3.6, and sets the bias that gives them."""
    with torch.no_grad():
        drawn = torch.rand(bias.shape, dtype=torch.float32, device=bias.device)
        span = math.log(dt_max) - math.log(dt_min)
        steps = torch.exp(drawn * span + math.log(dt_min)).clamp(min=dt_init_floor)
        # the inverse of softplus
        bias.copy_(steps + torch.log(-torch.expm1(-steps)))


def check_steps(dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    """Raises ValueError unless the steps to begin with make sense."""
    if check_number("dt_min", dt_min, above=0) > check_number("dt_max", dt_max, above=0):
        raise ValueError(f"dt_min must not be above dt_max, got {dt_min} and {dt_max}")
    if check_number("dt_init_floor", dt_init_floor) < 0:
        raise ValueError(f"dt_init_floor must not be negative, got {dt_init_floor}")


def reset_rates(A_log: Tensor, low: float, high: float) -> None:
    """Draws rates of decay uniformly and sets their logarithms."""
    with torch.no_grad():
        A_log.copy_(torch.empty_like(A_log, dtype=torch.float32).uniform_(low, high).log())


class StepDecay(nn.Module):
    """The logarithm of a decay for every head, or for every key of every head.

    Args:
        n_heads: Heads, each with a rate of its own.
        width: Values of the projection: ``n_heads``, or so many keys times heads.
    """

    def __init__(self, n_heads: int, width: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(width))

    def forward(self, raw: Tensor) -> Tensor:
        """``(B, T, width)`` to ``(B, T, H)``, or ``(B, T, H, K)`` where there are keys; float32 at least."""
        step = step_of(raw, self.dt_bias)
        rate = torch.exp(self.A_log.to(step.dtype))
        if self.dt_bias.shape == self.A_log.shape:
            return -rate * step
        return -rate[:, None] * step.unflatten(-1, (self.A_log.shape[0], -1))

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """Neither decays."""
        return {"A_log": {"weight_decay": 0.0}, "dt_bias": {"weight_decay": 0.0}}

    def reset_parameters(self) -> None:
        """Rates between 1 and 16, steps between 0.001 and 0.1, as in Mamba-2."""
        reset_rates(self.A_log, 1.0, 16.0)
        reset_step_bias(self.dt_bias)
