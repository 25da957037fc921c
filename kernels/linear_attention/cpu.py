"""``linear_attention`` on the CPU: the solver of :mod:`.chunked`, compiled where it is not a matrix product.

Blocks are small enough for the caches, and what several threads share are their tiles, or the rows of the states.
Products of decays are running products here, which are as exact as the recurrence's own: one multiplication a pair.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.linear_attention.chunked import Block, Faded, Solver, grade, solve
from seqzoo.kernels.linear_scan.cpu import columns
from seqzoo.kernels.numba_math import cast, exp, reassociable_add
from seqzoo.kernels.numba_memory import part, read, write
from seqzoo.kernels.numba_runtime import array, function, kernel, plan, threads_for

# elements of the tiles that a thread holds at a time
TILES = 1 << 19
# columns of the table of chunks
ROW, LENGTH, SEQUENCE, FIRST, LAST = range(5)


@function
def _share(count, index, tasks):
    return range(count * index // tasks, count * (index + 1) // tasks)


@function
def _dot(a, b):
    total = cast(0, read(a, 0, 0))
    for j in range(a.size):
        total = reassociable_add(total, read(a, j, 0) * read(b, j, 1))
    return total


@function
def _scale(factor, source, target):
    for j in range(target.size):
        write(target, j, factor * read(source, j, 0), 1)


@function
def _add(factor, source, target):
    for j in range(target.size):
        write(target, j, read(target, j, 1) + factor * read(source, j, 0), 1)


@function
def _copy(source, target):
    for j in range(target.size):
        write(target, j, read(source, j, 0), 1)


@function
def _fill(value, target):
    for j in range(target.size):
        write(target, j, value, 0)


# -- between the tensors and the tiles --


@kernel
def _load(x, members, shared, factor, head, heads, chunks, size, width, tiles, tasks):
    for index in prange(tasks):
        for tile in _share(chunks.shape[0] * heads, index, tasks):
            chunk, member = chunks[tile // heads], (head + tile % heads) // shared
            for i in range(size):
                target = columns(tiles, width, tile * size + i, 0, width)
                if i < chunk[LENGTH]:
                    source = columns(x, members * width, chunk[ROW] + i, member * width, width)
                    for j in range(width):
                        write(target, j, factor * cast(read(source, j, 0), factor), 1)
                else:
                    _fill(cast(0, factor), target)


@kernel
def _load_decays(x, members, one, head, heads, chunks, size, width, tiles, tasks):
    for index in prange(tasks):
        for tile in _share(chunks.shape[0] * heads, index, tasks):
            chunk, member = chunks[tile // heads], head + tile % heads
            for i in range(size):
                target = columns(tiles, width, tile * size + i, 0, width)
                if i < chunk[LENGTH]:
                    source = columns(x, members * width, chunk[ROW] + i, member * width, width)
                    for j in range(width):
                        write(target, j, exp(cast(read(source, j, 0), one)), 1)
                else:
                    _fill(one, target)


@kernel
def _store(tiles, factor, head, heads, chunks, size, width, x, members, shared, tasks):
    for index in prange(tasks):
        for number in _share(chunks.shape[0], index, tasks):
            chunk = chunks[number]
            for tile in range(number * heads, (number + 1) * heads):
                member = (head + tile - number * heads) // shared
                for i in range(chunk[LENGTH]):
                    source = columns(tiles, width, tile * size + i, 0, width)
                    target = columns(x, members * width, chunk[ROW] + i, member * width, width)
                    if shared == 1:
                        _scale(factor, source, target)
                    else:
                        _add(factor, source, target)


# -- from chunk to chunk --


@function
def _advance(factor, entering, carry):
    for j in range(carry.size):
        state, added = read(carry, j, 0), read(entering, j, 1)
        write(entering, j, state, 1)
        write(carry, j, factor * state + added, 0)


@function
def _retreat(factor, states, received, carry):
    """Returns the gradient of the logarithm of the factor."""
    total = cast(0, factor)
    for j in range(carry.size):
        gradient, added = read(carry, j, 0), read(received, j, 1)
        total = reassociable_add(total, gradient * read(states, j, 2))
        write(received, j, gradient, 1)
        write(carry, j, factor * gradient + added, 0)
    return factor * total


@kernel
def _scan(states, passing, initial, given, chunks, head, heads, all_heads, size, width, carry, final, tasks):
    for index in prange(tasks):
        for number in range(chunks.shape[0]):
            chunk = chunks[number]
            for local in range(heads):
                tile, row = number * heads + local, chunk[SEQUENCE] * all_heads + head + local
                for key in _share(size, index, tasks):
                    running = columns(carry, width, local * size + key, 0, width)
                    if chunk[FIRST]:
                        _copy(columns(initial, width, (row * size + key) * given, 0, width), running)
                    factor = passing[tile * size + key] if passing.size > 0 else cast(1, passing[0])
                    _advance(factor, columns(states, width, tile * size + key, 0, width), running)
                    if chunk[LAST] and final.size > 0:
                        _copy(running, columns(final, width, row * size + key, 0, width))


@kernel
def _scan_back(
    received, states, passing, chunks, head, heads, all_heads, size, width, carry, grad_final, grad_initial, grad, tasks
):
    for index in prange(tasks):
        for number in range(chunks.shape[0] - 1, -1, -1):
            chunk = chunks[number]
            for local in range(heads):
                tile, row = number * heads + local, chunk[SEQUENCE] * all_heads + head + local
                for key in _share(size, index, tasks):
                    running = columns(carry, width, local * size + key, 0, width)
                    if chunk[LAST]:
                        _copy(columns(grad_final, width, row * size + key, 0, width), running)
                    at, of_state = tile * size + key, columns(states, width, tile * size + key, 0, width)
                    from_reads = columns(received, width, at, 0, width)
                    if passing.size > 0:
                        grad[at] = _retreat(passing[at], of_state, from_reads, running)
                    else:
                        _advance(cast(1, passing[0]), from_reads, running)
                    if chunk[FIRST]:
                        _copy(running, columns(grad_initial, width, row * size + key, 0, width))


# -- with one decay a head --


@function
def _decay(decays, stride, chunk, i, head):
    """The decay of a place in a chunk; 1 where there is no token."""
    return decays[(chunk[ROW] + i) * stride + head] if i < chunk[LENGTH] else 1.0


@function
def _fade_tile(decays, stride, head, chunk, k, size, width, writing, passing):
    product = 1.0
    for i in range(size - 1, -1, -1):
        _scale(cast(product, passing[0]), columns(k, width, i, 0, width), columns(writing, width, i, 0, width))
        product *= _decay(decays, stride, chunk, i, head)
    _fill(cast(product, passing[0]), passing)


@function
def _read_tile(decays, stride, head, chunk, q, size, width, reading):
    product = 1.0
    for i in range(size):
        product *= _decay(decays, stride, chunk, i, head)
        _scale(cast(product, q[0]), columns(q, width, i, 0, width), columns(reading, width, i, 0, width))


@function
def _mask_tile(decays, stride, head, chunk, pairs, size, products):
    """Multiplies by the products of the decays between, whose row follows from the one before it."""
    for i in range(size):
        row = part(pairs, i * size, size)
        factor = cast(_decay(decays, stride, chunk, i, head), products[0])
        for j in range(i):
            product = factor * read(products, j, 0)
            write(products, j, product, 0)
            write(row, j, product * read(row, j, 1), 1)
        products[i] = 1
        for j in range(i + 1, size):
            write(row, j, cast(0, factor), 1)


@function
def _unmask_tile(decays, stride, head, chunk, pairs, grad_pairs, size, products, through):
    """Makes ``grad_pairs`` those of the products of q and k, and sums over the pairs around every token."""
    for i in range(size):
        row, arriving = part(pairs, i * size, size), part(grad_pairs, i * size, size)
        factor = cast(_decay(decays, stride, chunk, i, head), products[0])
        products[i] = 1
        for j in range(i + 1):
            gradient = read(arriving, j, 2)
            product = read(products, j, 0) if j == i else factor * read(products, j, 0)
            write(products, j, product, 0)
            write(row, j, gradient * read(row, j, 1), 1)
            write(arriving, j, gradient * product, 2)
        for j in range(i + 1, size):
            write(row, j, cast(0, factor), 1)
            write(arriving, j, cast(0, factor), 2)
    _fill(cast(0, products[0]), products)
    for i in range(size - 1, -1, -1):
        _add(cast(1, products[0]), part(pairs, i * size, size), products)
        total = cast(0, products[0])
        for j in range(i):
            total = reassociable_add(total, read(products, j, 0))
        through[i] = total


@function
def _unfade_tile(
    decays, stride, head, chunk, reading, writing, grad_reading, grad_writing, grad_q, grad_k, size, width, through
):
    one, product = cast(1, through[0]), 1.0
    for i in range(size):
        product *= _decay(decays, stride, chunk, i, head)
        arriving = columns(grad_reading, width, i, 0, width)
        _add(cast(product, one), arriving, columns(grad_q, width, i, 0, width))
    total = cast(0, one)
    for i in range(size - 1, -1, -1):
        total += _dot(columns(reading, width, i, 0, width), columns(grad_reading, width, i, 0, width))
        through[i] += total
    total = cast(0, one)
    for i in range(size):
        through[i] += total
        total += _dot(columns(writing, width, i, 0, width), columns(grad_writing, width, i, 0, width))
    product = 1.0
    for i in range(size - 1, -1, -1):
        arriving = columns(grad_writing, width, i, 0, width)
        _add(cast(product, one), arriving, columns(grad_k, width, i, 0, width))
        product *= _decay(decays, stride, chunk, i, head)


@kernel
def _fade(decays, stride, head, heads, chunks, k, size, width, writing, passing, tasks):
    for index in prange(tasks):
        for tile in _share(chunks.shape[0] * heads, index, tasks):
            place = decays, stride, head + tile % heads, chunks[tile // heads]
            at, extent = tile * size * width, size * width
            results = part(writing, at, extent), part(passing, tile * width, width)
            _fade_tile(*place, part(k, at, extent), size, width, *results)


@kernel
def _read_and_mask(decays, stride, head, heads, chunks, q, size, width, reading, pairs, tasks):
    for index in prange(tasks):
        products = np.empty(size, pairs.dtype)
        for tile in _share(chunks.shape[0] * heads, index, tasks):
            place = decays, stride, head + tile % heads, chunks[tile // heads]
            at, extent = tile * size * width, size * width
            _read_tile(*place, part(q, at, extent), size, width, part(reading, at, extent))
            _mask_tile(*place, part(pairs, tile * size * size, size * size), size, products)


@kernel
def _unmask(decays, stride, head, heads, chunks, pairs, grad_pairs, size, through, tasks):
    for index in prange(tasks):
        products = np.empty(size, pairs.dtype)
        for tile in _share(chunks.shape[0] * heads, index, tasks):
            place = decays, stride, head + tile % heads, chunks[tile // heads]
            at, extent = tile * size * size, size * size
            both = part(pairs, at, extent), part(grad_pairs, at, extent)
            _unmask_tile(*place, *both, size, products, part(through, tile * size, size))


@kernel
def _unfade(
    decays,
    stride,
    head,
    heads,
    chunks,
    reading,
    writing,
    grad_reading,
    grad_writing,
    grad_passing,
    grad_q,
    grad_k,
    size,
    width,
    through,
    tasks,
):
    for index in prange(tasks):
        for tile in _share(chunks.shape[0] * heads, index, tasks):
            place = decays, stride, head + tile % heads, chunks[tile // heads]
            at, extent, sums = tile * size * width, size * width, part(through, tile * size, size)
            total = cast(0, sums[0])
            for j in range(width):
                total += grad_passing[tile * width + j]
            for i in range(size):
                sums[i] += total
            _unfade_tile(
                *place,
                part(reading, at, extent),
                part(writing, at, extent),
                part(grad_reading, at, extent),
                part(grad_writing, at, extent),
                part(grad_q, at, extent),
                part(grad_k, at, extent),
                size,
                width,
                sums,
            )


# -- with a decay for every key --


@function
def _fade_dot(decays, q, running):
    """Multiplies a running key by decays; returns its product with q."""
    total = cast(0, read(q, 0, 0))
    for j in range(q.size):
        value = read(decays, j, 1) * read(running, j, 2)
        write(running, j, value, 2)
        total = reassociable_add(total, read(q, j, 0) * value)
    return total


@function
def _fade_row(decays, source, product, target):
    """``target = product * source``, and the decays into the product afterwards."""
    for j in range(target.size):
        value = read(product, j, 0)
        write(target, j, value * read(source, j, 1), 2)
        write(product, j, value * read(decays, j, 3), 0)


@function
def _read_row(decays, source, product, target):
    """``target = product * source``, and the decays into the product before."""
    for j in range(target.size):
        value = read(product, j, 0) * read(decays, j, 3)
        write(target, j, value * read(source, j, 1), 2)
        write(product, j, value, 0)


@function
def _fade_tile_of_keys(k, decays, size, width, writing, passing):
    _fill(cast(1, passing[0]), passing)
    for i in range(size - 1, -1, -1):
        at = columns(decays, width, i, 0, width), columns(k, width, i, 0, width)
        _fade_row(at[0], at[1], passing, columns(writing, width, i, 0, width))


@function
def _pair_tile(q, k, decays, size, width, pairs, reading, running):
    _fill(cast(0, q[0]), pairs)
    for j in range(size):
        _copy(columns(k, width, j, 0, width), running)
        pairs[j * size + j] = _dot(columns(q, width, j, 0, width), running)
        for i in range(j + 1, size):
            read_by = columns(q, width, i, 0, width)
            pairs[i * size + j] = _fade_dot(columns(decays, width, i, 0, width), read_by, running)
    product = running
    _fill(cast(1, q[0]), product)
    for i in range(size):
        at = columns(decays, width, i, 0, width), columns(q, width, i, 0, width)
        _read_row(at[0], at[1], product, columns(reading, width, i, 0, width))


@function
def _unpair_forward(gradient, decays, previous, following, grad_q):
    """A running key one token later, and what it adds to the gradient of q."""
    for j in range(grad_q.size):
        value = read(decays, j, 0) * read(previous, j, 1)
        write(following, j, value, 2)
        write(grad_q, j, read(grad_q, j, 3) + gradient * value, 3)


@function
def _unpair_back(gradient, q, running, decays, arriving, through):
    """The gradient of a running key one token earlier, and what it adds to that of the decay."""
    for j in range(q.size):
        value = read(arriving, j, 0) + gradient * read(q, j, 1)
        write(through, j, read(through, j, 2) + value * read(running, j, 3), 2)
        write(arriving, j, read(decays, j, 4) * value, 0)


@function
def _unfade_read(decays, product, grad_reading, grad_q):
    for j in range(grad_q.size):
        value = read(decays, j, 0) * read(product, j, 1)
        write(product, j, value, 1)
        write(grad_q, j, read(grad_q, j, 2) + value * read(grad_reading, j, 3), 2)


@function
def _sum_products(a, b, total, through):
    for j in range(total.size):
        value = read(total, j, 0) + read(a, j, 1) * read(b, j, 2)
        write(total, j, value, 0)
        write(through, j, read(through, j, 3) + value, 3)


@function
def _unpair_tile(
    q,
    k,
    decays,
    size,
    width,
    grad_pairs,
    reading,
    writing,
    grad_reading,
    grad_writing,
    grad_passing,
    grad_q,
    grad_k,
    through,
    scratch,
):
    one = cast(1, grad_passing[0])
    _fill(cast(0, one), grad_q)
    for i in range(size):
        _copy(grad_passing, columns(through, width, i, 0, width))
    for j in range(size):
        running = columns(scratch, width, j, 0, width)
        _copy(columns(k, width, j, 0, width), running)
        _add(grad_pairs[j * size + j], running, columns(grad_q, width, j, 0, width))
        for i in range(j + 1, size):
            following, fading = columns(scratch, width, i, 0, width), columns(decays, width, i, 0, width)
            _unpair_forward(grad_pairs[i * size + j], fading, running, following, columns(grad_q, width, i, 0, width))
            running = following
        arriving = columns(grad_k, width, j, 0, width)
        _fill(cast(0, one), arriving)
        for i in range(size - 1, j, -1):
            running, fading = columns(scratch, width, i, 0, width), columns(decays, width, i, 0, width)
            read_by, to_decay = columns(q, width, i, 0, width), columns(through, width, i, 0, width)
            _unpair_back(grad_pairs[i * size + j], read_by, running, fading, arriving, to_decay)
        _add(grad_pairs[j * size + j], columns(q, width, j, 0, width), arriving)
    product = columns(scratch, width, 0, 0, width)
    _fill(one, product)
    for i in range(size):
        fading, arriving = columns(decays, width, i, 0, width), columns(grad_reading, width, i, 0, width)
        _unfade_read(fading, product, arriving, columns(grad_q, width, i, 0, width))
    _fill(one, product)
    for i in range(size - 1, -1, -1):
        arriving, target = columns(grad_writing, width, i, 0, width), columns(grad_k, width, i, 0, width)
        for j in range(width):
            write(target, j, read(target, j, 0) + read(product, j, 1) * read(arriving, j, 2), 0)
        fading = columns(decays, width, i, 0, width)
        for j in range(width):
            write(product, j, read(product, j, 1) * read(fading, j, 3), 1)
    total = product
    _fill(cast(0, one), total)
    for i in range(size - 1, -1, -1):
        at = columns(reading, width, i, 0, width), columns(grad_reading, width, i, 0, width)
        _sum_products(at[0], at[1], total, columns(through, width, i, 0, width))
    _fill(cast(0, one), total)
    for i in range(size - 1):
        at = columns(writing, width, i, 0, width), columns(grad_writing, width, i, 0, width)
        _sum_products(at[0], at[1], total, columns(through, width, i + 1, 0, width))


@kernel
def _fade_keys(k, decays, number, size, width, writing, passing, tasks):
    for index in prange(tasks):
        for tile in _share(number, index, tasks):
            at, extent = tile * size * width, size * width
            results = part(writing, at, extent), part(passing, tile * width, width)
            _fade_tile_of_keys(part(k, at, extent), part(decays, at, extent), size, width, *results)


@kernel
def _pair(q, k, decays, number, size, width, pairs, reading, tasks):
    for index in prange(tasks):
        running = np.empty(width, q.dtype)
        for tile in _share(number, index, tasks):
            at, extent = tile * size * width, size * width
            operands = part(q, at, extent), part(k, at, extent), part(decays, at, extent)
            results = part(pairs, tile * size * size, size * size), part(reading, at, extent)
            _pair_tile(*operands, size, width, *results, running)


@kernel
def _unpair(
    q,
    k,
    decays,
    number,
    size,
    width,
    grad_pairs,
    reading,
    writing,
    grad_reading,
    grad_writing,
    grad_passing,
    grad_q,
    grad_k,
    through,
    tasks,
):
    for index in prange(tasks):
        scratch = np.empty(size * width, q.dtype)
        for tile in _share(number, index, tasks):
            at, extent = tile * size * width, size * width
            _unpair_tile(
                part(q, at, extent),
                part(k, at, extent),
                part(decays, at, extent),
                size,
                width,
                part(grad_pairs, tile * size * size, size * size),
                part(reading, at, extent),
                part(writing, at, extent),
                part(grad_reading, at, extent),
                part(grad_writing, at, extent),
                part(grad_passing, tile * width, width),
                part(grad_q, at, extent),
                part(grad_k, at, extent),
                part(through, at, extent),
                scratch,
            )


# -- a single token --


@function
def _step_row(factor, key, before, values, query, after, o):
    for j in range(o.size):
        value = factor * read(before, j, 0) + key * read(values, j, 1)
        write(after, j, value, 2)
        write(o, j, read(o, j, 3) + query * value, 3)


@kernel
def _step(q, k, v, decays, by_key, initial, given, scale, rows, heads, shared, size, width, final, o, tasks):
    for index in prange(tasks):
        total = np.empty(width, final.dtype)
        for row in _share(rows * heads, index, tasks):
            queries, keys = part(q, row // shared * size, size), part(k, row // shared * size, size)
            values, factor = part(v, row * width, width), cast(1, scale)
            _fill(cast(0, scale), total)
            for key in range(size):
                if decays.size > 0 and (by_key or key == 0):
                    at = row * size + key if by_key else row % decays.size
                    factor = exp(cast(read(decays, at, 0), scale))
                before = part(initial, (row * size + key) * width * given, width)
                after = part(final, (row * size + key) * width, width)
                added, query = cast(read(keys, key, 0), scale), cast(read(queries, key, 0), scale)
                _step_row(factor, added, before, values, query, after, total)
            _scale(scale, total, part(o, row * width, width))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """As the op ``linear_attention_forward``."""
    return solve(_Compiled, q, k, v, log_decay, initial_state, cu_seqlens, scale, causal)


def backward(
    grad_o: Tensor,
    grad_final_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the op ``linear_attention_backward``."""
    gradients = grad_o, grad_final_state
    return grade(_Compiled, gradients, q, k, v, log_decay, initial_state, cu_seqlens, scale, causal)


