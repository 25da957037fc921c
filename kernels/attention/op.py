"""The public ``attention``: its documentation and its checks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.checks import (
    accumulator,
    check_activation,
    check_device,
    check_finite,
    check_parameter,
    check_rank,
    check_same,
    check_shape,
)
from seqzoo.kernels.derivatives import needs_gradient, once
from seqzoo.kernels.dispatch import check_boundaries, chosen, define, slot, uncast
from seqzoo.packing import Packing, assert_values, boundaries


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    logit_cap: float | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | Packing | None = None,
    cu_seqlens_k: Tensor | Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention, https://arxiv.org/abs/1706.03762, with the logarithm of its sums::

        s_ij = cap(scale q_i k_j) + bias_ij     cap(s) = logit_cap tanh(s / logit_cap)
        lse_i = log(sum_j exp(s_ij) + exp(sink))     o_i = sum_j exp(s_ij - lse_i) v_j

    over the keys j that query i sees. Queries and keys end together: of T queries and T_k keys, query i stands beside
    key ``p = i + T_k - T``. Where ``causal`` it sees keys ``j <= p``; with a window keys ``|p - j| < window``.
    Both results are differentiable, so attention to parts of the keys merges into attention to all of them: with
    ``lse = logaddexp(lse_1, lse_2)`` the output is ``exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2``. Sums run in
    float32, in float64 for float64 inputs. A query that sees no key has output zero and lse -infinity (the sink, where
    there is one), and passes no gradient on.

    A value that is not finite may reach tokens before it, those of its tile, because weights of zero multiply it. Other
    sequences, packed or not, are safe from it. In half precision on a CPU lse is exact to 1e-4, as the exponentials of
    PyTorch's kernel are. Boundaries of packed sequences are read on the host except on GPUs below float64.

    Args:
        q: ``(B, T, H, K)``: float64, float32, bfloat16 or float16.
        k: ``(B, T_k, G, K)``, of q's dtype; G divides H, and head h reads group ``h // (H // G)``
            (https://arxiv.org/abs/2305.13245).
        v: ``(B, T_k, G, V)``, of q's dtype.
        causal: Whether queries see no later key.
        window: Keys that a causal query sees at most, its own included; others see as many to the other side.
        scale: Factor of the scores; ``K ** -0.5`` when omitted.
        sinks: ``(H,)``, of q's dtype or float32: what joins each head's sums without a value, so that a query may
            attend to nothing. It is part of lse: give it to one of the parts to be merged alone.
        logit_cap: Greatest magnitude of a score before the bias.
        bias: ``(B, H, T, T_k)``, each of the first three also 1; of q's dtype or float32, -infinity where a query does
            not see a key. Not with packed sequences.
        cu_seqlens: Boundaries of packed sequences, int32 ``(S + 1,)`` from 0 to T, or a Packing; B is then 1.
        cu_seqlens_k: Those of the keys, from 0 to T_k, where they differ.

    Returns:
        o: ``(B, T, H, V)``, of q's dtype.
        lse: ``(B, T, H)``, float32, float64 for float64 inputs.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If shapes, devices or boundaries disagree, the window is below 1, scale or logit_cap are not finite
            and positive, or a bias meets packed sequences.
        RuntimeError: If an implementation asked for by name cannot run; if it is differentiated twice, forward or under
            ``torch.func``, which ``backend("reference")`` allows.

    Example:
        >>> import torch
        >>> from seqzoo.ops import attention
        >>> q, k, v = torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2), torch.tensor([3.0, 6.0, 9.0]).view(1, 3, 1, 1)
        >>> o, lse = attention(q, k, v)
        >>> o.flatten().tolist(), lse.exp().flatten().round().tolist()
        ([3.0, 4.5, 6.0], [1.0, 2.0, 3.0])
    """
    bounds, bounds_k = _check(q, k, v, window, scale, sinks, logit_cap, bias, cu_seqlens, cu_seqlens_k)
    check_finite(q=q, k=k, v=v, sinks=sinks)
    factor = max(q.shape[3], 1) ** -0.5 if scale is None else float(scale)
    if slot.backend == "reference":
        check_boundaries(bounds, q.shape[1])
        check_boundaries(bounds_k, k.shape[1])
        from seqzoo.kernels.attention import reference

        with uncast(q.device):
            return reference.attention(
                q,
                k,
                v,
                causal=causal,
                window=window,
                scale=factor,
                sinks=sinks,
                logit_cap=logit_cap,
                bias=bias,
                cu_seqlens=bounds,
                cu_seqlens_k=bounds if bounds_k is None else bounds_k,
            )
    record = needs_gradient(q, k, v, sinks, bias)
    logit_cap = None if logit_cap is None else float(logit_cap)
    arguments = (q, k, v, sinks, bias, bounds, bounds_k, causal, window, factor, logit_cap)
    backend = slot.backend or ""
    if _on_gpu(q, backend):
        from seqzoo.kernels.attention import gpu

        if gpu.takes(q, k, v, bias, record):
            if isinstance(cu_seqlens, Tensor):
                assert_values(cu_seqlens, q.shape[1])
            if isinstance(cu_seqlens_k, Tensor) and bounds_k is not None:
                assert_values(cu_seqlens_k, k.shape[1])
            with uncast(q.device):
                return gpu.attention(*arguments, record)
    if not record:
        return _forward(*arguments, backend)
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places
        arguments = (q, k.view_as(k), v.view_as(v), *arguments[3:])
    o, lse = _Attention.apply(*arguments, backend)
    return o, lse


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float | None,
    sinks: Tensor | None,
    logit_cap: float | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | Packing | None,
    cu_seqlens_k: Tensor | Packing | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Raises unless the arguments belong together; the boundaries of queries, and of keys where they differ."""
    check_activation("q", q)
    for name, tensor, letters in (("q", q, "(B, T, H, K)"), ("k", k, "(B, T_k, G, K)"), ("v", v, "(B, T_k, G, V)")):
        if name != "q":
            check_same(name, tensor, "q", q.dtype)
            check_device(name, tensor, "q", q.device)
        check_rank(name, tensor, 4, letters)
    batch, total, heads, size = q.shape
    total_k, groups = k.shape[1:3]
    check_shape("k", k, (batch, total_k, groups, size), of="(B, T_k, G, K)")
    check_shape("v", v, (batch, total_k, groups, v.shape[3]), of="(B, T_k, G, V)")
    if groups == 0 or heads % groups:
        raise ValueError(f"the heads of k must divide the {heads} of q, got {groups}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be a positive integer or None, got {window!r}")
    for name, number in (("scale", scale), ("logit_cap", logit_cap)):
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {number!r}")
    if sinks is not None:
        check_parameter("sinks", sinks, "q", q.dtype)
        check_shape("sinks", sinks, (heads,), of="(H,)")
        check_device("sinks", sinks, "q", q.device)
    bounds, bounds_k = _bounds(q, k, cu_seqlens, cu_seqlens_k)
    if bias is not None:
        if bounds is not None:
            raise ValueError("bias is for dense batches: it has no place for packed sequences, whose lengths differ")
        check_parameter("bias", bias, "q", q.dtype)
        check_rank("bias", bias, 4, "(B, H, T, T_k)")
        shape = tuple(1 if have == 1 else want for have, want in zip(bias.shape, (batch, heads, total), strict=False))
        check_shape("bias", bias, (*shape, total_k), of="(B, H, T, T_k), each of the first three also 1,")
        check_device("bias", bias, "q", q.device)
    return bounds, bounds_k


def _on_gpu(q: Tensor, backend: str) -> bool:
    if backend not in ("", "gpu"):
        return False
    if torch.compiler.is_compiling():
        return q.device.type == "cuda" and q.dtype != torch.float64
    return (q.device.type == "cuda" or backend == "gpu") and chosen(backend, q) == "gpu"


def _bounds(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | Packing | None, cu_seqlens_k: Tensor | Packing | None
) -> tuple[Tensor | None, Tensor | None]:
    """The boundaries of queries and those of keys, None where they are the same."""
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k needs cu_seqlens: keys that are packed belong to packed queries")
        return None, None
    bounds = boundaries(cu_seqlens, q.shape[0], q.shape[1], q.device)
    if cu_seqlens_k is None:
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"k must have the {q.shape[1]} tokens of q unless cu_seqlens_k says where its own sequences are, got "
                f"{k.shape[1]}"
            )
        return bounds, None
    if cu_seqlens_k is cu_seqlens and q.shape[1] == k.shape[1]:
        return bounds, None
    bounds_k = boundaries(cu_seqlens_k, k.shape[0], k.shape[1], k.device)
    if bounds is not None and bounds_k is not None:
        check_shape("cu_seqlens_k", bounds_k, tuple(bounds.shape), of="that of cu_seqlens,")
    return bounds, bounds_k


def _forward_fake(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


def _backward_fake(
    grad_o: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    logit_cap: float | None,
    bias_gradient: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    like = (q, k, v, sinks, bias if bias_gradient else None)
    return tuple(q.new_empty(0) if value is None else value.new_empty(value.shape) for value in like)


# q, k and v stay where they are: a cache of keys and values is not to be copied at every token that is decoded
_forward = define(
    "attention",
    "forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, Tensor? cu_seqlens, Tensor? cu_seqlens_k, bool causal,"
    " SymInt? window, float scale, float? logit_cap, str backend) -> (Tensor o, Tensor lse)",
    _forward_fake,
    strided=("q", "k", "v", "bias"),
)
_backward = define(
    "attention",
    "backward",
    "(Tensor grad_o, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, Tensor? cu_seqlens,"
    " Tensor? cu_seqlens_k, Tensor o, Tensor lse, bool causal, SymInt? window, float scale, float? logit_cap,"
    " bool bias_gradient, str backend)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_sinks, Tensor grad_bias)",
    _backward_fake,
    strided=("q", "k", "v", "bias"),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, causal, window, scale, logit_cap, backend = arguments
        o, lse = _forward(*arguments)
        ctx.save_for_backward(*tensors, o, lse)
        ctx.options = causal, window, scale, logit_cap, ctx.needs_input_grad[4], backend
        return o, lse

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        found = _backward(*gradients, *ctx.saved_tensors, *ctx.options)
        wanted = ctx.needs_input_grad
        return *(x if asked else None for x, asked in zip(found, wanted, strict=False)), *[None] * 7
