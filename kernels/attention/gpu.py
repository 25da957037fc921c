"""``attention`` on GPUs: PyTorch's kernels, of which Flex attention does every form and both derivatives.

Flex (https://arxiv.org/abs/2412.05496) compiles caps and biases into its kernels, visits the blocks that a mask leaves,
and differentiates lse. Its backward pass sums in one order. That of FlashAttention-2 adds in any, so where gradients
are recorded it is not used; where none are, it computes float16 and bfloat16 without windows, caps and biases.

The registered op is the tiles of :mod:`.chunked`. It has what Flex has not: tensors without elements, and the gradient
of a bias, which Flex would add up in any order.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.nn.functional import pad

from seqzoo.kernels.attention.chunked import backward as backward
from seqzoo.kernels.attention.chunked import forward as forward
from seqzoo.kernels.checks import HALF

# the narrowest keys and values that Flex's kernels take
NARROWEST = 16
# forms and sizes that one process may compile Flex for
COMPILED = 128


def takes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, record: bool) -> bool:
    """Whether :func:`attention` computes a call, of which gradients are wanted or not; else the registered op does."""
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return False
    # on CPU tensors, as under TRITON_INTERPRET=1, Flex has no gradients
    return not record or (q.device.type == "cuda" and (bias is None or not bias.requires_grad))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    logit_cap: float | None,
    record: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments as the public function's, taken as checked; ``record`` says whether gradients are wanted."""
    plain = window is None and logit_cap is None and bias is None
    causal = causal and (q.shape[1] > 1 or cu_seqlens is not None or window is not None)
    if plain and not record and _has_flash(q, k, v, cu_seqlens, cu_seqlens_k, causal):
        o, lse = _flash(q, k, v, cu_seqlens, causal, scale)
    else:
        o, lse = _run(q, k, v, bias, cu_seqlens, cu_seqlens_k, causal, window, scale, logit_cap)
    if sinks is None:
        return o, lse
    blind = lse == -torch.inf
    sinks, seen = sinks.to(lse.dtype).expand_as(lse), lse.masked_fill(blind, 0.0)
    total = torch.where(blind, sinks, torch.logaddexp(seen, sinks))
    return (o * (seen - total).exp().masked_fill(blind, 0.0)[..., None]).to(o.dtype), total


def _has_flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, causal: bool
) -> bool:
    if q.device.type != "cuda" or q.dtype not in HALF or q.shape[3] != v.shape[3] or q.shape[3] % 8:
        return False
    if torch.compiler.is_compiling() or cu_seqlens_k is not None:
        return False
    if causal and q.shape[1] != k.shape[1]:
        return False
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    arguments = (*heads_first, None, 0.0, causal, q.shape[2] != k.shape[2])
    return torch.backends.cuda.can_use_flash_attention(torch.backends.cuda.SDPAParams(*arguments))


def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's FlashAttention-2, https://arxiv.org/abs/2307.08691: dense, or queries and keys packed alike."""
    if cu_seqlens is None:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first, 0.0, causal, scale=scale)
        return o.transpose(1, 2), lse.transpose(1, 2)
    from torch.nn.attention import varlen

    o, lse = varlen.varlen_attn(
        *(x[0] for x in (q, k, v)),
        cu_seqlens,
        cu_seqlens,
        q.shape[1],
        k.shape[1],
        return_aux=varlen.AuxRequest(lse=True),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o[None], lse.t()[None]


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """:func:`_flex`, compiled unless it is part of what is compiled already."""
    if torch.compiler.is_compiling():
        return _flex(*arguments)
    # a scale or cap that the compiler takes for a variable is an error in Flex
    with torch._dynamo.config.patch(recompile_limit=COMPILED, specialize_float=True):
        if arguments[0].device.type == "cuda":
            return _compiled()(*arguments)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return _flex(*arguments)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_flex, dynamic=True)


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    logit_cap: float | None,
) -> tuple[Tensor, Tensor]:
    size = v.shape[3]
    # the key beside every query, and the sequences of queries and keys
    beside = torch.arange(q.shape[1], device=q.device)
    of_query = of_key = broken = None
    if cu_seqlens is None:
        beside = beside + (k.shape[1] - q.shape[1])
    else:
        bounds = cu_seqlens.to(torch.int64)
        bounds_k = bounds if cu_seqlens_k is None else cu_seqlens_k.to(torch.int64)
        of_query = torch.bucketize(beside, bounds[1:], right=True)
        of_key = torch.bucketize(torch.arange(k.shape[1], device=k.device), bounds_k[1:], right=True)
        beside = beside + (bounds_k - bounds)[1:][of_query]
        # two sequences may share a tile, in which a weight of zero times NaN is NaN
        found = _broken(q, bounds) | _broken(k, bounds_k) | _broken(v, bounds_k)
        broken = found[of_query]
        q, k, v = (torch.where(x.isfinite(), x, 0.0) for x in (q, k, v))
    wide = (pad(x, (0, NARROWEST - x.shape[3])) if x.shape[3] < NARROWEST else x for x in (q, k, v))
    mask = None
    if causal or window is not None or of_query is not None:
        sees = _mask(beside, of_query, of_key, causal, window)
        mask = create_block_mask(sees, None, None, q.shape[1], k.shape[1], device=q.device)
    whole = None if bias is None else bias.expand(q.shape[0], q.shape[2], q.shape[1], -1)
    o, auxiliary = flex_attention(
        *(x.transpose(1, 2) for x in wide),
        score_mod=_score(whole, logit_cap),
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        return_aux=AuxRequest(lse=True),
    )
    o, lse = o[..., :size].transpose(1, 2), auxiliary.lse.transpose(1, 2)
    # no gradient comes from a query that sees nothing
    blind = lse == -torch.inf
    o, lse = o.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
    if broken is not None:
        o, lse = o.masked_fill(broken[:, None, None], torch.nan), lse.masked_fill(broken[:, None], torch.nan)
    return o, lse


def _broken(x: Tensor, bounds: Tensor) -> Tensor:
    """Whether each of the sequences packed in ``(1, T, ...)`` has something that is not finite."""
    count = pad((~x[0].isfinite()).flatten(1).any(1).cumsum(0), (1, 0))
    return count[bounds[1:]] > count[bounds[:-1]]


def _mask(
    beside: Tensor, of_query: Tensor | None, of_key: Tensor | None, causal: bool, window: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = beside[i] - j
        found = distance >= 0 if causal else distance == distance
        if window is not None:
            found = found & (distance.abs() < window)
        if of_query is not None and of_key is not None:
            found = found & (of_query[i] == of_key[j])
        return found

    return sees


def _score(
    bias: Tensor | None, logit_cap: float | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    if bias is None and logit_cap is None:
        return None

    def changed(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if logit_cap is not None:
            score = logit_cap * torch.tanh(score / logit_cap)
        return score if bias is None else score + bias[b, h, i, j]

    return changed
