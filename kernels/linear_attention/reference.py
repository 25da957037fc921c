"""``linear_attention`` as a loop over time: the specification, in plain PyTorch and any dtype."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as those of the public function, taken as checked."""
    dtype = accumulator(q.dtype)
    batch, total, heads, size = *q.shape[:2], v.shape[2], q.shape[3]
    # a head's row of its group
    queries, keys = (value.to(dtype).repeat_interleave(heads // q.shape[2], dim=2) for value in (q, k))
    values = v.to(dtype)
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
        seen = []
        for t in range(start, end):
            S = decay[rows, t, :, :, None] * S + keys[rows, t, :, :, None] * values[rows, t, :, None]
            seen.append(S)
        for t, at in zip(range(start, end), seen, strict=True):
            read = at if causal else S
            outputs.append(scale * (queries[rows, t, :, None] @ read)[:, :, 0])
        final.append(S)
    o = torch.stack(outputs, dim=1) if outputs else values[:, :0]
    return o.to(q.dtype), torch.cat(final)


def row_decay(log_decay: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The factor on every row of the state, ``(B, T, H, K)``."""
    if log_decay is None:
        return like.new_ones(shape)
    rows = log_decay.to(like.dtype).exp()
    return (rows[..., None] if log_decay.dim() in (1, 3) else rows).expand(shape)
