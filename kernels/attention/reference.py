"""``attention`` one query after the other: the specification, in plain PyTorch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    sinks: Tensor | None,
    logit_cap: float | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as the public function's, taken as checked, both boundaries given or neither."""
    dtype = accumulator(q.dtype)
    batch, total, heads, _ = q.shape
    of_head = torch.arange(heads, device=q.device) // (heads // k.shape[2])
    keys, values, queries = k.to(dtype)[:, :, of_head], v.to(dtype)[:, :, of_head], scale * q.to(dtype)
    if cu_seqlens is None or cu_seqlens_k is None:
        sequences = [(0, total, 0, k.shape[1])]
    else:
        bounds, bounds_k = (itertools.pairwise(cu.tolist()) for cu in (cu_seqlens, cu_seqlens_k))
        sequences = [(*of_q, *of_k) for of_q, of_k in zip(bounds, bounds_k, strict=True)]
    extra = None if bias is None else bias.to(dtype).expand(batch, heads, total, k.shape[1])
    outputs, sums = [], []
    for start, end, start_k, end_k in sequences:
        for t in range(start, end):
            # the key beside this query: both sequences end together
            place = end_k - (end - t)
            first = start_k if window is None else max(start_k, place - window + 1)
            last = end_k
            if causal:
                last = place + 1
            elif window is not None:
                last = min(end_k, place + window)
            seen = slice(first, max(first, last))
            scores = torch.einsum("bhk,bshk->bhs", queries[:, t], keys[:, seen])
            if logit_cap is not None:
                scores = logit_cap * torch.tanh(scores / logit_cap)
            if extra is not None:
                scores = scores + extra[:, :, t, seen]
            given = scores
            if sinks is not None:
                scores = torch.cat((scores, sinks.to(dtype)[:, None].expand(batch, heads, 1)), -1)
            # a query that sees nothing: the logarithm of its sum has no derivative
            blind = (scores == -torch.inf).all(-1)
            shift = scores.masked_fill(blind[..., None], 0.0).logsumexp(-1).masked_fill(blind, 0.0)
            lse = shift.masked_fill(blind, -torch.inf)
            outputs.append(torch.einsum("bhs,bshv->bhv", (given - shift[..., None]).exp(), values[:, seen]))
            sums.append(lse)
    if not outputs:
        return q.new_zeros((*q.shape[:3], v.shape[3])), q.new_zeros(q.shape[:3], dtype=dtype)
    return torch.stack(outputs, 1).to(q.dtype), torch.stack(sums, 1)
