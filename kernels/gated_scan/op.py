"""The public ``gated_scan``: its documentation, its checks and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator, check_activation, check_finite, check_rank
from seqzoo.kernels.derivatives import needs_gradient, once
from seqzoo.kernels.dispatch import check_boundaries, define, slot
from seqzoo.kernels.linear_scan.op import check_state, keeps_output, n_chunk_states
from seqzoo.packing import Packing, assert_values, boundaries

# how many projections a cell reads
CELLS = {"min_gru": 2, "min_lstm": 3}


def gated_scan(
    x: Tensor,
    initial_state: Tensor | None = None,
    *,
    cell: str,
    gate_range: tuple[float, float] = (0.0, 1.0),
    reverse: bool = False,
    cu_seqlens: Tensor | Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of minGRU or minLSTM, read straight from the raw projections: ``linear_scan`` with fused gates.

    "Were RNNs All We Needed?", https://arxiv.org/abs/2410.01201, in linear space. With lo, hi = ``gate_range``:

    * ``"min_gru"``, x = [gate, value]: ``z = sigmoid(gate)``,
      ``h_t = (lo + (hi - lo) (1 - z_t)) h_{t-1} + z_t value_t``;
    * ``"min_lstm"``, x = [forget, input, value]: ``f = sigmoid(forget)``, ``i = sigmoid(input)``, ``i' = i / (f + i)``,
      ``f' = 1 - i'``, ``h_t = (lo + (hi - lo) f'_t) h_{t-1} + i'_t value_t``.

    Neither the gates nor the products are written to memory; the backward pass recomputes them. Gates, recurrence and
    state are float32 (float64 for float64 inputs).

    Args:
        x: The projections side by side in the last dimension, ``(B, T, 2 D)`` for minGRU and ``(B, T, 3 D)`` for
            minLSTM: float64, float32, bfloat16 or float16.
        initial_state: The value before the first token, ``(B, D)``, of x's dtype or float32; zero when omitted. With
            ``cu_seqlens`` one row a sequence, ``(S, D)``.
        cell: ``"min_gru"`` or ``"min_lstm"``.
        gate_range: Range of the factor on the previous value, -1 <= lo < hi <= 1. (-1, 1) allows negative eigenvalues,
            which tracking a state needs (https://arxiv.org/abs/2411.12537).
        reverse: Runs from the last token to the first within each sequence.
        cu_seqlens: Boundaries of packed sequences, int32 ``(S + 1,)`` from 0 to T, or a Packing; B is then 1.

    Returns:
        h: ``(B, T, D)``, of x's dtype.
        final_state: ``(B, D)`` or ``(S, D)``, float32, or float64 for float64 inputs.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If the cell is unknown, or shapes, devices, boundaries or the range disagree.
        RuntimeError: If an implementation asked for by name cannot run; if it is differentiated twice, forward or under
            ``torch.func``, which ``backend("reference")`` allows.
    """
    if slot.parallel is not None:
        return slot.parallel.gated_scan(x, initial_state, cell, gate_range, reverse, cu_seqlens)
    check_activation("x", x)
    check_rank("x", x, 3, "(B, T, n D)")
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    batch, total, channels = x.shape
    if channels % CELLS[cell] != 0:
        raise ValueError(f"x of {cell} must hold {CELLS[cell]} projections side by side, got {channels} channels")
    lo, hi = check_range(gate_range)
    bounds = boundaries(cu_seqlens, batch, total, x.device)
    state = check_state(initial_state, x, bounds, channels // CELLS[cell])
    check_finite(x=x, initial_state=initial_state)
    if slot.backend == "reference":
        check_boundaries(bounds, total)
        from seqzoo.kernels.gated_scan import reference

        return reference.gated_scan(x, state, cell=cell, gate_range=(lo, hi), reverse=reverse, cu_seqlens=bounds)
    if isinstance(cu_seqlens, Tensor) and x.device.type == "cuda":
        assert_values(cu_seqlens, total)
    arguments = (x, state, bounds, cell, lo, hi, reverse, slot.backend or "")
    if not needs_gradient(x, state):
        return _forward(*arguments)[:2]  # nothing to record
    h, final_state = _GatedScan.apply(*arguments)
    return h, final_state


def check_range(gate_range: tuple[float, float]) -> tuple[float, float]:
    """The range of the factor on the previous value as two floats, -1 <= lo < hi <= 1."""
    if not isinstance(gate_range, tuple | list) or len(gate_range) != 2:
        raise TypeError(f"gate_range must be two numbers, got {gate_range!r}")
    lo, hi = map(float, gate_range)
    if not -1.0 <= lo < hi <= 1.0:
        raise ValueError(f"gate_range must satisfy -1 <= lo < hi <= 1, got {tuple(gate_range)}")
    return lo, hi


def value_shaped(x: Tensor, cell: str) -> Tensor:
    """A view that stands for one projection, ``(B, T, D)``: its shape, dtype and device."""
    return x.narrow(2, 0, x.shape[2] // CELLS[cell])


def _forward_fake(
    x: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    lo: float,
    hi: float,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    value, dtype = value_shaped(x, cell), accumulator(x.dtype)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        x.new_empty(value.shape),
        x.new_empty((rows, value.shape[2]), dtype=dtype),
        x.new_empty((n_chunk_states(value, cu_seqlens, backend), value.shape[2]), dtype=dtype),
    )


def _backward_fake(
    grad_h: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    h: Tensor | None,
    chunk_states: Tensor,
    cu_seqlens: Tensor | None,
    cell: str,
    lo: float,
    hi: float,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), grad_final_state.new_empty(grad_final_state.shape)


_forward = define(
    "gated_scan",
    "forward",
    "(Tensor x, Tensor? initial_state, Tensor? cu_seqlens, str cell, float lo, float hi, bool reverse, str backend)"
    " -> (Tensor h, Tensor final_state, Tensor chunk_states)",
    _forward_fake,
)
_backward = define(
    "gated_scan",
    "backward",
    "(Tensor grad_h, Tensor grad_final_state, Tensor x, Tensor? initial_state, Tensor? h, Tensor chunk_states,"
    " Tensor? cu_seqlens, str cell, float lo, float hi, bool reverse, str backend)"
    " -> (Tensor grad_x, Tensor grad_initial_state)",
    _backward_fake,
)


class _GatedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        cell: str,
        lo: float,
        hi: float,
        reverse: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        h, final_state, chunk_states = _forward(x, initial_state, cu_seqlens, cell, lo, hi, reverse, backend)
        kept = h if keeps_output(x, chunk_states.shape[0]) else None
        ctx.save_for_backward(x, initial_state, kept, chunk_states, cu_seqlens)
        ctx.options = cell, lo, hi, reverse, backend
        return h, final_state

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        grad_h, grad_final_state = gradients
        x, initial_state, h, chunk_states, cu_seqlens = ctx.saved_tensors
        grad_x, grad_state = _backward(
            grad_h, grad_final_state, x, initial_state, h, chunk_states, cu_seqlens, *ctx.options
        )
        return grad_x, None if initial_state is None else grad_state, None, None, None, None, None, None
