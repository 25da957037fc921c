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
from seqzoo.kernels.linear_attention.chunked import Added, Block, ByKey, ByValue, Solver, grade, solve
from seqzoo.kernels.linear_scan.cpu import columns
from seqzoo.kernels.numba_math import cast, exp, reassociable_add
from seqzoo.kernels.numba_memory import part, read, write
from seqzoo.kernels.numba_runtime import array, function, kernel, plan, threads_for

# elements of the tiles that a thread holds at a time
TILES = 1 << 20
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
def _sum(a):
    total = cast(0, read(a, 0, 0))
    for j in range(a.size):
        total = reassociable_add(total, read(a, j, 0))
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
def _load(x, all_heads, shared, factor, head, groups, members, chunks, size, width, tiles, tasks):
    for index in prange(tasks):
        for tile in _share(chunks.shape[0] * groups, index, tasks):
            chunk, first = chunks[tile // groups], (head + tile % groups * members) // shared
            extent = members * width if shared == 1 else width
            for i in range(size):
                target = columns(tiles, extent, tile * size + i, 0, extent)
                if i < chunk[LENGTH]:
                    source = columns(x, all_heads * width, chunk[ROW] + i, first * width, extent)
                    for j in range(extent):
                        write(target, j, factor * cast(read(source, j, 0), factor), 1)
                else:
                    _fill(cast(0, factor), target)


@kernel
def _load_decays(x, all_heads, one, head, groups, chunks, size, width, tiles, tasks):
    for index in prange(tasks):
        for tile in _share(chunks.shape[0] * groups, index, tasks):
            chunk, first = chunks[tile // groups], head + tile % groups
            for i in range(size):
                target = columns(tiles, width, tile * size + i, 0, width)
                if i < chunk[LENGTH]:
                    source = columns(x, all_heads * width, chunk[ROW] + i, first * width, width)
                    for j in range(width):
                        write(target, j, exp(cast(read(source, j, 0), one)), 1)
                else:
                    _fill(one, target)


@kernel
def _store(tiles, factor, head, groups, members, chunks, size, width, x, all_heads, shared, tasks):
    for index in prange(tasks):
        for number in _share(chunks.shape[0], index, tasks):
            chunk = chunks[number]
            extent = members * width if shared == 1 else width
            for tile in range(number * groups, (number + 1) * groups):
                first = (head + (tile - number * groups) * members) // shared
                for i in range(chunk[LENGTH]):
                    source = columns(tiles, extent, tile * size + i, 0, extent)
                    target = columns(x, all_heads * width, chunk[ROW] + i, first * width, extent)
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
def _scan(
    states, passing, by_key, initial, given, chunks, head, groups, members, heads, size, width, carry, final, tasks
):
    for index in prange(tasks):
        for number in range(chunks.shape[0]):
            chunk = chunks[number]
            for local in range(groups * members):
                tile, member = number * groups + local // members, local % members
                row, extent = chunk[SEQUENCE] * heads + head + local, members * width
                for key in _share(size, index, tasks):
                    running = columns(carry, width, local * size + key, 0, width)
                    if chunk[FIRST]:
                        _copy(columns(initial, width, (row * size + key) * given, 0, width), running)
                    factor = cast(1, carry[0])
                    if passing.size > 0:
                        factor = passing[tile * size + key if by_key else tile * members + member]
                    _advance(factor, columns(states, extent, tile * size + key, member * width, width), running)
                    if chunk[LAST] and final.size > 0:
                        _copy(running, columns(final, width, row * size + key, 0, width))


@kernel
def _scan_back(
    received,
    states,
    passing,
    by_key,
    chunks,
    head,
    groups,
    members,
    heads,
    size,
    width,
    carry,
    grad_final,
    grad_initial,
    grad,
    tasks,
):
    for index in prange(tasks):
        for number in range(chunks.shape[0] - 1, -1, -1):
            chunk = chunks[number]
            for local in range(groups * members):
                tile, member = number * groups + local // members, local % members
                row, extent = chunk[SEQUENCE] * heads + head + local, members * width
                for key in _share(size, index, tasks):
                    running = columns(carry, width, local * size + key, 0, width)
                    if chunk[LAST]:
                        _copy(columns(grad_final, width, row * size + key, 0, width), running)
                    of_state = columns(states, extent, tile * size + key, member * width, width)
                    from_reads = columns(received, extent, tile * size + key, member * width, width)
                    if passing.size > 0:
                        factor = passing[tile * size + key if by_key else tile * members + member]
                        grad[(tile * members + member) * size + key] = _retreat(factor, of_state, from_reads, running)
                    else:
                        _advance(cast(1, carry[0]), from_reads, running)
                    if chunk[FIRST]:
                        _copy(running, columns(grad_initial, width, row * size + key, 0, width))


# -- with one decay a head --


@function
def _decay(decays, stride, chunk, i, head):
    """The decay of a place in a chunk; 1 where there is no token."""
    return decays[(chunk[ROW] + i) * stride + head] if i < chunk[LENGTH] else 1.0


@function
def _until_tile(decays, stride, head, chunk, values, size, members, width, target):
    for member in range(members):
        product, at, extent = 1.0, member * width, members * width
        for i in range(size - 1, -1, -1):
            source = columns(values, extent, i, at, width)
            _scale(cast(product, values[0]), source, columns(target, extent, i, at, width))
            product *= _decay(decays, stride, chunk, i, head + member)


@function
def _since_tile(decays, stride, head, chunk, values, size, members, width, target):
    for member in range(members):
        product, at, extent = 1.0, member * width, members * width
        for i in range(size):
            product *= _decay(decays, stride, chunk, i, head + member)
            source = columns(values, extent, i, at, width)
            _scale(cast(product, values[0]), source, columns(target, extent, i, at, width))


@function
def _mask_tile(decays, stride, head, chunk, pairs, size, products, target):
    """Multiplies by the products of the decays between, whose row follows from the one before it."""
    for i in range(size):
        source, row = part(pairs, i * size, size), part(target, i * size, size)
        factor = cast(_decay(decays, stride, chunk, i, head), products[0])
        for j in range(i):
            product = factor * read(products, j, 0)
            write(products, j, product, 0)
            write(row, j, product * read(source, j, 1), 2)
        products[i] = 1
        row[i] = source[i]
        for j in range(i + 1, size):
            write(row, j, cast(0, factor), 2)


@function
def _unmask_row(factor, arriving, row, products, inner):
    for j in range(inner.size):
        gradient = read(arriving, j, 2)
        product = factor * read(products, j, 0)
        write(products, j, product, 0)
        write(arriving, j, gradient * read(row, j, 1), 2)
        write(inner, j, read(inner, j, 3) + gradient * product, 3)


@function
def _unmask_tile(decays, stride, head, chunk, pairs, grad_pairs, size, products, inner, through, at, members):
    """Adds the gradients of the products of q and k, and sums over the pairs around every token."""
    for i in range(size):
        row, arriving, own = part(pairs, i * size, i), part(grad_pairs, i * size, i), part(inner, i * size, i)
        factor = cast(_decay(decays, stride, chunk, i, head), products[0])
        _unmask_row(factor, arriving, row, products, own)
        products[i] = 1
        inner[i * size + i] += grad_pairs[i * size + i]
    _fill(cast(0, products[0]), products)
    for i in range(size - 1, -1, -1):
        _add(cast(1, products[0]), part(grad_pairs, i * size, i), part(products, 0, i))
        through[at + i * members] = _sum(part(products, 0, i))


@kernel
def _whole(decays, stride, head, groups, members, chunks, size, passing, tasks):
    for index in prange(tasks):
        for number in _share(passing.size, index, tasks):
            tile, product = number // members, 1.0
            for i in range(size):
                first = head + tile % groups * members
                product *= _decay(decays, stride, chunks[tile // groups], i, first + number % members)
            passing[number] = product


@kernel
def _until(decays, stride, head, groups, members, chunks, values, size, width, target, tasks):
    for index in prange(tasks):
        for tile in _share(chunks.shape[0] * groups, index, tasks):
            place = decays, stride, head + tile % groups * members, chunks[tile // groups]
            at, extent = tile * size * members * width, size * members * width
            _until_tile(*place, part(values, at, extent), size, members, width, part(target, at, extent))


@kernel
def _since(decays, stride, head, groups, members, chunks, values, size, width, target, tasks):
    for index in prange(tasks):
        for tile in _share(chunks.shape[0] * groups, index, tasks):
            place = decays, stride, head + tile % groups * members, chunks[tile // groups]
            at, extent = tile * size * members * width, size * members * width
            _since_tile(*place, part(values, at, extent), size, members, width, part(target, at, extent))


@kernel
def _mask(decays, stride, head, groups, members, chunks, pairs, size, target, tasks):
    for index in prange(tasks):
        products = np.empty(size, pairs.dtype)
        for number in _share(chunks.shape[0] * groups * members, index, tasks):
            tile, member, extent = number // members, number % members, size * size
            place = decays, stride, head + tile % groups * members + member, chunks[tile // groups]
            source = part(pairs, tile * extent, extent)
            _mask_tile(*place, source, size, products, part(target, number * extent, extent))


@kernel
def _unmask(decays, stride, head, groups, members, chunks, pairs, grad_pairs, size, inner, through, tasks):
    for index in prange(tasks):
        products = np.empty(size, pairs.dtype)
        for tile in _share(chunks.shape[0] * groups, index, tasks):
            own = part(inner, tile * size * size, size * size)
            _fill(cast(0, products[0]), own)
            for member in range(members):
                place = decays, stride, head + tile % groups * members + member, chunks[tile // groups]
                at, extent = (tile * members + member) * size * size, size * size
                both = part(pairs, at, extent), part(grad_pairs, at, extent)
                first = tile * size * members + member
                _unmask_tile(*place, *both, size, products, own, through, first, members)


@kernel
def _grade_decays(reading, received, writing, grad_writing, whole, size, members, width, through, tasks):
    for index in prange(tasks):
        for tile in _share(whole.size // members, index, tasks):
            extent = members * width
            for member in range(members):
                at = member * width
                total = whole[tile * members + member]
                for i in range(size):
                    row = tile * size + i
                    through[row * members + member] += total
                    total += _dot(
                        columns(writing, extent, row, at, width), columns(grad_writing, extent, row, at, width)
                    )
                total = cast(0, total)
                for i in range(size - 1, -1, -1):
                    row = tile * size + i
                    total += _dot(columns(reading, extent, row, at, width), columns(received, extent, row, at, width))
                    through[row * members + member] += total


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
    return solve((_Values, _Keys), q, k, v, log_decay, initial_state, cu_seqlens, scale, causal)


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
    return grade((_Values, _Keys), gradients, q, k, v, log_decay, initial_state, cu_seqlens, scale, causal)


class _Compiled(Solver):
    """Moves tiles and runs along the chunks; the chunks of all sequences make one row."""

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
        self.divide(len(sequence), max(1, TILES * self.threads // self.extent()))
        self.one = np.ones((), array(self.q.new_empty(0, dtype=self.dtype)).dtype)[()]

    def extent(self) -> int:
        """Elements that one head of a chunk takes."""
        return self.chunk * (2 * self.size + 2 * self.width + self.chunk) + self.size * self.width

    def load(self, x: Tensor, block: Block, factor: float = 1.0) -> Tensor:
        all_heads, width = x.shape[2:]
        shared = self.heads // all_heads
        tiles = self.tiles(block, self.chunk, width * (block.members if shared == 1 else 1))
        extent = self.chunk, width, array(tiles), self.threads
        _load(self.threads, array(x), all_heads, shared, self.one * factor, *self.place(block), *extent)
        return tiles

    def store(self, tiles: Tensor, block: Block, target: Tensor, factor: float = 1.0) -> None:
        all_heads, width = target.shape[2:]
        extent = self.chunk, width, array(target), all_heads, self.heads // all_heads
        _store(self.threads, array(tiles), self.one * factor, *self.place(block), *extent, self.threads)

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
            not self.joint,
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
        gradient = None if passing is None else self.tiles(block, block.members, self.size)
        _scan_back(
            self.threads,
            array(received),
            array(states),
            self.optional(passing),
            not self.joint,
            *self.sequential(block),
            array(carry),
            array(grad_final),
            array(grad_initial),
            self.optional(gradient),
            self.threads,
        )
        if gradient is None:
            return None
        return gradient.sum(2) if self.joint else gradient[:, 0]

    def tiles(self, block: Block, *shape: int) -> Tensor:
        """Memory for a block's tiles."""
        return self.q.new_empty((block.n_chunks * block.n_groups, *shape), dtype=self.dtype)

    def place(self, block: Block) -> tuple[Any, ...]:
        """The heads and the chunks of a block, for the kernels."""
        return block.heads.start, block.n_groups, block.members, self.table[block.chunks]

    def sequential(self, block: Block) -> tuple[Any, ...]:
        """The same, and the extents of the states, for the kernels that run along the chunks."""
        extent = self.heads, self.size, self.width
        return self.table[block.chunks], block.heads.start, block.n_groups, block.members, *extent

    def optional(self, tensor: Tensor | None) -> np.ndarray:
        """The memory of a tensor, or of none."""
        return np.empty(0, self.one.dtype) if tensor is None else array(tensor)


class _Values(_Compiled, ByValue):
    """With what :class:`ByValue` multiplies by decays."""

    def prepare(self, cu_seqlens: Tensor | None) -> None:
        super().prepare(cu_seqlens)
        if self.log_decay is not None:
            # exact to the rounding of the recurrence's own factors, however many are multiplied
            self.factors = array(self.log_decay.to(torch.float64).exp())
            self.stride = self.heads if self.log_decay.dim() == 3 else 0

    def extent(self) -> int:
        of_group = 4 * self.chunk * self.size * self.groups // self.heads
        return of_group + self.chunk * (4 * self.width + 2 * self.chunk) + 2 * self.size * self.width

    def decays(self, block: Block) -> Any:
        if self.log_decay is None:
            return None, None
        decays, passing = (self.factors, self.stride, *self.place(block)), self.tiles(block, block.members)
        _whole(self.threads, *decays, self.chunk, array(passing), self.threads)
        return decays, passing

    def until(self, block: Block, values: Tensor, decays: Any, in_place: bool = False) -> Tensor:
        target = values if in_place else torch.empty_like(values)
        _until(self.threads, *decays, array(values), self.chunk, self.width, array(target), self.threads)
        return target

    def since(self, block: Block, values: Tensor, decays: Any, in_place: bool = False) -> Tensor:
        target = values if in_place else torch.empty_like(values)
        _since(self.threads, *decays, array(values), self.chunk, self.width, array(target), self.threads)
        return target

    def mask(self, block: Block, pairs: Tensor, decays: Any) -> Tensor:
        # a single head takes the memory of the pairs
        target = pairs[:, None] if block.members == 1 else self.tiles(block, block.members, self.chunk, self.chunk)
        _mask(self.threads, *decays, array(pairs), self.chunk, array(target), self.threads)
        return target

    def unmask(self, block: Block, pairs: Tensor, grad_pairs: Tensor, decays: Any) -> tuple[Tensor, Tensor]:
        inner, through = self.tiles(block, self.chunk, self.chunk), self.tiles(block, self.chunk, block.members)
        both = array(pairs), array(grad_pairs), self.chunk
        _unmask(self.threads, *decays, *both, array(inner), array(through), self.threads)
        return inner, through

    def grade_decays(
        self, block: Block, through: Tensor, reads: tuple[Tensor, Tensor], writes: tuple[Tensor, Tensor], whole: Tensor
    ) -> Tensor:
        operands = map(array, (*reads, *writes, whole))
        extent = self.chunk, block.members, self.width
        _grade_decays(self.threads, *operands, *extent, array(through), self.threads)
        return through


class _Keys(_Compiled, ByKey):
    """With the pairs of :class:`ByKey`."""

    def fade(self, block: Block, k: Tensor) -> tuple[Any, Tensor, Tensor]:
        decays = array(self.tiles(block, self.chunk, self.size))
        head, groups, _, chunks = self.place(block)
        place = head, groups, chunks, self.chunk, self.size
        _load_decays(self.threads, array(self.log_decay), self.heads, self.one, *place, decays, self.threads)
        writing, passing = torch.empty_like(k), self.tiles(block, self.size)
        results = array(writing), array(passing), self.threads
        _fade_keys(self.threads, array(k), decays, len(k), self.chunk, self.size, *results)
        return decays, writing, passing

    def pairs(self, block: Block, q: Tensor, added: Added) -> tuple[Tensor, Tensor]:
        reading, pairs = torch.empty_like(q), self.tiles(block, 1, self.chunk, self.chunk)
        operands, extent = (array(q), array(added.k), added.decays), (len(q), self.chunk, self.size)
        _pair(self.threads, *operands, *extent, array(pairs), array(reading), self.threads)
        return pairs, reading

    def grade_pairs(
        self,
        added: Added,
        q: Tensor,
        reading: Tensor,
        grad_pairs: Tensor,
        grad_reading: Tensor,
        grad_writing: Tensor,
        grad_passing: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_q, grad_k, through = (torch.empty_like(q) for _ in range(3))
        operands, extent = (array(q), array(added.k), added.decays), (len(q), self.chunk, self.size)
        arriving = map(array, (grad_pairs, reading, added.writing, grad_reading, grad_writing, grad_passing))
        results = map(array, (grad_q, grad_k, through))
        _unpair(self.threads, *operands, *extent, *arriving, *results, self.threads)
        return grad_q, grad_k, through