class _Compiled(Solver):
    """The chunks of all sequences make one row."""

    spare = 0

    @staticmethod
    def step(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        rows, _, groups, size = q.shape
        heads, width = v.shape[2:]
        o, final = torch.empty_like(v), q.new_empty((rows, heads, size, width), dtype=accumulator(q.dtype))
        given = initial_state is not None
        state, threads = array(final), threads_for(final.numel())
        _step(
            threads,
            array(q),
            array(k),
            array(v),
            np.empty(0, state.dtype) if log_decay is None else array(log_decay),
            log_decay is not None and log_decay.dim() == 4,
            array(initial_state) if given else np.zeros(width, state.dtype),
            int(given),
            state.dtype.type(scale),
            rows,
            heads,
            heads // groups,
            size,
            width,
            state,
            array(o),
            threads,
        )
        return o, final

    def prepare(self, cu_seqlens: Tensor | None) -> None:
        bounds, _ = plan(cu_seqlens, self.batch, self.total, 1, 1)
        size, lengths = self.chunk, np.diff(bounds)
        counts = -(-lengths // size)
        sequence = np.repeat(np.arange(lengths.size), counts)
        index = np.arange(sequence.size) - np.repeat(np.cumsum(counts) - counts, counts)
        left = lengths[sequence] - index * size
        columns_of = (bounds[sequence] + index * size, np.minimum(left, size), sequence, index == 0, left <= size)
        self.table = np.stack(columns_of, axis=1).astype(np.int64)
        self.carry_rows, self.chunk_sequences = 1, torch.from_numpy(sequence)[None]
        self.threads = threads_for(self.batch * self.total * self.heads * (self.size + self.width))
        tile = size * (2 * self.size + 2 * self.width + size) + self.size * self.width
        self.divide(len(sequence), max(1, TILES * self.threads // tile))
        self.one = np.ones((), array(self.q.new_empty(0, dtype=self.dtype)).dtype)[()]
        if self.log_decay is not None and not self.by_key:
            # exact to the rounding of the recurrence's own factors, however many are multiplied
            self.decays = array(self.log_decay.to(torch.float64).exp())
            self.stride = self.heads if self.log_decay.dim() == 3 else 0

    def load(self, x: Tensor, block: Block, factor: float = 1.0) -> Tensor:
        members, width = x.shape[2:]
        tiles = self.tiles(block, self.chunk, width)
        place, extent = self.place(block), (self.chunk, width, array(tiles), self.threads)
        _load(self.threads, array(x), members, self.heads // members, self.one * factor, *place, *extent)
        return tiles

    def store(self, tiles: Tensor, block: Block, target: Tensor, factor: float = 1.0) -> None:
        members, width = target.shape[2:]
        place, extent = self.place(block), (self.chunk, width, array(target), members, self.heads // members)
        _store(self.threads, array(tiles), self.one * factor, *place, *extent, self.threads)

    def output(self, like: Tensor) -> Tensor:
        if like.shape[2] == self.heads:
            return like.new_empty(like.shape)
        return like.new_zeros(like.shape, dtype=self.dtype)

    def finish(self, stored: Tensor, like: Tensor) -> Tensor:
        return stored.to(like.dtype)

    def scan(self, block: Block, states: Tensor, passing: Tensor | None, carry: Tensor, final: Tensor | None) -> None:
        given = states.new_zeros(self.width) if self.initial_state is None else self.initial_state
        _scan(
            self.threads,
            array(states),
            self.optional(passing),
            array(given),
            int(self.initial_state is not None),
            *self.sequential(block),
            array(carry),
            self.optional(final),
            self.threads,
        )

    def scan_back(
        self,
        block: Block,
        received: Tensor,
        states: Tensor,
        passing: Tensor | None,
        carry: Tensor,
        grad_final: Tensor,
        grad_initial: Tensor,
    ) -> Tensor | None:
        gradient = None if passing is None else torch.empty_like(passing)
        _scan_back(
            self.threads,
            array(received),
            array(states),
            self.optional(passing),
            *self.sequential(block),
            array(carry),
            array(grad_final),
            array(grad_initial),
            self.optional(gradient),
            self.threads,
        )
        return gradient

    def fade(self, block: Block, k: Tensor) -> Faded:
        if self.log_decay is None:
            return super().fade(block, k)
        decays = self.factors(block, self.log_decay) if self.by_key else (self.decays, self.stride, *self.place(block))
        faded = Faded(torch.empty_like(k), self.tiles(block, self.size), decays)
        results = array(faded.writing), array(faded.passing), self.threads
        if self.by_key:
            _fade_keys(self.threads, array(k), decays, len(k), self.chunk, self.size, *results)
        else:
            _fade(self.threads, *decays, array(k), self.chunk, self.size, *results)
        return faded

    def pairs(self, block: Block, q: Tensor, k: Tensor, faded: Faded) -> tuple[Tensor, Tensor]:
        if self.log_decay is None:
            return super().pairs(block, q, k, faded)
        reading, extent = torch.empty_like(q), (self.chunk, self.size)
        if self.by_key:
            pairs = self.tiles(block, self.chunk, self.chunk)
            results = array(pairs), array(reading), self.threads
            _pair(self.threads, array(q), array(k), faded.decays, len(q), *extent, *results)
        else:
            pairs = torch.bmm(q, k.mT)
            _read_and_mask(self.threads, *faded.decays, array(q), *extent, array(reading), array(pairs), self.threads)
        return pairs, reading

    def grade_pairs(
        self,
        block: Block,
        q: Tensor,
        k: Tensor,
        faded: Faded,
        pairs: Tensor,
        reading: Tensor,
        grad_pairs: Tensor,
        grad_reading: Tensor,
        grad_writing: Tensor,
        grad_passing: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if grad_passing is None:
            arriving = grad_pairs, grad_reading, grad_writing, grad_passing
            return super().grade_pairs(block, q, k, faded, pairs, reading, *arriving)
        arriving = map(array, (reading, faded.writing, grad_reading, grad_writing, grad_passing))
        if self.by_key:
            grad_q, grad_k, through = (torch.empty_like(q) for _ in range(3))
            operands, extent = (array(q), array(k), faded.decays), (len(q), self.chunk, self.size)
            results = map(array, (grad_q, grad_k, through))
            _unpair(self.threads, *operands, *extent, array(grad_pairs), *arriving, *results, self.threads)
            return grad_q, grad_k, through
        through = self.tiles(block, self.chunk)
        inner = array(pairs), array(grad_pairs), self.chunk, array(through)
        _unmask(self.threads, *faded.decays, *inner, self.threads)
        grad_q, grad_k = torch.bmm(grad_pairs, k), torch.bmm(grad_pairs.mT, q)
        results = array(grad_q), array(grad_k), self.chunk, self.size, array(through)
        _unfade(self.threads, *faded.decays, *arriving, *results, self.threads)
        return grad_q, grad_k, through

    def factors(self, block: Block, log_decay: Tensor) -> np.ndarray:
        """The decays of the tiles' keys, ``(M, C, K)``; 1 where there is no token."""
        tiles = array(self.tiles(block, self.chunk, self.size))
        place, source = self.place(block), (array(log_decay), self.heads, self.one)
        _load_decays(self.threads, *source, *place, self.chunk, self.size, tiles, self.threads)
        return tiles

    def tiles(self, block: Block, *shape: int) -> Tensor:
        """Memory for a block's tiles."""
        return self.q.new_empty((block.n_chunks * block.n_heads, *shape), dtype=self.dtype)

    def place(self, block: Block) -> tuple[Any, ...]:
        """The heads and the chunks of a block, for the kernels."""
        return block.heads.start, block.n_heads, self.table[block.chunks]

    def sequential(self, block: Block) -> tuple[Any, ...]:
        """The same, and the extents of the states, for the kernels that run along the chunks."""
        return self.table[block.chunks], block.heads.start, block.n_heads, self.heads, self.size, self.width

    def optional(self, tensor: Tensor | None) -> np.ndarray:
        """The memory of a tensor, or of none."""
        return np.empty(0, self.one.dtype) if tensor is None else array(tensor)
