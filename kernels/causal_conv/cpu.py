"""``causal_conv`` in Numba: one pass over memory forward, one backward, rows vectorised over channels.

No value is carried from token to token, so the work is cut anywhere: into segments of ``SEGMENT`` rows of the flattened
batch, whatever sequences lie in them. A task takes some neighbouring segments, and the backward pass computes again the
W - 1 gradients behind its last one.

Taps are counted back from the present token, and taken ``GROUP`` at a time; those beyond W have weights and inputs of
zero, in a row of zeros, because what other rows hold may be NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seqzoo.kernels.causal_conv.op import n_sequences
from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.dispatch import check_boundaries
from seqzoo.kernels.linear_scan.cpu import columns
from seqzoo.kernels.numba_math import cast, sigmoid
from seqzoo.kernels.numba_memory import part, read, write
from seqzoo.kernels.numba_runtime import array, function, kernel, plan, threads_for

# sums over a segment are kept in float64 and added up in order: the same bits on any number of threads
SEGMENT = 256
# rows whose sum is taken in the accumulator's dtype before it is added to that of the segment
CHUNK = 64
GROUP = 4
# the gradients that the backward pass holds: a power of two, at least W
RING = 2 * GROUP
# rows of weights, the present token's first, then the bias
TABLE = 2 * GROUP + 1


@function
def _sum_taps(base, x, weights, silu, y):
    """``act(base + sum of GROUP products)``, of rows."""
    x0, x1, x2, x3 = x
    w0, w1, w2, w3 = weights
    if silu:
        for j in range(y.size):
            value = read(base, j, 0) + read(w0, j, 1) * read(x0, j, 2) + read(w1, j, 1) * read(x1, j, 2)
            value = value + read(w2, j, 1) * read(x2, j, 2) + read(w3, j, 1) * read(x3, j, 2)
            write(y, j, value * sigmoid(value), 3)
    else:
        for j in range(y.size):
            value = read(base, j, 0) + read(w0, j, 1) * read(x0, j, 2) + read(w1, j, 1) * read(x1, j, 2)
            value = value + read(w2, j, 1) * read(x2, j, 2) + read(w3, j, 1) * read(x3, j, 2)
            write(y, j, value, 3)


@function
def _grade_taps(base, x, weights, silu, grad_y, inner, total, sums):
    """The gradient under the activation of ``base + sum of GROUP products``, and what it adds to the weights' sums."""
    x0, x1, x2, x3 = x
    w0, w1, w2, w3 = weights
    s0, s1, s2, s3 = sums
    for j in range(inner.size):
        a0, a1, a2, a3 = read(x0, j, 2), read(x1, j, 2), read(x2, j, 2), read(x3, j, 2)
        grad = read(grad_y, j, 3)
        if silu:
            value = read(base, j, 0) + read(w0, j, 1) * a0 + read(w1, j, 1) * a1
            value = value + read(w2, j, 1) * a2 + read(w3, j, 1) * a3
            gate, one = sigmoid(value), cast(1, value)
            grad = grad * gate * (one + value * (one - gate))
        write(inner, j, grad, 4)
        write(total, j, read(total, j, 5) + grad, 5)
        write(s0, j, read(s0, j, 6) + grad * a0, 6)
        write(s1, j, read(s1, j, 7) + grad * a1, 7)
        write(s2, j, read(s2, j, 8) + grad * a2, 8)
        write(s3, j, read(s3, j, 9) + grad * a3, 9)


@function
def _add_taps(x, inner, sums):
    """What a gradient under the activation adds to the sums of GROUP more weights."""
    x0, x1, x2, x3 = x
    s0, s1, s2, s3 = sums
    for j in range(inner.size):
        grad = read(inner, j, 4)
        write(s0, j, read(s0, j, 6) + grad * read(x0, j, 2), 6)
        write(s1, j, read(s1, j, 7) + grad * read(x1, j, 2), 7)
        write(s2, j, read(s2, j, 8) + grad * read(x2, j, 2), 8)
        write(s3, j, read(s3, j, 9) + grad * read(x3, j, 2), 9)


@function
def _copy(source, target):
    for j in range(target.size):
        target[j] = source[j]


@function
def _clear(target):
    for j in range(target.size):
        target[j] = 0


@function
def _flush(source, target):
    for j in range(source.size):
        write(target, j, read(target, j, 1) + read(source, j, 0), 1)
        write(source, j, cast(0, read(source, j, 0)), 0)


@function
def _inputs(x, given, no_input, taps, width, sequence, row, position, back, first, count):
    """Some columns of the input so many tokens before one of a sequence: of the state, before the first token."""
    if back >= taps:
        return part(no_input, 0, count)
    if back <= position:
        return columns(x, width, row - back, first, count)
    states, state_width = given
    return columns(states, state_width, sequence * (taps - 1) + taps - 1 + position - back, first, count)


