"""``delta_rule`` in Numba: a token after the other, on a state that stays in the cache.

In vector instructions chunks save no arithmetic: a token costs four multiply-adds an element of the state, half of what
the matrix products of chunks of 64 do, and needs no exponentials of sums, no triangular systems and no other form for a
decay of every key. What counts is how often the state is touched. One pass over it updates it, reads it with the query
of this token and with the key of the next; going back, one pass takes all that a token's gradients need.

A wide state is cut into slabs of columns, which do not depend on each other. It is not kept for every token: the
backward pass runs forward first, keeps the states between chunks of ``CHUNK`` tokens, and computes the others again a
chunk at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.dispatch import check_boundaries
from seqzoo.kernels.linear_scan.cpu import columns
from seqzoo.kernels.numba_math import cast, exp, reassociable_add
from seqzoo.kernels.numba_memory import part, read, write
from seqzoo.kernels.numba_runtime import array, function, kernel, plan, threads_for

CHUNK = 32
# bytes of a slab of the state: where a row is too short, summing up its products takes longer than making them
SLAB = 65536
# a slab has a multiple of so many columns, what a vector holds, and of so many rows, what one loop takes
LANES, ROWS = 16, 4
# a product with the state is summed up in so many parts: in one, 256 keys would round twice as much as a matrix product
PARTS = 8
# how the state decays: not, by one factor a token, by one a row
NO_DECAY, TOKEN_DECAY, KEY_DECAY = 0, 1, 2


@function
def _clear(target):
    for j in range(target.size):
        write(target, j, cast(0, target[j]), 0)


@function
def _copy(source, target):
    for j in range(target.size):
        write(target, j, read(source, j, 0), 1)


@function
def _multiply(a, b, target):
    for j in range(target.size):
        write(target, j, read(a, j, 0) * read(b, j, 1), 2)


@function
def _add_multiple(factor, source, target):
    for j in range(target.size):
        write(target, j, read(target, j, 1) + factor * read(source, j, 0), 1)


@function
def _dot(a, b):
    total = cast(0, a[0])
    for j in range(a.size):
        total = reassociable_add(total, read(a, j, 0) * read(b, j, 1))
    return total


@function
def _load(source, width, row, first, factor, target):
    """A multiple of some columns of a row; what the target has beyond them keeps its zeros."""
    values = columns(source, width, row, first, min(target.size, width - first))
    for j in range(values.size):
        write(target, j, read(values, j, 0) * factor, 1)


@function
def _load_state(states, key, width, row, first, size, slab):
    """A slab of a state, with zeros around it."""
    _clear(slab)
    count = min(size, width - first)
    for k in range(key):
        _copy(columns(states, width, row * key + k, first, count), columns(slab, size, k, 0, count))


@function
def _store_state(slab, key, width, row, first, size, states):
    count = min(size, width - first)
    for k in range(key):
        _copy(columns(slab, size, k, 0, count), columns(states, width, row * key + k, first, count))


@function
def _load_decay(decay, form, key, row, factors):
    if form == KEY_DECAY:
        values = columns(decay, key, row, 0, key)
        for j in range(key):
            write(factors, j, exp(read(values, j, 0)), 1)
    else:
        factor = exp(decay[row]) if form == TOKEN_DECAY else cast(1, factors[0])
        for j in range(key):
            write(factors, j, factor, 1)


@function
def _four(flat, width, row):
    """Four neighbouring rows."""
    return (
        columns(flat, width, row, 0, width),
        columns(flat, width, row + 1, 0, width),
        columns(flat, width, row + 2, 0, width),
        columns(flat, width, row + 3, 0, width),
    )


@function
def _four_of(values, first):
    return values[first], values[first + 1], values[first + 2], values[first + 3]


@function
def _total(parts, size):
    """Adds up the parts of a sum, and clears them."""
    total = columns(parts, size, PARTS, 0, size)
    for j in range(size):
        a = read(parts, j, 0) + read(parts, j + size, 0)
        b = read(parts, j + 2 * size, 0) + read(parts, j + 3 * size, 0)
        c = read(parts, j + 4 * size, 0) + read(parts, j + 5 * size, 0)
        d = read(parts, j + 6 * size, 0) + read(parts, j + 7 * size, 0)
        write(total, j, (a + b) + (c + d), 1)
    _clear(part(parts, 0, PARTS * size))
    return total


@function
def _advance(slab, size, factors, keys, written, queries, out, following, recalled):
    """``S = diag(factors) S + keys^T written``; adds ``queries S`` and ``following S`` to the parts of two rows."""
    for k in range(0, factors.size, ROWS):
        o, r = columns(out, size, k // ROWS % PARTS, 0, size), columns(recalled, size, k // ROWS % PARTS, 0, size)
        s0, s1, s2, s3 = _four(slab, size, k)
        a0, a1, a2, a3 = _four_of(factors, k)
        k0, k1, k2, k3 = _four_of(keys, k)
        q0, q1, q2, q3 = _four_of(queries, k)
        f0, f1, f2, f3 = _four_of(following, k)
        for j in range(size):
            value = read(written, j, 0)
            v0, v1 = a0 * read(s0, j, 1) + k0 * value, a1 * read(s1, j, 2) + k1 * value
            v2, v3 = a2 * read(s2, j, 3) + k2 * value, a3 * read(s3, j, 4) + k3 * value
            write(s0, j, v0, 1)
            write(s1, j, v1, 2)
            write(s2, j, v2, 3)
            write(s3, j, v3, 4)
            write(o, j, read(o, j, 5) + ((q0 * v0 + q1 * v1) + (q2 * v2 + q3 * v3)), 5)
            write(r, j, read(r, j, 6) + ((f0 * v0 + f1 * v1) + (f2 * v2 + f3 * v3)), 6)


@function
def _repeat(before, size, factors, keys, written, after):
    """The state after a token, of the one before it and what the token writes."""
    for k in range(0, factors.size, ROWS):
        s0, s1, s2, s3 = _four(before, size, k)
        t0, t1, t2, t3 = _four(after, size, k)
        a0, a1, a2, a3 = _four_of(factors, k)
        k0, k1, k2, k3 = _four_of(keys, k)
        for j in range(size):
            value = read(written, j, 0)
            write(t0, j, a0 * read(s0, j, 1) + k0 * value, 2)
            write(t1, j, a1 * read(s1, j, 1) + k1 * value, 3)
            write(t2, j, a2 * read(s2, j, 1) + k2 * value, 4)
            write(t3, j, a3 * read(s3, j, 1) + k3 * value, 5)


@function
def _retreat(carry, before, size, token, earlier, sums):
    """The gradient in the state before a token from the one in the state after it, and sums of rows on the way.

    Args:
        carry: The gradient in S, which becomes the one in the state before, with all that reads that state.
        before: The state before.
        size: Columns.
        token: Of this token the factors, the key, the gradients in its output and in what it writes, and what it wrote.
        earlier: Of the token before the key, the query, the gradient in its output, and a row that receives the key's
            product with ``carry`` in parts.
        sums: What becomes of the products by rows, of S with the gradients in the output and in what is written, of
            ``carry`` with what was written, and of S with the gradient in ``S'``.
    """
    factors, keys, arriving, error, written = token
    earlier_keys, queries, earlier_arriving, passed = earlier
    to_output, to_error, to_written, to_state = sums
    for k in range(factors.size):
        gradients, states = columns(carry, size, k, 0, size), columns(before, size, k, 0, size)
        factor, key, query, earlier_key = factors[k], keys[k], queries[k], earlier_keys[k]
        p = columns(passed, size, k % PARTS, 0, size)
        a = b = c = d = cast(0, factor)
        for j in range(size):
            gradient, state, lost = read(gradients, j, 0), read(states, j, 1), read(error, j, 2)
            inner = gradient - key * lost
            a = reassociable_add(a, state * read(arriving, j, 2))
            b = reassociable_add(b, state * lost)
            c = reassociable_add(c, gradient * read(written, j, 2))
            d = reassociable_add(d, state * inner)
            value = factor * inner + query * read(earlier_arriving, j, 2)
            write(gradients, j, value, 0)
            write(p, j, read(p, j, 3) + earlier_key * value, 3)
        to_output[k], to_error[k], to_written[k], to_state[k] = a, b, c, d


@function
def _rows(key):
    """The rows of a slab: the keys, and zeros up to a multiple."""
    return max(1, (key + ROWS - 1) // ROWS) * ROWS


@function
def _slab_size(rows, width, first, like):
    """The columns of the slab that begins at some column: those left, with zeros up to a vector's end, if they fit."""
    most = max(LANES, SLAB // (rows * like.itemsize) // LANES * LANES)
    return min(most, (width - first + LANES - 1) // LANES * LANES)


@function
def _place(shape, bounds, item):
    """The head, its group, the row of its state, the first token of the sequence and the one behind the last."""
    heads, groups, _, _ = shape
    sequences = bounds.size - 1
    head, sequence = item // sequences, item % sequences
    return head, head // (heads // groups), sequence * heads + head, bounds[sequence], bounds[sequence + 1]


@function
def _look_ahead(inputs, form, shape, head, group, token, factors, keys, recalling):
    """What the next token reads the state with, before it decays."""
    _, k, _, _, decay = inputs
    heads, groups, key, _ = shape
    _load_decay(decay, form, key, token * heads + head, factors)
    _load(k, key, token * groups + group, 0, cast(1, factors[0]), keys)
    _multiply(factors, keys, recalling)


@function
def _run(inputs, form, shape, scale, bounds, item, first, slab, o, kept, residuals):
    """Some columns of one head of one sequence, from the state in ``slab`` to the one after the last token.

    Writes the outputs to ``o``; or, where that is empty, the states between chunks to ``kept`` and what every token
    finds missing, ``v - k S'``, to ``residuals``.
    """
    q, _, v, beta, _ = inputs
    heads, groups, key, width = shape
    head, group, _, start, stop = _place(shape, bounds, item)
    if start == stop:
        return
    rows = _rows(key)
    size = slab.size // rows
    one = cast(1, slab[0])
    of_keys, written = np.zeros(6 * rows, slab.dtype), np.zeros(size, slab.dtype)
    out, recalled = np.zeros((PARTS + 1) * size, slab.dtype), np.zeros((PARTS + 1) * size, slab.dtype)
    factors, keys = columns(of_keys, rows, 0, 0, rows), columns(of_keys, rows, 1, 0, rows)
    queries, recalling = columns(of_keys, rows, 2, 0, rows), columns(of_keys, rows, 3, 0, rows)
    next_factors, next_keys = columns(of_keys, rows, 4, 0, rows), columns(of_keys, rows, 5, 0, rows)
    # before the first token nothing is written, and the state stays as it is
    _look_ahead(inputs, form, shape, head, group, start, next_factors, next_keys, recalling)
    _load_decay(beta, NO_DECAY, key, 0, factors)
    _advance(slab, size, factors, keys, written, queries, out, recalling, recalled)
    _clear(out)
    for token in range(start, stop):
        _copy(next_factors, factors)
        _copy(next_keys, keys)
        _load(v, width, token * heads + head, first, one, written)
        _add_multiple(-one, _total(recalled, size), written)
        if o.size == 0:
            _copy(written, columns(residuals, size, token - start, 0, size))
            if (token - start) % CHUNK == 0:
                _copy(slab, columns(kept, slab.size, (token - start) // CHUNK, 0, slab.size))
        _scale(beta[token * heads + head], written)
        _load(q, key, token * groups + group, 0, scale, queries)
        if token + 1 < stop:
            _look_ahead(inputs, form, shape, head, group, token + 1, next_factors, next_keys, recalling)
        _advance(slab, size, factors, keys, written, queries, out, recalling, recalled)
        read_out = _total(out, size)
        if o.size > 0:
            target = columns(o, width, token * heads + head, first, min(size, width - first))
            _copy(read_out, target)


@function
def _scale(factor, target):
    for j in range(target.size):
        write(target, j, factor * read(target, j, 0), 0)


@kernel
def _forward(q, k, v, beta, decay, form, shape, scale, bounds, tasks, states, o):
    for index in prange(tasks.shape[0]):
        inputs, nothing = (q, k, v, beta, decay), part(states, 0, 0)
        _, _, key, width = shape
        rows = _rows(key)
        for item in range(tasks[index, 2], tasks[index, 3]):
            row = _place(shape, bounds, item)[2]
            first = 0
            while first < width:
                size = _slab_size(rows, width, first, states)
                slab = np.empty(rows * size, states.dtype)
                _load_state(states, key, width, row, first, size, slab)
                _run(inputs, form, shape, scale, bounds, item, first, slab, o, nothing, nothing)
                _store_state(slab, key, width, row, first, size, states)
                first += size


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As the op ``delta_rule_forward``."""
    o = torch.empty_like(v)
    threads, *shared = _prepare(q, k, v, beta, log_decay, cu_seqlens, scale)
    if initial_state is None:
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = q.new_zeros((rows, v.shape[2], q.shape[3], v.shape[3]), dtype=accumulator(q.dtype))
    else:
        state = initial_state.clone()
    _forward(threads, *shared, array(state), array(o))
    return o, state


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Any, ...]:
    """The number of threads, then the arguments with which the kernels begin."""
    check_boundaries(cu_seqlens, q.shape[1])
    batch, total, groups, key = q.shape
    heads, width = v.shape[2:]
    dtype = accumulator(q.dtype)
    rates = beta.to(dtype)
    decay = rates if log_decay is None else log_decay.to(dtype)
    form = NO_DECAY if log_decay is None else TOKEN_DECAY if log_decay.dim() == 3 else KEY_DECAY
    bounds, _ = plan(cu_seqlens, batch, total, width, 1)
    # a head after the other, each of all sequences
    items = None
    if cu_seqlens is not None:
        items = torch.cat([cu_seqlens[:1], *(cu_seqlens[1:] + head * total for head in range(heads))])
    _, tasks = plan(items, batch * heads, total, 1, threads_for(v.numel() * key))
    number = np.float64 if dtype == torch.float64 else np.float32
    shape = heads, groups, key, width
    inputs = array(q), array(k), array(v), array(rates), array(decay)
    return len(tasks), *inputs, form, shape, number(scale), bounds, tasks


@function
def _add_gradients(token, row, sums, inner_product, form, scale, targets):
    """What one slab adds to a token's gradients, from the sums of :func:`_retreat`."""
    factors, keys, _, _, _ = token
    to_output, to_error, to_written, to_state = sums
    grad_q, grad_k, grad_decay, key = targets
    of_q, of_k = columns(grad_q, key, row, 0, key), columns(grad_k, key, row, 0, key)
    for j in range(key):
        factor = read(factors, j, 0)
        read_out = factor * read(to_output, j, 1) + read(keys, j, 2) * inner_product
        write(of_q, j, read(of_q, j, 3) + scale * read_out, 3)
        write(of_k, j, read(of_k, j, 4) + (read(to_written, j, 5) - factor * read(to_error, j, 6)), 4)
    if form == KEY_DECAY:
        of_decay = columns(grad_decay, key, row, 0, key)
        for j in range(key):
            write(of_decay, j, read(of_decay, j, 3) + read(factors, j, 0) * read(to_state, j, 1), 3)
    elif form == TOKEN_DECAY:
        grad_decay[row] += _dot(factors, to_state)


@function
def _grade(inputs, form, shape, scale, bounds, item, first, carry, kept, residuals, grad_o, gradients):
    """The way back of :func:`_run`, from the gradient in the last state in ``carry`` to that in the first."""
    q, k, _, beta, decay = inputs
    grad_q, grad_k, grad_v, grad_beta, grad_decay = gradients
    heads, groups, key, width = shape
    head, group, _, start, stop = _place(shape, bounds, item)
    if start == stop:
        return
    rows = _rows(key)
    size = carry.size // rows
    used, one = min(size, width - first), cast(1, carry[0])
    history = np.empty(min(CHUNK, stop - start) * carry.size, carry.dtype)
    of_keys, of_values = np.zeros((2 * CHUNK + 8) * rows, carry.dtype), np.zeros(4 * size, carry.dtype)
    factors, keys = columns(of_keys, rows, 0, 0, rows), columns(of_keys, rows, 1, 0, rows)
    earlier_keys, queries = columns(of_keys, rows, 2, 0, rows), columns(of_keys, rows, 3, 0, rows)
    sums = _four(of_keys, rows, 4)
    arriving, error = columns(of_values, size, 0, 0, size), columns(of_values, size, 1, 0, size)
    written, earlier_arriving = columns(of_values, size, 2, 0, size), columns(of_values, size, 3, 0, size)
    passed = np.zeros((PARTS + 1) * size, carry.dtype)
    token_rows, earlier_rows = (
        (factors, keys, arriving, error, written),
        (earlier_keys, queries, earlier_arriving, passed),
    )
    # behind the last token nothing was written, and the state stays as it is
    _load_decay(beta, NO_DECAY, key, 0, factors)
    last = stop - 1
    _load(k, key, last * groups + group, 0, one, earlier_keys)
    _load(q, key, last * groups + group, 0, scale, queries)
    _load(grad_o, width, last * heads + head, first, one, earlier_arriving)
    _retreat(carry, history, size, token_rows, earlier_rows, sums)
    for chunk in range((stop - start - 1) // CHUNK, -1, -1):
        begin = start + chunk * CHUNK
        count = min(CHUNK, stop - begin)
        _copy(columns(kept, carry.size, chunk, 0, carry.size), columns(history, carry.size, 0, 0, carry.size))
        for index in range(count):
            token = begin + index
            own_factors, own_keys = (
                columns(of_keys, rows, 8 + 2 * index, 0, rows),
                columns(of_keys, rows, 9 + 2 * index, 0, rows),
            )
            _load_decay(decay, form, key, token * heads + head, own_factors)
            _load(k, key, token * groups + group, 0, one, own_keys)
            if index + 1 < count:
                _copy(columns(residuals, size, token - start, 0, size), written)
                _scale(beta[token * heads + head], written)
                before = columns(history, carry.size, index, 0, carry.size)
                after = columns(history, carry.size, index + 1, 0, carry.size)
                _repeat(before, size, own_factors, own_keys, written, after)
        for index in range(count - 1, -1, -1):
            token = begin + index
            row, rate = token * heads + head, beta[token * heads + head]
            residual = columns(residuals, size, token - start, 0, size)
            _copy(columns(of_keys, rows, 8 + 2 * index, 0, rows), factors)
            _copy(earlier_keys, keys)
            _copy(earlier_arriving, arriving)
            recalling = _total(passed, size)
            grad_beta[row] += _dot(recalling, residual)
            _copy(recalling, error)
            _scale(rate, error)
            _copy(columns(error, size, 0, 0, used), columns(grad_v, width, row, first, used))
            _copy(residual, written)
            _scale(rate, written)
            if token > start:
                _load(k, key, (token - 1) * groups + group, 0, one, earlier_keys)
                _load(q, key, (token - 1) * groups + group, 0, scale, queries)
                _load(grad_o, width, (token - 1) * heads + head, first, one, earlier_arriving)
            else:
                _clear(queries)
            before = columns(history, carry.size, index, 0, carry.size)
            _retreat(carry, before, size, token_rows, earlier_rows, sums)
            targets = grad_q, grad_k, grad_decay, key
            _add_gradients(token_rows, row, sums, _dot(written, arriving), form, scale, targets)


@kernel
def _backward(q, k, v, beta, decay, form, shape, scale, bounds, tasks, states, grad_o, grad_states, gradients):
    for index in prange(tasks.shape[0]):
        inputs, nothing = (q, k, v, beta, decay), part(v, 0, 0)
        _, _, key, width = shape
        rows = _rows(key)
        longest = 0
        for item in range(tasks[index, 2], tasks[index, 3]):
            _, _, _, start, stop = _place(shape, bounds, item)
            longest = max(longest, stop - start)
        size = _slab_size(rows, width, 0, states)
        kept = np.empty((longest + CHUNK - 1) // CHUNK * rows * size, states.dtype)
        residuals = np.empty(longest * size, states.dtype)
        for item in range(tasks[index, 2], tasks[index, 3]):
            row = _place(shape, bounds, item)[2]
            first = 0
            while first < width:
                size = _slab_size(rows, width, first, states)
                slab = np.empty(rows * size, states.dtype)
                _load_state(states, key, width, row, first, size, slab)
                _run(inputs, form, shape, scale, bounds, item, first, slab, nothing, kept, residuals)
                _load_state(grad_states, key, width, row, first, size, slab)
                _grade(inputs, form, shape, scale, bounds, item, first, slab, kept, residuals, grad_o, gradients)
                _store_state(slab, key, width, row, first, size, grad_states)
                first += size


def backward(
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
) -> tuple[Tensor, ...]:
    """As the op ``delta_rule_backward``."""
    batch, total, groups, key = q.shape
    heads, dtype = v.shape[2], accumulator(q.dtype)
    grad_state = grad_final_state.clone()
    state = torch.zeros_like(grad_state) if initial_state is None else initial_state
    # of every head, added up over slabs
    grad_q, grad_k = (q.new_zeros((batch, total, heads, key), dtype=dtype) for _ in range(2))
    grad_beta, grad_v = torch.zeros_like(beta, dtype=dtype), torch.empty_like(v)
    grad_decay = q.new_empty(0, dtype=dtype) if log_decay is None else torch.zeros_like(log_decay, dtype=dtype)
    threads, *shared = _prepare(q, k, v, beta, log_decay, cu_seqlens, scale)
    gradients = tuple(map(array, (grad_q, grad_k, grad_v, grad_beta, grad_decay)))
    _backward(threads, *shared, array(state), array(grad_o), array(grad_state), gradients)
    if groups < heads:
        grad_q, grad_k = (value.unflatten(2, (groups, -1)).sum(3) for value in (grad_q, grad_k))
    given = grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v, grad_beta.to(beta.dtype)
    return *given, grad_decay.to(q.dtype if log_decay is None else log_decay.dtype), grad_state
