"""The public ``selective_scan``: its documentation, its checks and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.checks import (
    COMPLEX_OF,
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
from seqzoo.kernels.dispatch import check_boundaries, chosen, define, slot
from seqzoo.packing import Packing, assert_values, boundaries

TRANSITIONS = ("exponential", "longhorn")
# tokens between two states that a forward pass keeps for its backward pass
CHUNK = 64


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
    transition: str = "exponential",
    delta_softplus: bool = False,
    cu_seqlens: Tensor | Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective state space: every channel a linear recurrence of N values with a step of its own at every token.

    ``h_t = a_t * h_{t-1} + b_t``, ``y_t = (sum_n C_t h_t + D u_t) * silu(z_t)``, with ``step = delta + delta_bias``,
    through a softplus if asked for, and

    * ``"exponential"`` (Mamba, https://arxiv.org/abs/2312.00752, algorithm 2): ``a = exp(step A)``, ``b = step B u``;
    * ``"longhorn"`` (https://arxiv.org/abs/2407.14207, section 3): ``a = 1 - eps B^2``, ``b = eps B u``, with
      ``eps = step / (1 + step |B|^2)`` and the norm over the N values.

    Neither a, b nor h is ever as a whole in memory: the backward pass recomputes h from the states between chunks.
    Computed in float32 (float64 for float64 inputs).

    Args:
        u: ``(B, T, D)``: float64, float32, bfloat16 or float16.
        delta: ``(B, T, D)``, of u's dtype or float32.
        A: ``(D, N)``, of u's dtype or float32, negative; or of the complex dtype of the accumulator, with a negative
            real part. None for ``"longhorn"``.
        B: ``(B, T, N)`` or, in G groups of channels, ``(B, T, G, N)`` where channel d reads group ``d // (D // G)``; of
            u's dtype, complex exactly when A is.
        C: As B. With complex A the real part of ``sum_n C h`` is taken.
        D: Weight of the input, ``(D,)``, of u's dtype or float32.
        z: Gate, ``(B, T, D)``, of u's dtype.
        delta_bias: ``(D,)``, of u's dtype or float32.
        initial_state: The state before the first token, ``(B, D, N)``, of u's dtype or float32 (of A's dtype where that
            is complex); zero when omitted. With ``cu_seqlens`` one row a sequence, ``(S, D, N)``.
        transition: How a and b follow from the step.
        delta_softplus: Whether the step is the softplus of ``delta + delta_bias``.
        cu_seqlens: Boundaries of packed sequences, int32 ``(S + 1,)`` from 0 to T, or a Packing; B is then 1.

    Returns:
        y: ``(B, T, D)``, of u's dtype.
        final_state: ``(B, D, N)`` or ``(S, D, N)``, float32, or u's or A's dtype where that is wider or complex. A
            sequence without tokens returns the state that it was given.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If the transition is unknown; if shapes, groups, devices or boundaries disagree; under
            ``seqzoo.ops.checks`` if a value is not finite or a real part of A positive.
        RuntimeError: If an implementation asked for by name cannot run; if it is differentiated twice, forward or under
            ``torch.func``, which ``backend("reference")`` allows.

    Example:
        >>> import torch
        >>> from seqzoo.ops import selective_scan
        >>> ones = torch.ones(1, 3, 1)
        >>> y, final_state = selective_scan(ones, ones, -torch.ones(1, 1), ones, ones)
        >>> [round(value, 4) for value in y.flatten().tolist()]
        [1.0, 1.3679, 1.5032]
    """
    if slot.parallel is not None:
        steps = {"transition": transition, "delta_softplus": delta_softplus}
        return slot.parallel.selective_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, steps, cu_seqlens)
    if transition not in TRANSITIONS:
        raise ValueError(f"transition must be one of {', '.join(TRANSITIONS)}, got {transition!r}")
    check_activation("u", u)
    check_rank("u", u, 3, "(B, T, D)")
    number = _check_decay(u, A, transition)
    if A is not None:
        check_rank("A", A, 2, "(D, N)")
        check_shape("A", A, (u.shape[2], A.shape[1]), of="(D, N)")
    _check_projections(u, None if A is None else A.shape[1], B, C, number)
    _check_channelwise(u, delta, D, z, delta_bias)
    bounds = boundaries(cu_seqlens, u.shape[0], u.shape[1], u.device)
    state = None if initial_state is None else _check_state(initial_state, u, B, bounds, number)
    others = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias, "initial_state": state}
    for name, value in others.items():
        if value is not None:
            check_device(name, value, "u", u.device)
    check_finite(u=u, **others)
    check_sign("A", A)
    B, C = (value.unsqueeze(2) if value.dim() == 3 else value for value in (B, C))
    if slot.backend == "reference":
        check_boundaries(bounds, u.shape[1])
        from seqzoo.kernels.selective_scan import reference

        return reference.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, state, delta_softplus=delta_softplus, cu_seqlens=bounds
        )
    if isinstance(cu_seqlens, Tensor) and u.device.type == "cuda":
        assert_values(cu_seqlens, u.shape[1])
    arguments = (u, delta, A, B, C, D, z, delta_bias, state, bounds, delta_softplus, slot.backend or "")
    if not needs_gradient(u, delta, A, B, C, D, z, delta_bias, state):
        return _forward(*arguments)[:2]  # nothing to record
    y, final_state = _SelectiveScan.apply(*arguments)
    return y, final_state


