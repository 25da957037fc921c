"""``gated_scan`` as gates followed by the loop of ``linear_scan``: the specification, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.linear_scan import reference


def gates(x: Tensor, cell: str, lo: float, hi: float) -> tuple[Tensor, Tensor]:
    """The factor and the addend of the recurrence, ``(B, T, D)`` each, in the accumulator's dtype.

    minLSTM's normalised input gate is the sigmoid of one logit, ``sigmoid(f) / sigmoid(i) = exp(softplus(-i) - softplus(-f))``,
    which keeps it exact where both gates are near zero.
    """
    x = x.to(accumulator(x.dtype))
    if cell == "min_gru":
        logit, value = x.chunk(2, dim=-1)
    else:
        forget, enter, value = x.chunk(3, dim=-1)
        logit = torch.nn.functional.softplus(-forget) - torch.nn.functional.softplus(-enter)
    return lo + (hi - lo) * torch.sigmoid(-logit), torch.sigmoid(logit) * value


def gated_scan(
    x: Tensor,
    initial_state: Tensor | None = None,
    *,
    cell: str,
    gate_range: tuple[float, float] = (0.0, 1.0),
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as those of the public function, taken as checked."""
    a, b = gates(x, cell, *gate_range)
    h, final_state = reference.linear_scan(a, b, initial_state, reverse=reverse, cu_seqlens=cu_seqlens)
    return h.to(x.dtype), final_state
