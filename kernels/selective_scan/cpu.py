"""``selective_scan`` in Numba: blocks of channels, vectorised over channels, whose states stay in the near caches.

A block's states, rates and their gradients lie as N rows of channels, ``ROWS`` of them to a loop: N is filled up to a
multiple of that, the channels to one of ``LANES``, with zeros that stay zero. The backward pass runs each chunk of
tokens again from the state that entered it, keeping decays and states, and then back.

The columns of each group of B and C are divided into *parts*, the sequences into *slots*; a unit of work is a part of a
slot. The backward pass divides by the shapes alone, so that what it sums over units (the gradients of B and C over the
parts, those of A, D and the bias over the slots) has the same bits on any number of threads.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.dispatch import check_boundaries
from seqzoo.kernels.numba_math import cast, conjugate, exp_decay, sigmoid, softplus
from seqzoo.kernels.numba_memory import part, read, write
from seqzoo.kernels.numba_runtime import COLUMNS, array, cut_rows, function, kernel, reduction, threads_for
from seqzoo.kernels.selective_scan.op import CHUNK, n_chunk_states

ROWS, LANES = 4, 16
# numbers of a block's state. Forward the more columns the better, as rows are fetched ahead; backward a chunk's decays
# and states share a cache of 1 MiB
FORWARD, BACKWARD = 8192, 2048
# tokens whose share in A's gradient is summed in single precision
STRETCH = 16
# at most so many slots, of so many tokens or more
SLOTS, SLOT_TOKENS = 16, 128


@function
def _filled(count, multiple):
    return (count + multiple - 1) // multiple * multiple


@function
def _load(source, row, size, width, first, count, target, lanes):
    """Some columns of ``(rows, width, size)`` as rows of a block, filled up with zeros."""
    target[: _filled(size, ROWS) * lanes] = 0
    offset = (row * width + first) * size
    for left in range(0, count, LANES):
        for n in range(size):
            for j in range(left, min(left + LANES, count)):
                target[n * lanes + j] = source[offset + j * size + n]


@function
def _store(source, lanes, row, size, width, first, count, target):
    """A block's rows as some columns of ``(rows, width, size)``."""
    offset = (row * width + first) * size
    for left in range(0, count, LANES):
        for n in range(size):
            for j in range(left, min(left + LANES, count)):
                target[offset + j * size + n] = source[n * lanes + j]


@function
def _keep(h, lanes, row, size, width, first, count, chunk_states):
    """A block's rows as some columns of ``(chunks, size, width)``."""
    for n in range(size):
        target = part(chunk_states, (row * size + n) * width + first, count)
        for j in range(count):
            target[j] = h[n * lanes + j]


@function
def _recall(chunk_states, row, size, width, first, count, h, lanes):
    """The reverse of :func:`_keep`."""
    for n in range(size):
        source = part(chunk_states, (row * size + n) * width + first, count)
        for j in range(count):
            h[n * lanes + j] = source[j]


