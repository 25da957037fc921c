"""``gated_scan`` as gates followed by the loop of ``linear_scan``: the specification, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.gated_scan.op import CELLS
from seqzoo.kernels.linear_scan import reference


def logit(raw: Sequence[Tensor]) -> Tensor:
    """The logit of the new value's weight z, from the gates' projections.

    minLSTM's normalised input gate is the sigmoid of one logit too, that of ``i / f``, whose logarithm is exact where
    both gates are near zero.
    """
    if len(raw) == 1:
        return raw[0]
    forget, enter = raw
    # not through softplus, which PyTorch rounds to its argument above 20
    return torch.nn.functional.logsigmoid(enter) - torch.nn.functional.logsigmoid(forget)


def gates(x: Tensor, cell: str, lo: float, hi: float) -> tuple[Tensor, Tensor]:
    """The factor and the addend of the recurrence, ``(B, T, D)`` each, in the accumulator's dtype."""
    *raw, value = x.to(accumulator(x.dtype)).chunk(CELLS[cell], dim=-1)
    weight = logit(raw)
    return lo + (hi - lo) * torch.sigmoid(-weight), torch.sigmoid(weight) * value


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
