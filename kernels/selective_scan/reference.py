"""``selective_scan`` as a loop over time: the specification, in plain PyTorch and any dtype up to complex128."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator


def step_of(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool, dtype: torch.dtype) -> Tensor:
    """The step, ``(B, T, D)``, in a dtype."""
    step = delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    # not torch's softplus, which is its argument above 20
    return torch.logaddexp(step, torch.zeros_like(step)) if delta_softplus else step


def coefficients(u: Tensor, step: Tensor, A: Tensor | None, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and addend of the recurrence, ``(..., D, N)``, of u and step ``(..., D)`` and B ``(..., D, N)``."""
    step = step[..., None]
    if A is not None:
        return torch.exp(step * A), step * B * u[..., None]
    rate = step / (1 + step * B.square().sum(-1, keepdim=True))
    return 1 - rate * B.square(), rate * B * u[..., None]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as those of the public function, taken as checked, B and C with groups.

    The transition is Longhorn's where A is None.
    """
    dtype = accumulator(u.dtype)
    batch, total, width = u.shape
    step = step_of(delta, delta_bias, delta_softplus, dtype)
    values = u.to(dtype)
    A = None if A is None else A.to(accumulator(B.dtype))
    # a channel's row of its group
    B, C = (value.to(accumulator(value.dtype)).repeat_interleave(width // value.shape[2], dim=2) for value in (B, C))
    if cu_seqlens is None:
        spans = [(slice(None), 0, total)]
        state = B.new_zeros(batch, width, B.shape[3]) if initial_state is None else initial_state
    else:
        bounds = cu_seqlens.tolist()
        spans = [(slice(0, 1), start, end) for start, end in itertools.pairwise(bounds)]
        state = B.new_zeros(len(spans), width, B.shape[3]) if initial_state is None else initial_state
    outputs, final = [], []
    for index, (rows, start, end) in enumerate(spans):
        h = state if cu_seqlens is None else state[index : index + 1]
        for t in range(start, end):
            factor, addend = coefficients(values[rows, t], step[rows, t], A, B[rows, t])
            h = factor * h + addend
            y = (C[rows, t] * h).sum(-1)
            outputs.append(y.real if y.is_complex() else y)
        final.append(h)
    y = torch.stack(outputs, dim=1) if outputs else values[:, :0]
    if D is not None:
        y = y + D.to(dtype) * values
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(dtype))
    return y.to(u.dtype), torch.cat(final)
