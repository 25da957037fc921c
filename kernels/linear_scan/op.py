"""The public ``linear_scan``: its documentation, its checks and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.checks import (
    COMPLEX,
    HALF,
    REAL,
    accumulator,
    check_activation,
    check_device,
    check_finite,
    check_parameter,
    check_rank,
    check_shape,
)
from seqzoo.kernels.derivatives import needs_gradient, once
from seqzoo.kernels.dispatch import check_boundaries, chosen, define, slot
from seqzoo.packing import Packing, assert_values, boundaries

# tokens between two states that a forward pass keeps for its backward pass
CHUNK = 64


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """First-order linear recurrence, elementwise: ``h_t = a_t * h_{t-1} + b_t``.

    The recurrence under minGRU (https://arxiv.org/abs/2410.01201), LRU, S5, GateLoop, HGRN and RG-LRU, in linear space
    and float32 (float64 for float64 inputs) whatever the inputs' dtype. Differentiable once, in all three inputs; the
    backward pass is the same recurrence run the other way (https://arxiv.org/abs/1709.04057, section 2.2).

    Args:
        a: Factor on the previous value, ``(B, T, D)``, or ``(D,)`` when it does not depend on time. Of b's dtype or
            float32; complex exactly when b is.
        b: What is added, ``(B, T, D)``: float64, float32, bfloat16, float16, complex128 or complex64.
        initial_state: The value before the first token, ``(B, D)``, of b's dtype or float32; zero when omitted. With
            ``cu_seqlens`` one row a sequence, ``(S, D)``.
        reverse: Runs from the last token to the first within each sequence: ``h_t = a_t * h_{t+1} + b_t``. The initial
            state enters after the last token, the final state is the value at the first.
        cu_seqlens: Boundaries of packed sequences, int32 ``(S + 1,)`` from 0 to T, or a Packing; B is then 1.

    Returns:
        h: ``(B, T, D)``, of b's dtype.
        final_state: ``(B, D)`` or ``(S, D)``, float32, or b's dtype where that is wider or complex. A sequence without
            tokens returns the state that it was given.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If shapes, devices or boundaries disagree.
        RuntimeError: If an implementation asked for by name cannot run; if it is differentiated twice, forward or under
            ``torch.func``, which ``backend("reference")`` allows.

    Example:
        >>> import torch
        >>> from seqzoo.ops import linear_scan
        >>> a, b = torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1)
        >>> h, final_state = linear_scan(a, b)
        >>> h.flatten().tolist(), final_state.flatten().tolist()
        ([1.0, 1.5, 1.75], [1.75])
    """
    if slot.parallel is not None:
        return slot.parallel.linear_scan(a, b, initial_state, reverse, cu_seqlens)
    check_activation("b", b, REAL + COMPLEX)
    check_rank("b", b, 3, "(B, T, D)")
    check_parameter("a", a, "b", b.dtype)
    batch, total, width = b.shape
    check_shape("a", a, (batch, total, width), (width,), of="(B, T, D) or (D,)")
    check_device("a", a, "b", b.device)
    bounds = boundaries(cu_seqlens, batch, total, b.device)
    state = check_state(initial_state, b, bounds, width)
    check_finite(a=a, b=b, initial_state=initial_state)
    if slot.backend == "reference":
        check_boundaries(bounds, total)
        from seqzoo.kernels.linear_scan import reference

        return reference.linear_scan(a, b, state, reverse=reverse, cu_seqlens=bounds)
    if isinstance(cu_seqlens, Tensor) and b.device.type == "cuda":
        assert_values(cu_seqlens, total)
    arguments = (a, b, state, bounds, reverse, slot.backend or "")
    if not needs_gradient(a, b, state):
        return _forward(*arguments)[:2]  # nothing to record
    h, final_state = _LinearScan.apply(*arguments)
    return h, final_state


def check_state(state: Tensor | None, activation: Tensor, bounds: Tensor | None, width: int) -> Tensor | None:
    """The initial state of an elementwise scan, checked and in the accumulator's dtype."""
    if state is None:
        return None
    check_parameter("initial_state", state, "activations", activation.dtype)
    rows, letters = (activation.shape[0], "(B, D)") if bounds is None else (bounds.shape[0] - 1, "(S, D)")
    check_shape("initial_state", state, (rows, width), of=letters)
    check_device("initial_state", state, "the sequence", activation.device)
    return state.to(accumulator(activation.dtype))


def n_chunk_states(activation: Tensor, cu_seqlens: Tensor | None, backend: str) -> int:
    """How many states between chunks a forward pass keeps for the backward pass.

    The Triton kernels recompute h from the state that enters each chunk of ``CHUNK`` tokens. On the CPU h itself
    serves, unless it was rounded to 16 bits. Packed sequences have chunks of their own: sequence ``s`` owns the rows
    from ``cu_seqlens[s] // CHUNK + s``, at most one more than it needs, so that a row's sequence is found without a
    sum.
    """
    name = chosen(backend, activation)
    if name == "chunked" or (name == "cpu" and activation.dtype not in HALF):
        return 0
    batch, total, _ = activation.shape
    if cu_seqlens is None:
        return batch * ((total + CHUNK - 1) // CHUNK)
    return total // CHUNK + cu_seqlens.shape[0] - 1


def keeps_output(activation: Tensor, n_chunks: int) -> bool:
    """Whether the backward pass reads h as the forward pass returned it."""
    return n_chunks == 0 and activation.dtype not in HALF


def _forward_fake(
    a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(b.dtype)
    rows = b.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        torch.empty_like(b, memory_format=torch.contiguous_format),
        b.new_empty((rows, b.shape[2]), dtype=dtype),
        b.new_empty((n_chunk_states(b, cu_seqlens, backend), b.shape[2]), dtype=dtype),
    )


def _backward_fake(
    grad_h: Tensor,
    grad_final_state: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    h: Tensor | None,
    chunk_states: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(a, memory_format=contiguous),
        torch.empty_like(b, memory_format=contiguous),
        torch.empty_like(grad_final_state, memory_format=contiguous),
    )


_forward = define(
    "linear_scan",
    "forward",
    "(Tensor a, Tensor b, Tensor? initial_state, Tensor? cu_seqlens, bool reverse, str backend)"
    " -> (Tensor h, Tensor final_state, Tensor chunk_states)",
    _forward_fake,
)
_backward = define(
    "linear_scan",
    "backward",
    "(Tensor grad_h, Tensor grad_final_state, Tensor a, Tensor b, Tensor? initial_state, Tensor? h,"
    " Tensor chunk_states, Tensor? cu_seqlens, bool reverse, str backend)"
    " -> (Tensor grad_a, Tensor grad_b, Tensor grad_initial_state)",
    _backward_fake,
)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        h, final_state, chunk_states = _forward(a, b, initial_state, cu_seqlens, reverse, backend)
        kept = h if keeps_output(b, chunk_states.shape[0]) else None
        ctx.save_for_backward(a, b, initial_state, kept, chunk_states, cu_seqlens)
        ctx.reverse, ctx.backend = reverse, backend
        return h, final_state

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        grad_h, grad_final_state = gradients
        a, b, initial_state, h, chunk_states, cu_seqlens = ctx.saved_tensors
        grad_a, grad_b, grad_state = _backward(
            grad_h, grad_final_state, a, b, initial_state, h, chunk_states, cu_seqlens, ctx.reverse, ctx.backend
        )
        return grad_a, grad_b, None if initial_state is None else grad_state, None, None, None
