"""``delta_rule`` as a loop over time: the specification, in plain PyTorch and any dtype."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.linear_attention.reference import row_decay


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as those of the public function, taken as checked."""
    dtype = accumulator(q.dtype)
    batch, total, heads, size = *q.shape[:2], v.shape[2], q.shape[3]
    # a head's row of its group
    queries, keys = (value.to(dtype).repeat_interleave(heads // q.shape[2], dim=2) for value in (q, k))
    values, rates = v.to(dtype), beta.to(dtype)
    decay = row_decay(log_decay, (batch, total, heads, size), values)
    if cu_seqlens is None:
        spans = [(slice(None), 0, total)]
        state = values.new_zeros(batch, heads, size, v.shape[3]) if initial_state is None else initial_state
    else:
        spans = [(slice(0, 1), start, end) for start, end in itertools.pairwise(cu_seqlens.tolist())]
        state = values.new_zeros(len(spans), heads, size, v.shape[3]) if initial_state is None else initial_state
    outputs, final = [], []
    for index, (rows, start, end) in enumerate(spans):
        S = state if cu_seqlens is None else state[index : index + 1]
        for t in range(start, end):
            S = decay[rows, t, :, :, None] * S
            key = keys[rows, t, :, None]
            written = rates[rows, t, :, None, None] * (values[rows, t, :, None] - key @ S)
            S = S + key.transpose(-1, -2) * written
            outputs.append(scale * (queries[rows, t, :, None] @ S)[:, :, 0])
        final.append(S)
    o = torch.stack(outputs, dim=1) if outputs else values[:, :0]
    return o.to(q.dtype), torch.cat(final)
