"""``linear_scan`` as a loop over time: the specification, in plain PyTorch and any dtype up to complex128."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``h_t = a_t * h_{t-1} + b_t``; arguments and results as those of the public function, taken as checked."""
    dtype = accumulator(b.dtype)
    batch, total, width = b.shape
    a, values = a.to(dtype).expand(batch, total, width), b.to(dtype)
    if cu_seqlens is None:
        spans = [(slice(None), 0, total)]
        state = values.new_zeros(batch, width) if initial_state is None else initial_state
    else:
        bounds = cu_seqlens.tolist()
        spans = [(slice(0, 1), start, end) for start, end in itertools.pairwise(bounds)]
        state = values.new_zeros(len(spans), width) if initial_state is None else initial_state
    outputs, final = [], []
    for index, (rows, start, end) in enumerate(spans):
        h = state if cu_seqlens is None else state[index : index + 1]
        steps = []
        for t in range(end - 1, start - 1, -1) if reverse else range(start, end):
            h = a[rows, t] * h + values[rows, t]
            steps.append(h)
        outputs += reversed(steps) if reverse else steps
        final.append(h)
    h = torch.stack(outputs, dim=1) if outputs else values[:, :0]
    return h.to(b.dtype), torch.cat(final)
