"""The public ``linear_attention``: its documentation, its checks and its registration."""

from __future__ import annotations

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
    check_sign,
)
from seqzoo.kernels.derivatives import needs_gradient, once
from seqzoo.kernels.dispatch import check_boundaries, define, slot, uncast
from seqzoo.packing import Packing, assert_values, boundaries

# a tile of more keys does not fit the registers and the shared memory of a multiprocessor
WIDEST_KEY = 256


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    cu_seqlens: Tensor | Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention without a softmax, as a recurrence on a matrix: ``S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T``.

    ``o_t = scale * q_t S_t``, for every head. The recurrence under linear attention
    (https://arxiv.org/abs/2006.16236), RetNet (https://arxiv.org/abs/2307.08621), Mamba-2
    (https://arxiv.org/abs/2405.21060), GLA (https://arxiv.org/abs/2312.06635), HGRN2 and mLSTM. Solved in chunks whose
    inside is matrix products and between which only the state passes; computed in float32 (float64 for float64 inputs).

    A value that is not finite may reach tokens before it, those of its chunk, because weights of zero multiply it.
    Other sequences, packed or not, are safe from it.

    Args:
        q: ``(B, T, G, K)``, K at most 256: float64, float32, bfloat16 or float16. G divides H; head h reads group
            ``h // (H // G)``.
        k: As q.
        v: ``(B, T, H, V)``, of q's dtype.
        log_decay: The logarithm of the factor on the state, at most 0, of q's dtype or float32: None for no decay,
            ``(H,)`` for a fixed one a head, ``(B, T, H)`` a token and head, ``(B, T, H, K)`` for every key's row of the
            state.
        initial_state: S before the first token, ``(B, H, K, V)``, of q's dtype or float32; zero when omitted. With
            ``cu_seqlens`` one row a sequence, ``(S, H, K, V)``.
        scale: Factor on the outputs; None means ``K ** -0.5``.
        causal: Whether a token sees only those up to it. If not, ``o_t = scale * q_t (S_0 + sum_s k_s v_s^T)`` over the
            whole sequence, the final state is that sum, and ``log_decay`` must be None.
        cu_seqlens: Boundaries of packed sequences, int32 ``(S + 1,)`` from 0 to T, or a Packing; B is then 1.

    Returns:
        o: ``(B, T, H, V)``, of q's dtype.
        final_state: ``(B, H, K, V)`` or ``(S, H, K, V)``, float32, or float64 for float64 inputs. A sequence without
            tokens returns the state that it was given.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If shapes, groups, devices or boundaries disagree; if K is above 256; if a decay is given and
            ``causal`` is False; under ``seqzoo.ops.checks`` if a value is not finite or a decay's logarithm positive.
        RuntimeError: If an implementation asked for by name cannot run; if it is differentiated twice, forward or under
            ``torch.func``, which ``backend("reference")`` allows.

    Example:
        >>> import torch
        >>> from seqzoo.ops import linear_attention
        >>> ones = torch.ones(1, 3, 1, 1)
        >>> o, final_state = linear_attention(ones, ones, ones)
        >>> o.flatten().tolist()
        [1.0, 2.0, 3.0]
    """
    if slot.parallel is not None:
        return slot.parallel.linear_attention(q, k, v, log_decay, initial_state, scale, causal, cu_seqlens)
    check_queries(q, k, v)
    batch, total, _, size = q.shape
    heads = v.shape[2]
    if log_decay is not None:
        if not causal:
            raise ValueError("log_decay must be None where causal is False: without an order there is no decay")
        check_parameter("log_decay", log_decay, "q", q.dtype)
        shapes = ((heads,), (batch, total, heads), (batch, total, heads, size))
        check_shape("log_decay", log_decay, *shapes, of="(H,), (B, T, H) or (B, T, H, K)")
        check_device("log_decay", log_decay, "q", q.device)
    bounds = boundaries(cu_seqlens, batch, total, q.device)
    state = check_matrix_state(initial_state, q, v, bounds)
    check_finite(q=q, k=k, v=v, log_decay=log_decay, initial_state=state)
    check_sign("log_decay", log_decay)
    factor = max(size, 1) ** -0.5 if scale is None else float(scale)
    if slot.backend == "reference":
        check_boundaries(bounds, total)
        from seqzoo.kernels.linear_attention import reference

        with uncast(q.device):
            return reference.linear_attention(q, k, v, log_decay, state, scale=factor, causal=causal, cu_seqlens=bounds)
    if isinstance(cu_seqlens, Tensor) and q.device.type == "cuda":
        assert_values(cu_seqlens, total)
    arguments = (q, k, v, log_decay, state, bounds, factor, causal, slot.backend or "")
    if not needs_gradient(q, k, v, log_decay, state):
        return _forward(*arguments)  # nothing to record
    o, final_state = _LinearAttention.apply(*arguments)
    return o, final_state


def check_queries(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q, k ``(B, T, G, K)`` and v ``(B, T, H, V)`` belong together."""
    check_activation("q", q)
    check_rank("q", q, 4, "(B, T, G, K)")
    check_same("k", k, "q", q.dtype)
    check_shape("k", k, tuple(q.shape), of="that of q")
    check_same("v", v, "q", q.dtype)
    check_rank("v", v, 4, "(B, T, H, V)")
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v must have the B and T of q, {tuple(q.shape[:2])}, got {tuple(v.shape[:2])}")
    groups, heads = q.shape[2], v.shape[2]
    if groups < 1 or heads % groups != 0:
        raise ValueError(f"the groups of q and k must divide the {heads} heads of v, got {groups}")
    check_keys(q.shape[3])
    for name, value in (("k", k), ("v", v)):
        check_device(name, value, "q", q.device)


def check_keys(size: int) -> None:
    """Raises ValueError if a head's keys are more than the kernels hold."""
    if size > WIDEST_KEY:
        raise ValueError(
            f"K must be at most {WIDEST_KEY}, got {size}: the kernels hold a whole row of keys on chip; use more heads "
            "of smaller keys"
        )


def check_matrix_state(state: Tensor | None, q: Tensor, v: Tensor, bounds: Tensor | None) -> Tensor | None:
    """The initial state of every head, checked and in the accumulator's dtype."""
    if state is None:
        return None
    check_parameter("initial_state", state, "activations", q.dtype)
    rows, letters = (q.shape[0], "(B, H, K, V)") if bounds is None else (bounds.shape[0] - 1, "(S, H, K, V)")
    check_shape("initial_state", state, (rows, v.shape[2], q.shape[3], v.shape[3]), of=letters)
    check_device("initial_state", state, "the sequence", q.device)
    return state.to(accumulator(q.dtype))


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty((rows, v.shape[2], q.shape[3], v.shape[3]), dtype=accumulator(q.dtype))
    return v.new_empty(v.shape), state


def _backward_fake(
    grad_o: Tensor,
    grad_final_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    like = (q, k, v, log_decay, grad_final_state)
    return tuple(q.new_empty(0) if value is None else value.new_empty(value.shape) for value in like)


_forward = define(
    "linear_attention",
    "forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, float scale,"
    " bool causal, str backend) -> (Tensor o, Tensor final_state)",
    _forward_fake,
)
_backward = define(
    "linear_attention",
    "backward",
    "(Tensor grad_o, Tensor grad_final_state, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state,"
    " Tensor? cu_seqlens, float scale, bool causal, str backend)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_log_decay, Tensor grad_initial_state)",
    _backward_fake,
)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, scale, causal, backend = arguments
        ctx.save_for_backward(*tensors)
        ctx.options = scale, causal, backend
        return _forward(*arguments)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        *inputs, cu_seqlens = ctx.saved_tensors
        found = _backward(*gradients, *inputs, cu_seqlens, *ctx.options)
        given = (None if value is None else gradient for value, gradient in zip(inputs, found, strict=True))
        return *given, None, None, None, None
