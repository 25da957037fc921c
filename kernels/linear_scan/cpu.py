"""``linear_scan`` in Numba: one pass over memory forward, one backward, rows vectorised over channels.

:func:`scanning`, :func:`grading` and :func:`regrading` make the loops over sequences, chunks and tokens around the
arithmetic of one token, so that an op which makes a and b on the fly shares them. The state that runs along lies in the
row of the final state, the gradient that runs back in the row of the initial state's gradient, both of the
accumulator's dtype.

A chunk is ``CHUNK`` tokens *in the order of the scan*, and a row of ``chunk_states`` the state that enters one; with
``reverse`` a sequence's first chunk is its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seqzoo.kernels.checks import HALF, accumulator
from seqzoo.kernels.dispatch import check_boundaries
from seqzoo.kernels.linear_scan.op import CHUNK, n_chunk_states
from seqzoo.kernels.numba_math import conjugate
from seqzoo.kernels.numba_memory import part, read, write
from seqzoo.kernels.numba_runtime import array, function, kernel, plan, threads_for

# rows in descending order are fetched ahead only where their parts descend too: with rows of 2 KiB, parts of 64 to 256
# bytes took a third of the time of whole rows, parts of 512 bytes more; where threads share rows it is the reverse
DESCENDING_BYTES = 256
WHOLE = 1 << 40


@function
def columns(flat, width, row, first, count):
    """Some columns of one row of so many columns."""
    return part(flat, row * width + first, count)


@function
def _copy(source, target):
    for j in range(target.size):
        target[j] = source[j]


@function
def _blocks(count, most):
    """The size and number of the parts of a row, of at most so many columns each."""
    size = max(1, min(count, most))
    return size, (count + size - 1) // size


@function
def _order(bounds, sequence, ascending):
    """The row where a sequence is entered, the step from row to row, and the number of rows."""
    first, stop = bounds[sequence], bounds[sequence + 1]
    return (first, 1, stop - first) if ascending else (stop - 1, -1, stop - first)


@function
def _first_chunk(bounds, sequence, total):
    """The row of ``chunk_states`` for a sequence's start; ``total`` is its length in a dense batch, -1 when packed."""
    return sequence * ((total + CHUNK - 1) // CHUNK) if total >= 0 else bounds[sequence] // CHUNK + sequence


def scanning(advance: Callable[..., Any], descending: int) -> Any:
    """Makes the loop that runs one task's sequences.

    Args:
        advance: Compiled ``(operands, row, first, count, state, h)``, some columns of one token: updates ``state``, and
            writes it to ``h``.
        descending: Bytes of the state that are treated at once where rows descend.
    """

    @function
    def scan(operands, bounds, task, width, reverse, total, state, chunk_states, h):
        left, span, start, stop = task[0], task[1], task[2], task[3]
        most, blocks = _blocks(span, (descending if reverse and span == width else WHOLE) // state.itemsize)
        for sequence in range(start, stop):
            row, step, length = _order(bounds, sequence, not reverse)
            chunk = _first_chunk(bounds, sequence, total)
            for index in range(length):
                if chunk_states.size > 0 and index % CHUNK == 0:
                    running = columns(state, width, sequence, left, span)
                    _copy(running, columns(chunk_states, width, chunk + index // CHUNK, left, span))
                for block in range(blocks - 1, -1, -1):
                    first, count = left + block * most, min(most, span - block * most)
                    running = columns(state, width, sequence, first, count)
                    advance(operands, row, first, count, running, columns(h, width, row, first, count))
                row += step

    return scan


def grading(retreat: Callable[..., Any], descending: int) -> Any:
    """Makes the loop that runs one task's sequences back and reads h.

    Args:
        retreat: Compiled ``(operands, row, sequence, first, count, previous, carry, gradients)``, some columns of one
            token: from the value before it and the gradient that arrives from later tokens, writes its gradients and
            updates ``carry``.
        descending: Bytes of the carry that are treated at once where rows descend.
    """

    @function
    def grade(operands, bounds, task, width, reverse, initial, initial_width, h, carry, gradients):
        left, span, start, stop = task[0], task[1], task[2], task[3]
        most, blocks = _blocks(span, (WHOLE if reverse or span < width else descending) // carry.itemsize)
        for sequence in range(start, stop):
            row, step, length = _order(bounds, sequence, reverse)
            for index in range(length):
                for block in range(blocks - 1, -1, -1):
                    first, count = left + block * most, min(most, span - block * most)
                    if index < length - 1:
                        previous = columns(h, width, row + step, first, count)
                    else:
                        previous = columns(initial, initial_width, sequence, first, count)
                    running = columns(carry, width, sequence, first, count)
                    retreat(operands, row, sequence, first, count, previous, running, gradients)
                row += step

    return grade


def regrading(advance: Callable[..., Any], retreat: Callable[..., Any], descending: int) -> Any:
    """Makes the loop of :func:`grading` for an h that was rounded to 16 bits: each chunk computes it again."""

    @function
    def regrade(forward, operands, bounds, task, width, reverse, total, chunk_states, carry, gradients):
        left, span, start, stop = task[0], task[1], task[2], task[3]
        most, blocks = _blocks(span, (WHOLE if reverse or span < width else descending) // carry.itemsize)
        scratch = np.empty((CHUNK + 1) * span, carry.dtype)
        state = columns(scratch, span, CHUNK, 0, span)
        for sequence in range(start, stop):
            entrance, step, length = _order(bounds, sequence, not reverse)
            kept = _first_chunk(bounds, sequence, total)
            for chunk in range((length - 1) // CHUNK, -1, -1):
                row, tokens = entrance + step * chunk * CHUNK, min(CHUNK, length - chunk * CHUNK)
                entering = columns(chunk_states, width, kept + chunk, left, span)
                _copy(entering, state)
                _copy(entering, columns(scratch, span, 0, 0, span))
                for index in range(1, tokens):
                    following = columns(scratch, span, index, 0, span)
                    advance(forward, row, left, span, state, following)
                    row += step
                for index in range(tokens - 1, -1, -1):
                    for block in range(blocks - 1, -1, -1):
                        offset, count = block * most, min(most, span - block * most)
                        previous = columns(scratch, span, index, offset, count)
                        running = columns(carry, width, sequence, left + offset, count)
                        retreat(operands, row, sequence, left + offset, count, previous, running, gradients)
                    row -= step

    return regrade


@function
def _advance(operands, row, first, count, state, h):
    a, a_width, b, width = operands
    factors, addends = columns(a, a_width, row, first, count), columns(b, width, row, first, count)
    for j in range(count):
        value = read(factors, j, 0) * read(state, j, 1) + read(addends, j, 2)
        write(state, j, value, 1)
        write(h, j, value, 3)


@function
def _retreat_varying(operands, row, sequence, first, count, previous, carry, gradients):
    grad_h, a, width = operands
    grad_a, grad_b = gradients
    arriving, factors = columns(grad_h, width, row, first, count), columns(a, width, row, first, count)
    to_a, to_b = columns(grad_a, width, row, first, count), columns(grad_b, width, row, first, count)
    for j in range(count):
        gamma = read(arriving, j, 0) + read(carry, j, 1)
        write(to_b, j, gamma, 2)
        write(to_a, j, gamma * conjugate(read(previous, j, 3)), 4)
        write(carry, j, conjugate(read(factors, j, 5)) * gamma, 1)


@function
def _retreat_constant(operands, row, sequence, first, count, previous, carry, gradients):
    """With the same a for all tokens, whose gradient each sequence sums in double precision."""
    grad_h, a, width = operands
    sums, grad_b = gradients
    arriving, factors = columns(grad_h, width, row, first, count), columns(a, 0, 0, first, count)
    to_a, to_b = columns(sums, width, sequence, first, count), columns(grad_b, width, row, first, count)
    for j in range(count):
        gamma = read(arriving, j, 0) + read(carry, j, 1)
        write(to_b, j, gamma, 2)
        write(to_a, j, read(to_a, j, 4) + gamma * conjugate(read(previous, j, 3)), 4)
        write(carry, j, conjugate(read(factors, j, 5)) * gamma, 1)


_scan = scanning(_advance, DESCENDING_BYTES)
_grade_varying = grading(_retreat_varying, DESCENDING_BYTES)
_grade_constant = grading(_retreat_constant, DESCENDING_BYTES)
_regrade_varying = regrading(_advance, _retreat_varying, DESCENDING_BYTES)
_regrade_constant = regrading(_advance, _retreat_constant, DESCENDING_BYTES)


@kernel
def _forward(a, a_width, b, bounds, tasks, width, reverse, total, state, chunk_states, h):
    for index in prange(tasks.shape[0]):
        _scan((a, a_width, b, width), bounds, tasks[index], width, reverse, total, state, chunk_states, h)


@kernel
def _grade_a(grad_h, a, initial, initial_width, h, bounds, tasks, width, reverse, carry, grad_a, grad_b):
    for index in prange(tasks.shape[0]):
        operands, gradients = (grad_h, a, width), (grad_a, grad_b)
        _grade_varying(operands, bounds, tasks[index], width, reverse, initial, initial_width, h, carry, gradients)


@kernel
def _grade_sum(grad_h, a, initial, initial_width, h, bounds, tasks, width, reverse, carry, sums, grad_b):
    for index in prange(tasks.shape[0]):
        operands, gradients = (grad_h, a, width), (sums, grad_b)
        _grade_constant(operands, bounds, tasks[index], width, reverse, initial, initial_width, h, carry, gradients)


@kernel
def _regrade_a(grad_h, a, b, chunk_states, total, bounds, tasks, width, reverse, carry, grad_a, grad_b):
    for index in prange(tasks.shape[0]):
        forward, operands, gradients = (a, width, b, width), (grad_h, a, width), (grad_a, grad_b)
        _regrade_varying(forward, operands, bounds, tasks[index], width, reverse, total, chunk_states, carry, gradients)


@kernel
def _regrade_sum(grad_h, a, b, chunk_states, total, bounds, tasks, width, reverse, carry, sums, grad_b):
    for index in prange(tasks.shape[0]):
        forward, operands, gradients = (a, 0, b, width), (grad_h, a, width), (sums, grad_b)
        _regrade_constant(
            forward, operands, bounds, tasks[index], width, reverse, total, chunk_states, carry, gradients
        )


def forward(
    a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``linear_scan_forward``."""
    check_boundaries(cu_seqlens, b.shape[1])
    batch, total, width = b.shape
    h, state, chunk_states = outputs(b, width, initial_state, cu_seqlens)
    bounds, tasks = plan(cu_seqlens, batch, total, width, threads_for(b.numel()))
    _forward(
        len(tasks),
        array(a),
        width if a.dim() == 3 else 0,
        array(b),
        bounds,
        tasks,
        width,
        reverse,
        total if cu_seqlens is None else -1,
        array(state),
        array(chunk_states),
        array(h),
    )
    return h, state, chunk_states


def outputs(
    x: Tensor, width: int, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for h, the final state (holding the initial one) and the states between chunks, beside activations x."""
    batch, total, _ = x.shape
    h = x.new_empty((batch, total, width))
    if initial_state is None:
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = x.new_zeros((rows, width), dtype=accumulator(x.dtype))
    else:
        state = initial_state.clone()
    chunks = n_chunk_states(h, cu_seqlens, "cpu") if x.dtype in HALF else 0
    return h, state, state.new_empty((chunks, width))


def backward(
    grad_h: Tensor,
    grad_final_state: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    h: Tensor | None,
    chunk_states: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``linear_scan_backward``."""
    check_boundaries(cu_seqlens, b.shape[1])
    batch, total, width = b.shape
    grad_b, grad_state = torch.empty_like(b), grad_final_state.clone()
    constant = a.dim() == 1
    if constant:
        grad_a = b.new_zeros(grad_state.shape, dtype=torch.complex128 if b.is_complex() else torch.float64)
    else:
        grad_a = torch.empty_like(a)
    bounds, tasks = plan(cu_seqlens, batch, total, width, threads_for(b.numel()))
    shared = (bounds, tasks, width, reverse, array(grad_state), array(grad_a), array(grad_b))
    if h is None:
        run = _regrade_sum if constant else _regrade_a
        length = total if cu_seqlens is None else -1
        run(len(tasks), array(grad_h), array(a), array(b), array(chunk_states), length, *shared)
    else:
        run = _grade_sum if constant else _grade_a
        initial, initial_width = entering(initial_state, grad_state)
        run(len(tasks), array(grad_h), array(a), initial, initial_width, array(h), *shared)
    if constant:
        # NumPy adds the sequences one after another: the same bits on any number of threads
        grad_a = torch.from_numpy(grad_a.numpy().sum(axis=0)).to(a.dtype)
    return grad_a, grad_b, grad_state


def entering(initial_state: Tensor | None, like: Tensor) -> tuple[np.ndarray, int]:
    """The initial states, and how far apart their rows lie: one row of zeros stands for all where none were given."""
    if initial_state is None:
        return array(like.new_zeros(like.shape[1])), 0
    return array(initial_state), like.shape[1]