@function
def _group(x, given, no_input, taps, width, sequence, row, position, back, first, count):
    """GROUP rows of inputs, from so many tokens back."""
    return (
        _inputs(x, given, no_input, taps, width, sequence, row, position, back, first, count),
        _inputs(x, given, no_input, taps, width, sequence, row, position, back + 1, first, count),
        _inputs(x, given, no_input, taps, width, sequence, row, position, back + 2, first, count),
        _inputs(x, given, no_input, taps, width, sequence, row, position, back + 3, first, count),
    )


@function
def _rows_of(table, width, row, first, count):
    """GROUP neighbouring rows of a table."""
    return (
        columns(table, width, row, first, count),
        columns(table, width, row + 1, first, count),
        columns(table, width, row + 2, first, count),
        columns(table, width, row + 3, first, count),
    )


@function
def _sequence_of(bounds, row):
    """The last sequence that begins at or before a row."""
    low, high = 0, bounds.size - 1
    while low + 1 < high:
        middle = (low + high) // 2
        if bounds[middle] <= row:
            low = middle
        else:
            high = middle
    return low


@function
def _convolve(x, given, table, taps, width, bounds, silu, task, y):
    first, count, start, stop = task[0], task[1], task[2] * SEGMENT, min(task[3] * SEGMENT, bounds[-1])
    no_input, scratch = np.zeros(count, x.dtype), np.empty(count, table.dtype)
    bias = columns(table, width, TABLE - 1, first, count)
    near, far = _rows_of(table, width, 0, first, count), _rows_of(table, width, GROUP, first, count)
    sequence = _sequence_of(bounds, start)
    for row in range(start, stop):
        while row >= bounds[sequence + 1]:
            sequence += 1
        position, to_y = row - bounds[sequence], columns(y, width, row, first, count)
        inputs = _group(x, given, no_input, taps, width, sequence, row, position, 0, first, count)
        if taps > GROUP:
            older = _group(x, given, no_input, taps, width, sequence, row, position, GROUP, first, count)
            _sum_taps(bias, older, far, False, scratch)
            _sum_taps(scratch, inputs, near, silu, to_y)
        else:
            _sum_taps(bias, inputs, near, silu, to_y)


@function
def _keep(x, given, taps, width, bounds, start, stop, final):
    """The states after some sequences."""
    for sequence in range(start, stop):
        last = bounds[sequence + 1] - 1
        position = last - bounds[sequence]
        for index in range(taps - 1):
            source = _inputs(x, given, x, taps, width, sequence, last, position, taps - 2 - index, 0, width)
            _copy(source, columns(final, width, sequence * (taps - 1) + index, 0, width))


@function
def _later(ring, zeros, taps, count, row, ahead):
    """GROUP rows of gradients under the activation, from so many tokens ahead of an input."""
    return (
        columns(ring, count, (row + ahead) % RING, 0, count) if ahead < taps else zeros,
        columns(ring, count, (row + ahead + 1) % RING, 0, count) if ahead + 1 < taps else zeros,
        columns(ring, count, (row + ahead + 2) % RING, 0, count) if ahead + 2 < taps else zeros,
        columns(ring, count, (row + ahead + 3) % RING, 0, count) if ahead + 3 < taps else zeros,
    )


@function
def _grade(x, given, table, taps, width, bounds, silu, task, grad_y, grad_final, grad_x, grad_given, sums):
    """The gradients of some rows of inputs, and the sums over their segments for those of the weights and the bias.

    A ring holds the gradients under the activation of the last tokens: that of an input is complete when the one of the
    token W - 1 later is known. An input before the first token belongs to the state.
    """
    first, count, start, stop = task[0], task[1], task[2] * SEGMENT, min(task[3] * SEGMENT, bounds[-1])
    no_input, zeros = np.zeros(count, x.dtype), np.zeros(count, table.dtype)
    scratch, ring = np.empty(count, table.dtype), np.zeros(RING * count, table.dtype)
    # of the rows of the table; what tokens behind the last segment add is not flushed
    partial = np.zeros(TABLE * count, table.dtype)
    bias = columns(table, width, TABLE - 1, first, count)
    near, far = _rows_of(table, width, 0, first, count), _rows_of(table, width, GROUP, first, count)
    row, sequence = start, _sequence_of(bounds, start)
    while row < stop:
        while row >= bounds[sequence + 1]:
            sequence += 1
        opening, closing = bounds[sequence], bounds[sequence + 1]
        earliest, last = row, min(stop, closing)
        if row == opening:
            _clear(ring)
            if grad_given.size > 0:
                earliest = row - taps + 1
        for token in range(row, last + taps - 1):
            inner = columns(ring, count, token % RING, 0, count)
            if token < closing:
                inputs = _group(x, given, no_input, taps, width, sequence, token, token - opening, 0, first, count)
                arriving = columns(grad_y, width, token, first, count)
                to_near, to_bias = _rows_of(partial, count, 0, 0, count), columns(partial, count, TABLE - 1, 0, count)
                if taps > GROUP:
                    older = _group(
                        x, given, no_input, taps, width, sequence, token, token - opening, GROUP, first, count
                    )
                    _sum_taps(bias, older, far, False, scratch)
                    _grade_taps(scratch, inputs, near, silu, arriving, inner, to_bias, to_near)
                    _add_taps(older, inner, _rows_of(partial, count, GROUP, 0, count))
                else:
                    _grade_taps(bias, inputs, near, silu, arriving, inner, to_bias, to_near)
                if token < last and ((token + 1) % CHUNK == 0 or token + 1 == stop):
                    at = token // SEGMENT * (taps + 1)
                    for tap in range(taps + 1):
                        source = columns(partial, count, tap if tap < taps else TABLE - 1, 0, count)
                        _flush(source, columns(sums, width, at + tap, first, count))
                base = zeros
            else:
                _clear(inner)
                base = columns(grad_final, width, sequence * (taps - 1) + token - closing, first, count)
            source = token - taps + 1
            if source >= earliest:
                if taps > GROUP:
                    _sum_taps(base, _later(ring, zeros, taps, count, source, GROUP), far, False, scratch)
                    base = scratch
                if source >= opening:
                    target = columns(grad_x, width, source, first, count)
                else:
                    target = columns(grad_given, width, (sequence + 1) * (taps - 1) + source - opening, first, count)
                _sum_taps(base, _later(ring, zeros, taps, count, source, 0), near, False, target)
        row = last


