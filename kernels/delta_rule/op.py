"""The public ``delta_rule``: its documentation, its checks and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.checks import (
    accumulator,
    check_device,
    check_finite,
    check_parameter,
    check_shape,
    check_sign,
)
from seqzoo.kernels.derivatives import needs_gradient, once
from seqzoo.kernels.dispatch import check_boundaries, define, slot, uncast
from seqzoo.kernels.linear_attention.op import check_matrix_state, check_queries
from seqzoo.packing import Packing, assert_values, boundaries


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention that replaces what its keys already hold: ``S_t = S' + beta_t k_t (v_t - k_t S')^T``.

    ``S' = exp(log_decay_t) S_{t-1}`` and ``o_t = scale * q_t S_t``, for every head: a step of gradient descent on
    ``|k_t S - v_t|^2`` at every token. The recurrence under DeltaNet (https://arxiv.org/abs/2406.06484), Gated DeltaNet
    (https://arxiv.org/abs/2412.06464) and Kimi Delta Attention (https://arxiv.org/abs/2510.26692), solved in chunks by
    the WY representation of products of Householder matrices (https://doi.org/10.1137/0908009). Computed in float32
    (float64 for float64 inputs).

    Stable where ``beta |k|^2`` lies within (0, 2): the caller normalises k.

    A value that is not finite may reach tokens before it, those of its chunk, because weights of zero multiply it.
    Other sequences, packed or not, are safe from it.

    Args:
        q: ``(B, T, G, K)``, K at most 256: float64, float32, bfloat16 or float16. G divides H; head h reads group
            ``h // (H // G)``.
        k: As q.
        v: ``(B, T, H, V)``, of q's dtype.
        beta: Weight of what is written, ``(B, T, H)``, of q's dtype or float32.
        log_decay: The logarithm of the factor on the state, at most 0, of q's dtype or float32: None for no decay,
            ``(B, T, H)`` a token and head, ``(B, T, H, K)`` for every key's row of the state.
        initial_state: S before the first token, ``(B, H, K, V)``, of q's dtype or float32; zero when omitted. With
            ``cu_seqlens`` one row a sequence, ``(S, H, K, V)``.
        scale: Factor on the outputs; None means ``K ** -0.5``.
        cu_seqlens: Boundaries of packed sequences, int32 ``(S + 1,)`` from 0 to T, or a Packing; B is then 1.

    Returns:
        o: ``(B, T, H, V)``, of q's dtype.
        final_state: ``(B, H, K, V)`` or ``(S, H, K, V)``, float32, or float64 for float64 inputs. A sequence without
            tokens returns the state that it was given.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If shapes, groups, devices or boundaries disagree; if K is above 256; under ``seqzoo.ops.checks`` if
            a value is not finite or a decay's logarithm positive.
        RuntimeError: If an implementation asked for by name cannot run; if it is differentiated twice, forward or under
            ``torch.func``, which ``backend("reference")`` allows.

    Example:
        >>> import torch
        >>> from seqzoo.ops import delta_rule
        >>> key = torch.ones(1, 3, 1, 1)
        >>> o, final_state = delta_rule(key, key, torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1), key[..., 0])
        >>> o.flatten().tolist()
        [1.0, 2.0, 3.0]
    """
    if slot.parallel is not None:
        return slot.parallel.delta_rule(q, k, v, beta, log_decay, initial_state, scale, cu_seqlens)
    check_queries(q, k, v)
    batch, total, _, size = q.shape
    heads = v.shape[2]
    check_parameter("beta", beta, "q", q.dtype)
    check_shape("beta", beta, (batch, total, heads), of="(B, T, H)")
    check_device("beta", beta, "q", q.device)
    if log_decay is not None:
        check_parameter("log_decay", log_decay, "q", q.dtype)
        shapes = ((batch, total, heads), (batch, total, heads, size))
        check_shape("log_decay", log_decay, *shapes, of="(B, T, H) or (B, T, H, K)")
        check_device("log_decay", log_decay, "q", q.device)
    bounds = boundaries(cu_seqlens, batch, total, q.device)
    state = check_matrix_state(initial_state, q, v, bounds)
    check_finite(q=q, k=k, v=v, beta=beta, log_decay=log_decay, initial_state=state)
    check_sign("log_decay", log_decay)
    factor = max(size, 1) ** -0.5 if scale is None else float(scale)
    if slot.backend == "reference":
        check_boundaries(bounds, total)
        from seqzoo.kernels.delta_rule import reference

        with uncast(q.device):
            return reference.delta_rule(q, k, v, beta, log_decay, state, scale=factor, cu_seqlens=bounds)
    if isinstance(cu_seqlens, Tensor) and q.device.type == "cuda":
        assert_values(cu_seqlens, total)
    arguments = (q, k, v, beta, log_decay, state, bounds, factor, slot.backend or "")
    if not needs_gradient(q, k, v, beta, log_decay, state):
        return _forward(*arguments)  # nothing to record
    o, final_state = _DeltaRule.apply(*arguments)
    return o, final_state


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
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
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, ...]:
    like = (q, k, v, beta, log_decay, grad_final_state)
    return tuple(q.new_empty(0) if value is None else value.new_empty(value.shape) for value in like)


_forward = define(
    "delta_rule",
    "forward",
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens,"
    " float scale, str backend) -> (Tensor o, Tensor final_state)",
    _forward_fake,
)
_backward = define(
    "delta_rule",
    "backward",
    "(Tensor grad_o, Tensor grad_final_state, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay,"
    " Tensor? initial_state, Tensor? cu_seqlens, float scale, str backend) -> (Tensor grad_q, Tensor grad_k,"
    " Tensor grad_v, Tensor grad_beta, Tensor grad_log_decay, Tensor grad_initial_state)",
    _backward_fake,
)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, scale, backend = arguments
        ctx.save_for_backward(*tensors)
        ctx.options = scale, backend
        return _forward(*arguments)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        *inputs, cu_seqlens = ctx.saved_tensors
        found = _backward(*gradients, *inputs, cu_seqlens, *ctx.options)
        given = (None if value is None else gradient for value, gradient in zip(inputs, found, strict=True))
        return *given, None, None, None
