"""``gated_scan`` in Numba: the loops of ``linear_scan`` around tokens whose gates are computed where they are used."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.dispatch import check_boundaries
from seqzoo.kernels.gated_scan.op import CELLS
from seqzoo.kernels.linear_scan.cpu import columns, entering, grading, outputs, regrading, scanning
from seqzoo.kernels.numba_math import cast, choose, exp, narrow, widen
from seqzoo.kernels.numba_runtime import array, function, kernel, plan, threads_for


@function
def _min_gru(gate):
    """Returns the weights of the new value and of the previous one, ``sigmoid(gate)`` and ``sigmoid(-gate)``."""
    one = cast(1, gate)
    small = exp(-abs(gate))
    larger = one / (one + small)
    smaller = small * larger
    return choose(gate >= 0, larger, smaller), choose(gate >= 0, smaller, larger)


@function
def _min_lstm(forget, enter):
    """Returns the weights of the new value and of the previous one, and the derivatives of the logit between them.

    With p = 1 + exp(-forget) and q = 1 + exp(-enter) the weights are p / (p + q) and q / (p + q), and the derivatives
    -exp(-forget) / p and exp(-enter) / q. All exponentials are scaled by exp(min(0, forget, enter)), so that none
    overflows and one of the three is 1.
    """
    zero, one = cast(0, forget), cast(1, forget)
    ordered = forget <= enter
    low, high = choose(ordered, forget, enter), choose(ordered, enter, forget)
    negative = low < 0
    small = exp(-abs(low))
    scale, of_low = choose(negative, small, one), choose(negative, one, small)
    of_high = exp(choose(negative, low, zero) - high)
    total_low, total_high = one + small, scale + of_high
    inverse = one / (total_low + total_high)
    new = choose(ordered, total_low, total_high) * inverse
    old = choose(ordered, total_high, total_low) * inverse
    return new, old, -choose(ordered, of_low, of_high) * inverse * old, choose(ordered, of_high, of_low) * inverse * new


@function
def _advance(operands, row, task, state, h):
    x, lstm, lo, span, width = operands
    if lstm:
        forgets, enters = columns(x, width, 3 * row, task), columns(x, width, 3 * row + 1, task)
        values = columns(x, width, 3 * row + 2, task)
        for j in range(h.size):
            new, old, _, _ = _min_lstm(widen(forgets[j]), widen(enters[j]))
            state[j] = (lo + span * old) * state[j] + new * widen(values[j])
            h[j] = narrow(state[j], h)
    else:
        gates, values = columns(x, width, 2 * row, task), columns(x, width, 2 * row + 1, task)
        for j in range(h.size):
            new, old = _min_gru(widen(gates[j]))
            state[j] = (lo + span * old) * state[j] + new * widen(values[j])
            h[j] = narrow(state[j], h)


@function
def _retreat(operands, row, sequence, task, previous, carry, grad_x):
    grad_h, x, lstm, lo, span, width = operands
    arriving = columns(grad_h, width, row, task)
    if lstm:
        forgets, enters = columns(x, width, 3 * row, task), columns(x, width, 3 * row + 1, task)
        values, to_values = columns(x, width, 3 * row + 2, task), columns(grad_x, width, 3 * row + 2, task)
        to_forgets, to_enters = columns(grad_x, width, 3 * row, task), columns(grad_x, width, 3 * row + 1, task)
        for j in range(arriving.size):
            new, old, by_forget, by_enter = _min_lstm(widen(forgets[j]), widen(enters[j]))
            gamma = widen(arriving[j]) + carry[j]
            to_new = gamma * (widen(values[j]) - span * previous[j])
            to_forgets[j] = narrow(to_new * by_forget, to_forgets)
            to_enters[j] = narrow(to_new * by_enter, to_enters)
            to_values[j] = narrow(gamma * new, to_values)
            carry[j] = (lo + span * old) * gamma
    else:
        gates, to_gates = columns(x, width, 2 * row, task), columns(grad_x, width, 2 * row, task)
        values, to_values = columns(x, width, 2 * row + 1, task), columns(grad_x, width, 2 * row + 1, task)
        for j in range(arriving.size):
            new, old = _min_gru(widen(gates[j]))
            gamma = widen(arriving[j]) + carry[j]
            to_gates[j] = narrow(gamma * (widen(values[j]) - span * previous[j]) * (new * old), to_gates)
            to_values[j] = narrow(gamma * new, to_values)
            carry[j] = (lo + span * old) * gamma


_scan, _grade, _regrade = scanning(_advance), grading(_retreat), regrading(_advance, _retreat)


@kernel
def _forward(x, lstm, lo, span, bounds, tasks, width, reverse, total, state, chunk_states, h):
    for index in prange(tasks.shape[0]):
        operands = (x, lstm, lo, span, width)
        _scan(operands, bounds, tasks[index], width, reverse, total, state, chunk_states, h)


@kernel
def _backward(x, lstm, lo, span, bounds, tasks, width, reverse, grad_h, initial, initial_width, h, carry, grad_x):
    for index in prange(tasks.shape[0]):
        operands = (grad_h, x, lstm, lo, span, width)
        _grade(operands, bounds, tasks[index], width, reverse, initial, initial_width, h, carry, grad_x)


@kernel
def _backward_chunks(x, lstm, lo, span, bounds, tasks, width, reverse, grad_h, total, chunk_states, carry, grad_x):
    for index in prange(tasks.shape[0]):
        forward, operands = (x, lstm, lo, span, width), (grad_h, x, lstm, lo, span, width)
        _regrade(forward, operands, bounds, tasks[index], width, reverse, total, chunk_states, carry, grad_x)


def forward(
    x: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    lo: float,
    hi: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``gated_scan_forward``."""
    check_boundaries(cu_seqlens, x.shape[1])
    width = x.shape[2] // CELLS[cell]
    h, state, chunk_states = outputs(x, width, initial_state, cu_seqlens)
    threads, shared = _prepare(x, cu_seqlens, cell, lo, hi, reverse)
    total = x.shape[1] if cu_seqlens is None else -1
    _forward(threads, *shared, total, array(state), array(chunk_states), array(h))
    return h, state, chunk_states


def backward(
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
) -> tuple[Tensor, Tensor]:
    """As the op ``gated_scan_backward``."""
    check_boundaries(cu_seqlens, x.shape[1])
    grad_x, grad_state = torch.empty_like(x), grad_final_state.clone()
    threads, shared = _prepare(x, cu_seqlens, cell, lo, hi, reverse)
    targets = array(grad_state), array(grad_x)
    if h is None:
        total = x.shape[1] if cu_seqlens is None else -1
        _backward_chunks(threads, *shared, array(grad_h), total, array(chunk_states), *targets)
    else:
        _backward(threads, *shared, array(grad_h), *entering(initial_state, grad_state), array(h), *targets)
    return grad_x, grad_state


def _prepare(x: Tensor, cu_seqlens: Tensor | None, cell: str, lo: float, hi: float, reverse: bool) -> tuple[int, tuple]:
    """The number of threads, and the kernels' leading arguments."""
    batch, total, channels = x.shape
    width = channels // CELLS[cell]
    threads = threads_for(x.numel())
    number = np.float64 if accumulator(x.dtype) == torch.float64 else np.float32
    bounds, tasks = plan(cu_seqlens, batch, total, width, threads)
    return threads, (array(x), cell == "min_lstm", number(lo), number(hi - lo), bounds, tasks, width, reverse)