@function
def _first_chunk(bounds, sequence, total):
    """The row of ``chunk_states`` for a sequence's start; ``total`` is its length in a dense batch, -1 when packed."""
    return sequence * ((total + CHUNK - 1) // CHUNK) if total >= 0 else bounds[sequence] // CHUNK + sequence


@function
def _project(B, C, position, size, b, c):
    """The values of B and C at a token, and the square of B's norm."""
    norm = cast(0, b[0].real)
    for n in range(size):
        b[n] = read(B, position + n, 0)
        c[n] = read(C, position + n, 0)
        norm += (b[n] * conjugate(b[n])).real
    return norm


@function
def _enter(inputs, options, row, first, count, norm, rate, x, y, slope):
    """A token's step and what follows from it.

    Args:
        inputs: Of the kernels.
        options: Of the kernels.
        row: The token.
        first: The first column.
        count: The number of columns.
        norm: The square of B's norm.
        rate: Receives the step, for Longhorn eps.
        x: Receives what B is multiplied by.
        y: Receives D u.
        slope: Receives the derivative of the rate by delta; None where that is of no use.
    """
    u, delta, bias, D, _, _, _, _ = inputs
    width, _, _, _, _, delta_softplus, longhorn, _ = options
    values, raw = part(u, row * width + first, count), part(delta, row * width + first, count)
    biases, weights = part(bias, first, count), part(D, first, count)
    one = cast(1, norm)
    if delta_softplus:
        for j in range(count):
            write(rate, j, softplus(read(raw, j, 0) + read(biases, j, 0)), 1)
        if slope is not None:
            for j in range(count):
                write(slope, j, sigmoid(read(raw, j, 0) + read(biases, j, 0)), 2)
    else:
        for j in range(count):
            write(rate, j, read(raw, j, 0) + read(biases, j, 0), 1)
        if slope is not None:
            for j in range(count):
                write(slope, j, one, 2)
    if longhorn:
        for j in range(count):
            inverse = one / (one + read(rate, j, 1) * norm)
            write(rate, j, read(rate, j, 1) * inverse, 1)
            if slope is not None:
                write(slope, j, read(slope, j, 2) * inverse * inverse, 2)
    for j in range(count):
        value = read(values, j, 0)
        write(x, j, value * read(rate, j, 1), 3)
        write(y, j, value * read(weights, j, 0), 4)


@function
def _advance(rates, rate, x, b, c, h, y, lanes, size):
    """One token of the exponential transition, in place."""
    for n in range(0, size, ROWS):
        b0, b1, b2, b3 = b[n], b[n + 1], b[n + 2], b[n + 3]
        c0, c1, c2, c3 = c[n], c[n + 1], c[n + 2], c[n + 3]
        o0, o1, o2, o3 = n * lanes, (n + 1) * lanes, (n + 2) * lanes, (n + 3) * lanes
        for j in range(lanes):
            step, value = read(rate, j, 0), read(x, j, 0)
            h0 = exp_decay(step * read(rates, o0 + j, 0)) * read(h, o0 + j, 1) + b0 * value
            h1 = exp_decay(step * read(rates, o1 + j, 0)) * read(h, o1 + j, 2) + b1 * value
            h2 = exp_decay(step * read(rates, o2 + j, 0)) * read(h, o2 + j, 3) + b2 * value
            h3 = exp_decay(step * read(rates, o3 + j, 0)) * read(h, o3 + j, 4) + b3 * value
            write(h, o0 + j, h0, 1)
            write(h, o1 + j, h1, 2)
            write(h, o2 + j, h2, 3)
            write(h, o3 + j, h3, 4)
            out = (c0 * h0).real + (c1 * h1).real + ((c2 * h2).real + (c3 * h3).real)
            write(y, j, read(y, j, 5) + out, 5)


@function
def _advance_longhorn(rate, x, b, c, h, y, lanes, size):
    """One token of Longhorn's transition, in place."""
    one = cast(1, rate[0])
    for n in range(0, size, ROWS):
        b0, b1, b2, b3 = b[n], b[n + 1], b[n + 2], b[n + 3]
        c0, c1, c2, c3 = c[n], c[n + 1], c[n + 2], c[n + 3]
        o0, o1, o2, o3 = n * lanes, (n + 1) * lanes, (n + 2) * lanes, (n + 3) * lanes
        for j in range(lanes):
            step, value = read(rate, j, 0), read(x, j, 0)
            h0 = (one - step * (b0 * b0)) * read(h, o0 + j, 1) + b0 * value
            h1 = (one - step * (b1 * b1)) * read(h, o1 + j, 2) + b1 * value
            h2 = (one - step * (b2 * b2)) * read(h, o2 + j, 3) + b2 * value
            h3 = (one - step * (b3 * b3)) * read(h, o3 + j, 4) + b3 * value
            write(h, o0 + j, h0, 1)
            write(h, o1 + j, h1, 2)
            write(h, o2 + j, h2, 3)
            write(h, o3 + j, h3, 4)
            out = (c0 * h0).real + (c1 * h1).real + ((c2 * h2).real + (c3 * h3).real)
            write(y, j, read(y, j, 5) + out, 5)


@function
def _leave(inputs, options, row, first, count, y, out):
    """Writes a token's outputs, through the gate if there is one."""
    z, width, gated = inputs[4], options[0], options[7]
    target, one = part(out, row * width + first, count), cast(1, y[0])
    if gated:
        gate = part(z, row * width + first, count)
        for j in range(count):
            value = read(gate, j, 0) * one
            write(target, j, read(y, j, 0) * (value * sigmoid(value)), 1)
    else:
        for j in range(count):
            write(target, j, read(y, j, 0), 1)


@function
def _scan(inputs, options, bounds, unit, state, chunk_states, out):
    """Runs one unit; the states are replaced in place."""
    _, _, bias, _, _, A, B, C = inputs
    width, groups, size, total, block, _, longhorn, _ = options
    left, span, start, stop, group = unit[0], unit[1], unit[2], unit[3], unit[4]
    most, rows = _filled(min(span, block), LANES), _filled(size, ROWS)
    rates, h = np.empty(rows * most, A.dtype), np.empty(rows * most, A.dtype)
    b, c = np.zeros(rows, A.dtype), np.zeros(rows, A.dtype)
    rate, x, y = np.empty(most, bias.dtype), np.empty(most, bias.dtype), np.empty(most, bias.dtype)
    for offset in range(0, span, block):
        first, count = left + offset, min(block, span - offset)
        lanes = _filled(count, LANES)
        rate[:], x[:], y[:] = 0, 0, 0
        if not longhorn:
            _load(A, 0, size, width, first, count, rates, lanes)
        for sequence in range(start, stop):
            entrance, length = bounds[sequence], bounds[sequence + 1] - bounds[sequence]
            chunk = _first_chunk(bounds, sequence, total)
            _load(state, sequence, size, width, first, count, h, lanes)
            for index in range(length):
                if index % CHUNK == 0:
                    _keep(h, lanes, chunk + index // CHUNK, size, width, first, count, chunk_states)
                row = entrance + index
                norm = _project(B, C, (row * groups + group) * size, size, b, c)
                _enter(inputs, options, row, first, count, norm, rate, x, y, None)
                if longhorn:
                    _advance_longhorn(rate, x, b, c, h, y, lanes, rows)
                else:
                    _advance(rates, rate, x, b, c, h, y, lanes, rows)
                _leave(inputs, options, row, first, count, y, out)
            _store(h, lanes, sequence, size, width, first, count, state)


@kernel
def _forward(inputs, options, bounds, units, state, chunk_states, out):
    for index in prange(units.shape[0]):
        _scan(inputs, options, bounds, units[index], state, chunk_states, out)


@function
def _record(rates, rate, x, b, c, h, following, decays, y, lanes, size):
    """One token of the exponential transition, which keeps the decays and the states on both sides."""
    for n in range(0, size, ROWS):
        b0, b1, b2, b3 = b[n], b[n + 1], b[n + 2], b[n + 3]
        c0, c1, c2, c3 = c[n], c[n + 1], c[n + 2], c[n + 3]
        o0, o1, o2, o3 = n * lanes, (n + 1) * lanes, (n + 2) * lanes, (n + 3) * lanes
        for j in range(lanes):
            step, value = read(rate, j, 0), read(x, j, 0)
            a0 = exp_decay(step * read(rates, o0 + j, 0))
            a1 = exp_decay(step * read(rates, o1 + j, 0))
            a2 = exp_decay(step * read(rates, o2 + j, 0))
            a3 = exp_decay(step * read(rates, o3 + j, 0))
            write(decays, o0 + j, a0, 6)
            write(decays, o1 + j, a1, 7)
            write(decays, o2 + j, a2, 8)
            write(decays, o3 + j, a3, 9)
            h0 = a0 * read(h, o0 + j, 0) + b0 * value
            h1 = a1 * read(h, o1 + j, 0) + b1 * value
            h2 = a2 * read(h, o2 + j, 0) + b2 * value
            h3 = a3 * read(h, o3 + j, 0) + b3 * value
            write(following, o0 + j, h0, 1)
            write(following, o1 + j, h1, 2)
            write(following, o2 + j, h2, 3)
            write(following, o3 + j, h3, 4)
            out = (c0 * h0).real + (c1 * h1).real + ((c2 * h2).real + (c3 * h3).real)
            write(y, j, read(y, j, 5) + out, 5)


@function
def _record_longhorn(rate, x, b, c, h, following, y, lanes, size):
    """One token of Longhorn's transition, which keeps the states on both sides."""
    one = cast(1, rate[0])
    for n in range(size):
        factor, addend, weight, offset = b[n] * b[n], b[n], c[n], n * lanes
        for j in range(lanes):
            value = (one - read(rate, j, 0) * factor) * read(h, offset + j, 0) + addend * read(x, j, 0)
            write(following, offset + j, value, 1)
            write(y, j, read(y, j, 2) + (weight * value).real, 2)


@function
def _open(inputs, options, grad_y, row, first, count, y, g, grad_z):
    """A token's gradients by what the gate multiplies and by the gate."""
    z, width, gated = inputs[4], options[0], options[7]
    arriving, one = part(grad_y, row * width + first, count), cast(1, y[0])
    if gated:
        gate, to_gate = part(z, row * width + first, count), part(grad_z, row * width + first, count)
        for j in range(count):
            value, gradient = read(gate, j, 0) * one, read(arriving, j, 0) * one
            weight = sigmoid(value)
            write(g, j, gradient * (value * weight), 1)
            write(to_gate, j, gradient * read(y, j, 0) * (weight + value * weight * (one - weight)), 2)
    else:
        for j in range(count):
            write(g, j, read(arriving, j, 0), 1)


@reduction
def _retreat(rates, token, b, c, h, following, decays, carry, to_rates, to_b, to_c, lanes, size):
    """One token back: updates what runs along, adds to the gradients of A, and writes those of B, C, x and the rate."""
    rate, x, g, to_x, to_rate = token
    for n in range(0, size, ROWS):
        b0, b1, b2, b3 = conjugate(b[n]), conjugate(b[n + 1]), conjugate(b[n + 2]), conjugate(b[n + 3])
        c0, c1, c2, c3 = conjugate(c[n]), conjugate(c[n + 1]), conjugate(c[n + 2]), conjugate(c[n + 3])
        o0, o1, o2, o3 = n * lanes, (n + 1) * lanes, (n + 2) * lanes, (n + 3) * lanes
        s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = cast(0, b0)
        for j in range(lanes):
            step, value, weight = read(rate, j, 0), read(x, j, 0), read(g, j, 0)
            d0 = read(carry, o0 + j, 1) + c0 * weight
            d1 = read(carry, o1 + j, 2) + c1 * weight
            d2 = read(carry, o2 + j, 3) + c2 * weight
            d3 = read(carry, o3 + j, 4) + c3 * weight
            s0 += d0 * value
            s1 += d1 * value
            s2 += d2 * value
            s3 += d3 * value
            t0 += conjugate(read(following, o0 + j, 0)) * weight
            t1 += conjugate(read(following, o1 + j, 0)) * weight
            t2 += conjugate(read(following, o2 + j, 0)) * weight
            t3 += conjugate(read(following, o3 + j, 0)) * weight
            write(to_x, j, read(to_x, j, 9) + ((b0 * d0).real + (b1 * d1).real + ((b2 * d2).real + (b3 * d3).real)), 9)
            d0 *= conjugate(read(decays, o0 + j, 0))
            d1 *= conjugate(read(decays, o1 + j, 0))
            d2 *= conjugate(read(decays, o2 + j, 0))
            d3 *= conjugate(read(decays, o3 + j, 0))
            write(carry, o0 + j, d0, 1)
            write(carry, o1 + j, d1, 2)
            write(carry, o2 + j, d2, 3)
            write(carry, o3 + j, d3, 4)
            d0 *= conjugate(read(h, o0 + j, 0))
            d1 *= conjugate(read(h, o1 + j, 0))
            d2 *= conjugate(read(h, o2 + j, 0))
            d3 *= conjugate(read(h, o3 + j, 0))
            write(to_rates, o0 + j, read(to_rates, o0 + j, 5) + d0 * step, 5)
            write(to_rates, o1 + j, read(to_rates, o1 + j, 6) + d1 * step, 6)
            write(to_rates, o2 + j, read(to_rates, o2 + j, 7) + d2 * step, 7)
            write(to_rates, o3 + j, read(to_rates, o3 + j, 8) + d3 * step, 8)
            out0 = (d0 * conjugate(read(rates, o0 + j, 0))).real + (d1 * conjugate(read(rates, o1 + j, 0))).real
            out1 = (d2 * conjugate(read(rates, o2 + j, 0))).real + (d3 * conjugate(read(rates, o3 + j, 0))).real
            write(to_rate, j, read(to_rate, j, 10) + (out0 + out1), 10)
        to_b[n], to_b[n + 1], to_b[n + 2], to_b[n + 3] = s0, s1, s2, s3
        to_c[n], to_c[n + 1], to_c[n + 2], to_c[n + 3] = t0, t1, t2, t3


@reduction
def _retreat_longhorn(token, b, c, h, following, carry, to_b, to_c, lanes, size):
    """As :func:`_retreat`, without what reaches B through its norm."""
    rate, x, g, to_x, to_rate = token
    one, two = cast(1, rate[0]), cast(2, rate[0])
    for n in range(size):
        addend, weight, offset = b[n], c[n], n * lanes
        factor = addend * addend
        by_decay = by_input = of_c = cast(0, addend)
        for j in range(lanes):
            d = read(carry, offset + j, 1) + weight * read(g, j, 0)
            by_input += d * read(x, j, 0)
            of_c += read(following, offset + j, 0) * read(g, j, 0)
            write(to_x, j, read(to_x, j, 2) + (addend * d).real, 2)
            write(carry, offset + j, d * (one - read(rate, j, 0) * factor), 1)
            d *= read(h, offset + j, 0)
            write(to_rate, j, read(to_rate, j, 3) - (factor * d).real, 3)
            by_decay += d * read(rate, j, 0)
        to_b[n], to_c[n] = by_input - two * addend * by_decay, of_c


@reduction
def _through_norm(rate, to_rate, b, to_b, lanes, size):
    """Adds what reaches B through its norm, of which eps depends by -eps^2."""
    total = cast(0, rate[0])
    for j in range(lanes):
        total += read(to_rate, j, 0) * read(rate, j, 0) * read(rate, j, 0)
    for n in range(size):
        to_b[n] -= cast(2, total) * b[n] * total


@function
def _finish(inputs, options, row, first, count, token, slope, grad_u, grad_delta, sum_D, sum_bias):
    """Writes a token's gradients of u and delta, adds to those of D and the bias, and completes that of the rate."""
    u, D, width = inputs[0], inputs[3], options[0]
    rate, _, g, to_x, to_rate = token
    values, weights = part(u, row * width + first, count), part(D, first, count)
    to_u, to_delta = part(grad_u, row * width + first, count), part(grad_delta, row * width + first, count)
    for j in range(count):
        value, gradient, of_x = read(values, j, 0), read(g, j, 0), read(to_x, j, 0)
        write(to_u, j, of_x * read(rate, j, 0) + gradient * read(weights, j, 0), 1)
        write(sum_D, j, read(sum_D, j, 2) + gradient * value, 2)
        of_rate = read(to_rate, j, 3) + of_x * value
        write(to_rate, j, of_rate, 3)
        of_delta = of_rate * read(slope, j, 0)
        write(to_delta, j, of_delta, 4)
        write(sum_bias, j, read(sum_bias, j, 5) + of_delta, 5)


@function
def _flush(single, double):
    """Moves sums on to those in double precision."""
    for j in range(single.size):
        write(double, j, read(double, j, 0) + read(single, j, 1), 0)
    single[:] = 0


@function
def _grade(inputs, options, bounds, unit, grad_y, chunk_states, carries, gradients, sums, partials):
    """Runs one unit back; the gradients of the states are replaced in place."""
    _, _, bias, _, _, A, B, C = inputs
    width, groups, size, total, block, _, longhorn, _ = options
    left, span, start, stop, group, piece, slot = unit[0], unit[1], unit[2], unit[3], unit[4], unit[5], unit[6]
    grad_u, grad_delta, grad_z = gradients
    sums_A, sums_D, sums_bias = sums
    partial_B, partial_C = partials
    most, rows, number, real = _filled(min(span, block), LANES), _filled(size, ROWS), A.dtype, bias.dtype
    states, decays = np.empty((CHUNK + 1) * rows * most, number), np.empty(CHUNK * rows * most, number)
    all_b, all_c = np.zeros(CHUNK * rows, number), np.zeros(CHUNK * rows, number)
    all_rate, all_x = np.empty(CHUNK * most, real), np.empty(CHUNK * most, real)
    all_g, all_slope = np.empty(CHUNK * most, real), np.empty(CHUNK * most, real)
    y, to_x, to_rate = np.empty(most, real), np.empty(most, real), np.empty(most, real)
    to_b, to_c = np.empty(rows, number), np.empty(rows, number)
    for offset in range(0, span, block):
        first, count = left + offset, min(block, span - offset)
        lanes = _filled(count, LANES)
        area = rows * lanes
        states[:area], all_rate[:], all_x[:], all_g[:], all_slope[:], y[:] = 0, 0, 0, 0, 0, 0
        rates, carry, to_rates = np.empty(area, number), np.empty(area, number), np.zeros(area, number)
        sum_rates, sum_D, sum_bias = np.zeros(area, sums_A.dtype), np.zeros(count), np.zeros(count)
        if not longhorn:
            _load(A, 0, size, width, first, count, rates, lanes)
        for sequence in range(start, stop):
            entrance, length = bounds[sequence], bounds[sequence + 1] - bounds[sequence]
            kept = _first_chunk(bounds, sequence, total)
            _load(carries, sequence, size, width, first, count, carry, lanes)
            for chunk in range((length - 1) // CHUNK, -1, -1):
                _recall(chunk_states, kept + chunk, size, width, first, count, states, lanes)
                begin, tokens = entrance + chunk * CHUNK, min(CHUNK, length - chunk * CHUNK)
                for index in range(tokens):
                    row, place = begin + index, index * lanes
                    b, c = part(all_b, index * rows, rows), part(all_c, index * rows, rows)
                    rate, x = part(all_rate, place, lanes), part(all_x, place, lanes)
                    g, slope = part(all_g, place, lanes), part(all_slope, place, lanes)
                    h, following = part(states, index * area, area), part(states, (index + 1) * area, area)
                    norm = _project(B, C, (row * groups + group) * size, size, b, c)
                    _enter(inputs, options, row, first, count, norm, rate, x, y, slope)
                    if longhorn:
                        _record_longhorn(rate, x, b, c, h, following, y, lanes, rows)
                    else:
                        factors = part(decays, index * area, area)
                        _record(rates, rate, x, b, c, h, following, factors, y, lanes, rows)
                    _open(inputs, options, grad_y, row, first, count, y, g, grad_z)
                for index in range(tokens - 1, -1, -1):
                    row, place = begin + index, index * lanes
                    b, c = part(all_b, index * rows, rows), part(all_c, index * rows, rows)
                    rate, x = part(all_rate, place, lanes), part(all_x, place, lanes)
                    g, slope = part(all_g, place, lanes), part(all_slope, place, lanes)
                    h, following = part(states, index * area, area), part(states, (index + 1) * area, area)
                    to_x[:lanes], to_rate[:lanes] = 0, 0
                    token = rate, x, g, to_x, to_rate
                    if longhorn:
                        _retreat_longhorn(token, b, c, h, following, carry, to_b, to_c, lanes, rows)
                    else:
                        factors = part(decays, index * area, area)
                        _retreat(rates, token, b, c, h, following, factors, carry, to_rates, to_b, to_c, lanes, rows)
                        if index % STRETCH == 0:
                            _flush(to_rates, sum_rates)
                    _finish(inputs, options, row, first, count, token, slope, grad_u, grad_delta, sum_D, sum_bias)
                    if longhorn:
                        _through_norm(rate, to_rate, b, to_b, lanes, rows)
                    # no other unit has both this part and this token
                    position = (piece * bounds[-1] * groups + row * groups + group) * size
                    for n in range(size):
                        partial_B[position + n] += to_b[n]
                        partial_C[position + n] += to_c[n]
            _store(carry, lanes, sequence, size, width, first, count, carries)
        if not longhorn:
            _store(sum_rates, lanes, slot, size, width, first, count, sums_A)
        for j in range(count):
            sums_D[slot * width + first + j], sums_bias[slot * width + first + j] = sum_D[j], sum_bias[j]


@kernel
def _backward(inputs, options, bounds, units, grad_y, chunk_states, carries, gradients, sums, partials):
    for index in prange(units.shape[0]):
        _grade(inputs, options, bounds, units[index], grad_y, chunk_states, carries, gradients, sums, partials)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``selective_scan_forward``."""
    check_boundaries(cu_seqlens, u.shape[1])
    size, dtype = B.shape[3], accumulator(B.dtype)
    shape = (u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, u.shape[2], size)
    state = u.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.clone()
    y = u.new_empty(u.shape)
    allocate = u.new_empty if cu_seqlens is None else u.new_zeros  # packed, some rows belong to no chunk
    chunk_states = allocate((n_chunk_states(u, cu_seqlens, "cpu"), size, u.shape[2]), dtype=dtype)
    threads = threads_for(u.numel() * size)
    bounds, units = _forward_units(u, B, cu_seqlens, threads)
    inputs = _inputs(u, delta, A, B, C, D, z, delta_bias)
    options = _options(u, A, B, z, cu_seqlens, delta_softplus, FORWARD)
    _forward(
        min(threads, max(1, len(units))), inputs, options, bounds, units, array(state), array(chunk_states), array(y)
    )
    return y, state, chunk_states


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    chunk_states: Tensor,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    """As the op ``selective_scan_backward``."""
    check_boundaries(cu_seqlens, u.shape[1])
    width, size = u.shape[2], B.shape[3]
    bounds, units = _backward_units(u, B, cu_seqlens)
    parts, slots = (int(units[:, column].max(initial=-1)) + 1 for column in (5, 6))
    grad_state = grad_final_state.clone()
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_z = u.new_empty(0) if z is None else torch.empty_like(z)
    wide = torch.complex128 if B.is_complex() else torch.float64
    sums_A = u.new_empty((slots, 0 if A is None else width, size), dtype=wide)
    sums_D, sums_bias = (u.new_empty((slots, width), dtype=torch.float64) for _ in range(2))
    grad_B, grad_C = (u.new_zeros((parts, *B.shape), dtype=accumulator(B.dtype)) for _ in range(2))
    _backward(
        min(threads_for(u.numel() * size), max(1, len(units))),
        _inputs(u, delta, A, B, C, D, z, delta_bias),
        _options(u, A, B, z, cu_seqlens, delta_softplus, BACKWARD),
        bounds,
        units,
        array(grad_y),
        array(chunk_states),
        array(grad_state),
        (array(grad_u), array(grad_delta), array(grad_z)),
        (array(sums_A), array(sums_D), array(sums_bias)),
        (array(grad_B), array(grad_C)),
    )
    return (
        grad_u,
        grad_delta,
        u.new_empty(0) if A is None else _summed(sums_A, A),
        _summed(grad_B, B),
        _summed(grad_C, C),
        u.new_empty(0) if D is None else _summed(sums_D, D),
        grad_z,
        u.new_empty(0) if delta_bias is None else _summed(sums_bias, delta_bias),
        grad_state,
    )


def _summed(sums: Tensor, like: Tensor) -> Tensor:
    """The sum over the first dimension as a gradient; NumPy adds one after another, on one thread."""
    total = sums[0] if len(sums) == 1 else torch.from_numpy(sums.numpy().sum(axis=0))
    return total.to(like.dtype)


def _inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> tuple[np.ndarray, ...]:
    """What the kernels read: parameters in the dtype of computation, zeros for those that are not given.

    Complex numbers are computed in double precision: their exponentials do not vectorise, and a slow rotation makes the
    gradient of the step ill-conditioned.
    """
    real = torch.float64 if B.is_complex() else accumulator(u.dtype)
    number = torch.complex128 if B.is_complex() else real

    def vector(value: Tensor | None) -> np.ndarray:
        return array(u.new_zeros(u.shape[2], dtype=real) if value is None else value.to(real))

    rates = B.new_empty(0, dtype=number) if A is None else A.to(number)
    gate = u if z is None else z
    return array(u), array(delta), vector(delta_bias), vector(D), array(gate), array(rates), array(B), array(C)


def _options(
    u: Tensor,
    A: Tensor | None,
    B: Tensor,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    numbers: int,
) -> tuple[Any, ...]:
    """Width, groups, N, tokens of a dense sequence or -1, columns of a block, softplus, Longhorn, gated."""
    groups, size = B.shape[2:]
    total = u.shape[1] if cu_seqlens is None else -1
    return u.shape[2], groups, size, total, _columns(numbers, size), delta_softplus, A is None, z is not None


def _forward_units(u: Tensor, B: Tensor, cu_seqlens: Tensor | None, threads: int) -> tuple[np.ndarray, ...]:
    """Boundaries and units of the forward pass, which sums over none: as many as there are threads."""
    groups = B.shape[2]
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = min(threads, max(1, rows))
    parts = min(-(-threads // (slots * groups)), -(-u.shape[2] // (groups * COLUMNS)))
    return _division(u, cu_seqlens, groups, slots, max(1, parts))


def _backward_units(u: Tensor, B: Tensor, cu_seqlens: Tensor | None) -> tuple[np.ndarray, ...]:
    """Boundaries and units of the backward pass, by the shapes alone."""
    groups, size = B.shape[2:]
    batch, total, width = u.shape
    columns = width // groups
    # the parts' gradients of B and C together hold at most half as many numbers as u
    parts = max(1, min(-(-columns // _columns(BACKWARD, size)), columns // (4 * max(1, size))))
    slots = max(1, min(SLOTS, batch * total // SLOT_TOKENS))
    return _division(u, cu_seqlens, groups, slots, parts)


def _columns(numbers: int, size: int) -> int:
    """How many columns of a state of so many rows are treated at once."""
    return max(LANES, numbers // max(ROWS, size) // LANES * LANES)


def _division(
    u: Tensor, cu_seqlens: Tensor | None, groups: int, slots: int, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Divides the work into at most so many slots and parts.

    Returns:
        bounds: int64 ``(S + 1,)``, the first row of each sequence, then the number of rows.
        units: int64 ``(n, 7)``: first column, number of columns, first sequence, one beyond the last sequence, group of
            B, part of the group, slot.
    """
    batch, total, width = u.shape
    if cu_seqlens is None:
        return _dense_division(batch, total, width, groups, slots, parts)
    bounds = cu_seqlens.numpy().astype(np.int64)
    return bounds, _units(bounds, width, groups, slots, parts)


@lru_cache(maxsize=128)
def _dense_division(
    batch: int, total: int, width: int, groups: int, slots: int, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    bounds = np.arange(batch + 1, dtype=np.int64) * total
    return bounds, _units(bounds, width, groups, slots, parts)


def _units(bounds: np.ndarray, width: int, groups: int, slots: int, parts: int) -> np.ndarray:
    columns = width // groups
    wide = columns if parts == 1 else -(-columns // (parts * LANES)) * LANES
    cuts = cut_rows(bounds, slots).tolist() if bounds.size > 1 and width else [0]
    units = [
        (group * columns + first, min(wide, columns - first), start, stop, group, first // wide, slot)
        for slot, (start, stop) in enumerate(itertools.pairwise(cuts))
        for group in range(groups)
        for first in range(0, columns, wide)
    ]
    return np.array(units, dtype=np.int64).reshape(-1, 7)
