"""``gated_scan`` in Numba: the loops of ``linear_scan`` around tokens whose gates are computed where they are used."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seqzoo.kernels.dispatch import check_boundaries
from seqzoo.kernels.gated_scan.op import CELLS
from seqzoo.kernels.linear_scan.cpu import WHOLE, columns, entering, grading, outputs, regrading, scanning
from seqzoo.kernels.numba_math import cast, choose, exp
from seqzoo.kernels.numba_memory import read, write
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
def _advance(operands, row, first, count, state, h):
    x, lstm, lo, span, width = operands
    if lstm:
        forgets, enters = columns(x, width, 3 * row, first, count), columns(x, width, 3 * row + 1, first, count)
        values = columns(x, width, 3 * row + 2, first, count)
        for j in range(count):
            new, old, _, _ = _min_lstm(read(forgets, j, 0), read(enters, j, 1))
            value = (lo + span * old) * read(state, j, 2) + new * read(values, j, 3)
            write(state, j, value, 2)
            write(h, j, value, 4)
    else:
        gates, values = columns(x, width, 2 * row, first, count), columns(x, width, 2 * row + 1, first, count)
        for j in range(count):
            new, old = _min_gru(read(gates, j, 0))
            value = (lo + span * old) * read(state, j, 2) + new * read(values, j, 3)
            write(state, j, value, 2)
            write(h, j, value, 4)


@function
def _retreat(operands, row, sequence, first, count, previous, carry, grad_x):
    grad_h, x, lstm, lo, span, width = operands
    arriving = columns(grad_h, width, row, first, count)
    if lstm:
        forgets, enters = columns(x, width, 3 * row, first, count), columns(x, width, 3 * row + 1, first, count)
        values, to_values = (
            columns(x, width, 3 * row + 2, first, count),
            columns(grad_x, width, 3 * row + 2, first, count),
        )
        to_forgets, to_enters = (
            columns(grad_x, width, 3 * row, first, count),
            columns(grad_x, width, 3 * row + 1, first, count),
        )
        for j in range(count):
            new, old, by_forget, by_enter = _min_lstm(read(forgets, j, 0), read(enters, j, 1))
            gamma = read(arriving, j, 2) + read(carry, j, 3)
            to_new = gamma * (read(values, j, 4) - span * read(previous, j, 5))
            write(to_forgets, j, to_new * by_forget, 6)
            write(to_enters, j, to_new * by_enter, 7)
            write(to_values, j, gamma * new, 8)
            write(carry, j, (lo + span * old) * gamma, 3)
    else:
        gates, to_gates = columns(x, width, 2 * row, first, count), columns(grad_x, width, 2 * row, first, count)
        values, to_values = (
            columns(x, width, 2 * row + 1, first, count),
            columns(grad_x, width, 2 * row + 1, first, count),
        )
        for j in range(count):
            new, old = _min_gru(read(gates, j, 0))
            gamma = read(arriving, j, 2) + read(carry, j, 3)
            to_new = gamma * (read(values, j, 4) - span * read(previous, j, 5))
            write(to_gates, j, to_new * (new * old), 6)
            write(to_values, j, gamma * new, 8)
            write(carry, j, (lo + span * old) * gamma, 3)


# the projections of a token alternate, so their parts would not descend steadily: whole rows are quicker
_scan, _grade, _regrade = scanning(_advance, WHOLE), grading(_retreat, WHOLE), regrading(_advance, _retreat, WHOLE)


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
    shared = _prepare(x, cu_seqlens, cell, lo, hi, reverse)
    total = x.shape[1] if cu_seqlens is None else -1
    _forward(*shared, total, array(state), array(chunk_states), array(h))
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
    shared = _prepare(x, cu_seqlens, cell, lo, hi, reverse)
    targets = array(grad_state), array(grad_x)
    if h is None:
        total = x.shape[1] if cu_seqlens is None else -1
        _backward_chunks(*shared, array(grad_h), total, array(chunk_states), *targets)
    else:
        _backward(*shared, array(grad_h), *entering(initial_state, grad_state), array(h), *targets)
    return grad_x, grad_state


def _prepare(x: Tensor, cu_seqlens: Tensor | None, cell: str, lo: float, hi: float, reverse: bool) -> tuple[Any, ...]:
    """The number of threads, then the arguments with which the kernels begin."""
    batch, total, channels = x.shape
    width = channels // CELLS[cell]
    number = np.float64 if x.dtype == torch.float64 else np.float32
    bounds, tasks = plan(cu_seqlens, batch, total, width, threads_for(x.numel()))
    return len(tasks), array(x), cell == "min_lstm", number(lo), number(hi - lo), bounds, tasks, width, reverse