def _check_decay(u: Tensor, A: Tensor | None, transition: str) -> torch.dtype:
    """Returns the dtype that B, C and the state have beside this A."""
    if transition == "longhorn":
        if A is not None:
            raise ValueError("A must be None for the transition 'longhorn', which makes its own decay")
        return u.dtype
    if A is None:
        raise ValueError("A must be given for the transition 'exponential'")
    complex_dtype = COMPLEX_OF[accumulator(u.dtype)]
    check_activation("A", A, (u.dtype, torch.float32, complex_dtype))
    return complex_dtype if A.is_complex() else u.dtype


def _check_projections(u: Tensor, size: int | None, B: Tensor, C: Tensor, number: torch.dtype) -> None:
    batch, total, width = u.shape
    for name, value in (("B", B), ("C", C)):
        check_same(name, value, "u" if number == u.dtype else "a complex A", number)
    if B.dim() not in (3, 4):
        raise ValueError(f"B must have shape (B, T, N) or (B, T, G, N), got {tuple(B.shape)}")
    groups, size = (1 if B.dim() == 3 else B.shape[2]), B.shape[-1] if size is None else size
    if groups < 1 or width % groups != 0:
        raise ValueError(f"the groups of B must divide the {width} channels of u, got {groups}")
    check_shape("B", B, (batch, total, size), (batch, total, groups, size), of="(B, T, N) or (B, T, G, N)")
    check_shape("C", C, tuple(B.shape), of="that of B")


def _check_channelwise(u: Tensor, delta: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None) -> None:
    check_parameter("delta", delta, "u", u.dtype)
    check_shape("delta", delta, tuple(u.shape), of="(B, T, D)")
    if z is not None:
        check_same("z", z, "u", u.dtype)
        check_shape("z", z, tuple(u.shape), of="(B, T, D)")
    for name, value in (("D", D), ("delta_bias", delta_bias)):
        if value is not None:
            check_parameter(name, value, "u", u.dtype)
            check_shape(name, value, (u.shape[2],), of="(D,)")


def _check_state(state: Tensor, u: Tensor, B: Tensor, bounds: Tensor | None, number: torch.dtype) -> Tensor:
    check_parameter("initial_state", state, "activations", number)
    rows, letters = (u.shape[0], "(B, D, N)") if bounds is None else (bounds.shape[0] - 1, "(S, D, N)")
    check_shape("initial_state", state, (rows, u.shape[2], B.shape[-1]), of=letters)
    return state.to(accumulator(number))


def n_chunk_states(u: Tensor, cu_seqlens: Tensor | None, backend: str) -> int:
    """How many states between chunks a forward pass keeps for the backward pass.

    A sequence's chunks are ``CHUNK`` of its own tokens; sequence ``s`` owns the rows from ``cu_seqlens[s] // CHUNK +
    s``, at most one more than it needs. Those of the chunked implementation, which sees resets in a single sequence,
    are cut regardless of the boundaries.
    """
    batch, total, _ = u.shape
    if cu_seqlens is None or chosen(backend, u) == "chunked":
        return batch * ((total + CHUNK - 1) // CHUNK)
    return total // CHUNK + cu_seqlens.shape[0] - 1


def _forward_fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    width, size = u.shape[2], B.shape[3]
    dtype = accumulator(B.dtype)
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        u.new_empty(u.shape),
        u.new_empty((rows, width, size), dtype=dtype),
        u.new_empty((n_chunk_states(u, cu_seqlens, backend), size, width), dtype=dtype),
    )


def _backward_fake(
    grad_y: Tensor,
    grad_final_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    chunk_states: Tensor,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    like = (u, delta, A, B, C, D, z, delta_bias, grad_final_state)
    return tuple(u.new_empty(0) if value is None else value.new_empty(value.shape) for value in like)


_forward = define(
    "selective_scan",
    "forward",
    "(Tensor u, Tensor delta, Tensor? A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
    " Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, str backend)"
    " -> (Tensor y, Tensor final_state, Tensor chunk_states)",
    _forward_fake,
)
_backward = define(
    "selective_scan",
    "backward",
    "(Tensor grad_y, Tensor grad_final_state, Tensor u, Tensor delta, Tensor? A, Tensor B, Tensor C, Tensor? D,"
    " Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor chunk_states, Tensor? cu_seqlens,"
    " bool delta_softplus, str backend)"
    " -> (Tensor grad_u, Tensor grad_delta, Tensor grad_A, Tensor grad_B, Tensor grad_C, Tensor grad_D, Tensor grad_z,"
    " Tensor grad_delta_bias, Tensor grad_initial_state)",
    _backward_fake,
)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, delta_softplus, backend = arguments
        y, final_state, chunk_states = _forward(*arguments)
        ctx.save_for_backward(*tensors, chunk_states)
        ctx.options = delta_softplus, backend
        return y, final_state

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        *inputs, cu_seqlens, chunk_states = ctx.saved_tensors
        found = _backward(*gradients, *inputs, chunk_states, cu_seqlens, *ctx.options)
        given = (None if value is None else gradient for value, gradient in zip(inputs, found, strict=True))
        return *given, None, None, None