@function
def _hand_back(taps, width, bounds, start, stop, grad_final, grad_given):
    """What the states before some sequences receive where these are empty."""
    if grad_given.size > 0:
        for sequence in range(start, stop):
            if bounds[sequence] == bounds[sequence + 1]:
                at, count = sequence * (taps - 1) * width, (taps - 1) * width
                source, target = part(grad_final, at, count), part(grad_given, at, count)
                for j in range(count):
                    write(target, j, read(source, j, 0), 1)


@kernel
def _forward(x, given, table, taps, width, bounds, silu, tasks, y, final):
    number, sequences = tasks.shape[0], bounds.size - 1
    for index in prange(number):
        _convolve(x, given, table, taps, width, bounds, silu, tasks[index], y)
        share = sequences * index // number, sequences * (index + 1) // number
        _keep(x, given, taps, width, bounds, share[0], share[1], final)


@kernel
def _backward(x, given, table, taps, width, bounds, silu, tasks, grad_y, grad_final, grad_x, grad_given, sums):
    number, sequences = tasks.shape[0], bounds.size - 1
    for index in prange(number):
        _grade(x, given, table, taps, width, bounds, silu, tasks[index], grad_y, grad_final, grad_x, grad_given, sums)
        share = sequences * index // number, sequences * (index + 1) // number
        _hand_back(taps, width, bounds, share[0], share[1], grad_final, grad_given)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """As the op ``causal_conv_forward``."""
    y = torch.empty_like(x)
    final_state = x.new_empty((n_sequences(x, cu_seqlens), weight.shape[1] - 1, x.shape[2]))
    threads, *shared = _prepare(x, weight, bias, initial_state, cu_seqlens, activation)
    _forward(threads, *shared, array(y), array(final_state))
    return y, final_state


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the op ``causal_conv_backward``."""
    taps, width = weight.shape[1], x.shape[2]
    grad_x = torch.empty_like(x)
    grad_state = x.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    sums = np.zeros((_segments(x), taps + 1, width))
    threads, *shared = _prepare(x, weight, bias, initial_state, cu_seqlens, activation)
    arriving = array(grad_y), array(grad_final_state.to(accumulator(x.dtype)))
    _backward(threads, *shared, *arriving, array(grad_x), array(grad_state), sums.reshape(-1))
    # NumPy adds the segments one after another
    total = sums.sum(axis=0)
    grad_weight = torch.from_numpy(np.ascontiguousarray(total[taps - 1 :: -1].T)).to(weight.dtype)
    grad_bias = weight.new_empty(0) if bias is None else torch.from_numpy(total[taps]).to(bias.dtype)
    return grad_x, grad_weight, grad_bias, grad_state


def _segments(x: Tensor) -> int:
    return -(-x.shape[0] * x.shape[1] // SEGMENT)


def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Any, ...]:
    """The number of threads, then the arguments with which the kernels begin."""
    check_boundaries(cu_seqlens, x.shape[1])
    batch, total, width = x.shape
    taps = weight.shape[1]
    table = x.new_zeros((TABLE, width), dtype=accumulator(x.dtype))
    table[:taps] = weight.t().flip(0)
    if bias is not None:
        table[TABLE - 1] = bias
    bounds, _ = plan(cu_seqlens, batch, total, width, 1)
    _, tasks = plan(None, _segments(x), SEGMENT, width, threads_for(x.numel()))
    # one row of zeros stands for all states where none were given
    given = (array(x.new_zeros(width)), 0) if initial_state is None else (array(initial_state), width)
    silu = activation == "silu"
    return len(tasks), array(x), given, array(table), taps, width, bounds, silu, tasks
