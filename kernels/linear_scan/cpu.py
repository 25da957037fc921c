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

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.dispatch import check_boundaries
from seqzoo.kernels.linear_scan.op import CHUNK, n_chunk_states
from seqzoo.kernels.numba_math import conjugate, narrow, widen
from seqzoo.kernels.numba_runtime import array, function, kernel, plan, threads_for


@function
def columns(flat, width, row, task):
    """The columns of a task in one row of so many columns."""
    first = row * width + task[0]
    return flat[first : first + task[1]]


@function
def _copy(source, target):
    for j in range(target.size):
        target[j] = source[j]


@function
def _first_chunk(bounds, sequence, total):
    """The row of ``chunk_states`` for a sequence's start; ``total`` is its length in a dense batch, -1 when packed."""
    return sequence * ((total + CHUNK - 1) // CHUNK) if total >= 0 else bounds[sequence] // CHUNK + sequence


def scanning(advance: Callable[..., Any]) -> Any:
    """Makes the loop that runs one task's sequences.

    Args:
        advance: Compiled ``(operands, row, task, state, h)``, one token: updates ``state``, and writes it to ``h``.
    """

    @function
    def scan(operands, bounds, task, width, reverse, total, state, chunk_states, h):
        for sequence in range(task[2], task[3]):
            length = bounds[sequence + 1] - bounds[sequence]
            row, step = (bounds[sequence + 1] - 1, -1) if reverse else (bounds[sequence], 1)
            chunk = _first_chunk(bounds, sequence, total)
            running = columns(state, width, sequence, task)
            for index in range(length):
                if chunk_states.size > 0 and index % CHUNK == 0:
                    _copy(running, columns(chunk_states, width, chunk + index // CHUNK, task))
                advance(operands, row, task, running, columns(h, width, row, task))
                row += step

    return scan


def grading(retreat: Callable[..., Any]) -> Any:
    """Makes the loop that runs one task's sequences back and reads h.

    Args:
        retreat: Compiled ``(operands, row, sequence, task, previous, carry, gradients)``, one token: from the value
            before it and the gradient that arrives from later tokens, writes its gradients and updates ``carry``.
    """

    @function
    def grade(operands, bounds, task, width, reverse, initial, initial_width, h, carry, gradients):
        for sequence in range(task[2], task[3]):
            length = bounds[sequence + 1] - bounds[sequence]
            row, step = (bounds[sequence], 1) if reverse else (bounds[sequence + 1] - 1, -1)
            running = columns(carry, width, sequence, task)
            for index in range(length):
                if index < length - 1:
                    previous = columns(h, width, row + step, task)
                else:
                    previous = columns(initial, initial_width, sequence, task)
                retreat(operands, row, sequence, task, previous, running, gradients)
                row += step

    return grade


def regrading(advance: Callable[..., Any], retreat: Callable[..., Any]) -> Any:
    """Makes the loop of :func:`grading` for an h that was rounded to 16 bits: each chunk computes it again."""

    @function
    def regrade(forward, operands, bounds, task, width, reverse, total, chunk_states, carry, gradients):
        rows = np.empty((CHUNK, task[1]), carry.dtype)
        state = np.empty(task[1], carry.dtype)
        for sequence in range(task[2], task[3]):
            length = bounds[sequence + 1] - bounds[sequence]
            start, step = (bounds[sequence + 1] - 1, -1) if reverse else (bounds[sequence], 1)
            kept = _first_chunk(bounds, sequence, total)
            running = columns(carry, width, sequence, task)
            for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
                first = start + step * chunk * CHUNK
                count = min(CHUNK, length - chunk * CHUNK)
                entering = columns(chunk_states, width, kept + chunk, task)
                _copy(entering, state)
                _copy(entering, rows[0])
                for index in range(count - 1):
                    advance(forward, first + step * index, task, state, rows[index + 1])
                for index in range(count - 1, -1, -1):
                    retreat(operands, first + step * index, sequence, task, rows[index], running, gradients)

    return regrade


@function
def _advance(operands, row, task, state, h):
    a, a_width, b, width = operands
    factors, addends = columns(a, a_width, row, task), columns(b, width, row, task)
    for j in range(h.size):
        value = widen(factors[j]) * state[j] + widen(addends[j])
        state[j] = value
        h[j] = narrow(value, h)


@function
def _retreat_varying(operands, row, sequence, task, previous, carry, gradients):
    grad_h, a, width = operands
    grad_a, grad_b = gradients
    arriving, factors = columns(grad_h, width, row, task), columns(a, width, row, task)
    to_a, to_b = columns(grad_a, width, row, task), columns(grad_b, width, row, task)
    for j in range(arriving.size):
        gamma = widen(arriving[j]) + carry[j]
        to_b[j] = narrow(gamma, to_b)
        to_a[j] = narrow(gamma * conjugate(previous[j]), to_a)
        carry[j] = conjugate(widen(factors[j])) * gamma


@function
def _retreat_constant(operands, row, sequence, task, previous, carry, gradients):
    """With the same a for all tokens, whose gradient each sequence sums in double precision."""
    grad_h, a, width = operands
    sums, grad_b = gradients
    arriving, factors = columns(grad_h, width, row, task), columns(a, 0, 0, task)
    to_a, to_b = columns(sums, width, sequence, task), columns(grad_b, width, row, task)
    for j in range(arriving.size):
        gamma = widen(arriving[j]) + carry[j]
        to_b[j] = narrow(gamma, to_b)
        to_a[j] += gamma * conjugate(previous[j])
        carry[j] = conjugate(widen(factors[j])) * gamma


_scan = scanning(_advance)
_grade_varying, _grade_constant = grading(_retreat_varying), grading(_retreat_constant)
_regrade_varying, _regrade_constant = regrading(_advance, _retreat_varying), regrading(_advance, _retreat_constant)


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
    threads = threads_for(b.numel())
    bounds, tasks = plan(cu_seqlens, batch, total, width, threads)
    _forward(
        threads,
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
    return h, state, state.new_empty((n_chunk_states(h, cu_seqlens, "cpu"), width))


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
    threads = threads_for(b.numel())
    bounds, tasks = plan(cu_seqlens, batch, total, width, threads)
    shared = (bounds, tasks, width, reverse, array(grad_state), array(grad_a), array(grad_b))
    if h is None:
        run = _regrade_sum if constant else _regrade_a
        length = total if cu_seqlens is None else -1
        run(threads, array(grad_h), array(a), array(b), array(chunk_states), length, *shared)
    else:
        run = _grade_sum if constant else _grade_a
        initial, initial_width = entering(initial_state, grad_state)
        run(threads, array(grad_h), array(a), initial, initial_width, array(h), *shared)
    if constant:
        # NumPy adds the sequences one after another: the same bits on any number of threads
        grad_a = torch.from_numpy(grad_a.numpy().sum(axis=0)).to(a.dtype)
    return grad_a, grad_b, grad_state


def entering(initial_state: Tensor | None, like: Tensor) -> tuple[np.ndarray, int]:
    """The initial states, and how far apart their rows lie: one row of zeros stands for all where none were given."""
    if initial_state is None:
        return array(like.new_zeros(like.shape[1])), 0
    return array(initial_state), like.shape[1]
