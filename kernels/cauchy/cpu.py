"""``cauchy`` in Numba: the rows of ``chunked``, ``CHUNK`` nodes at a time, vectorised over the nodes.

Rows are made in float64 and rounded to the weights' precision, in the first-level cache, for ``POLES`` poles at a time;
each then serves ``SUMS`` sums at a time, so that more is computed than is loaded. The backward pass makes them again.
Poles and sums are brought to multiples of those by some of no weight.

Of a complex row the real part comes first, the imaginary part follows; of a pole's two rows P comes first.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seqzoo.kernels.cauchy.chunked import half_angles
from seqzoo.kernels.numba_math import cast
from seqzoo.kernels.numba_memory import part, read, write
from seqzoo.kernels.numba_runtime import array, function, kernel, reduction, threads_for

# nodes of a row, over which gradients are summed in the weights' precision before they are added in float64
CHUNK = 256
# poles and sums that are treated at once
POLES, SUMS = 2, 2


@function
def _clear(row):
    for j in range(row.size):
        row[j] = 0


@function
def _four(rows, index, count):
    """Four neighbouring rows, from one of so many."""
    at = index * CHUNK
    return (
        part(rows, at, count),
        part(rows, at + CHUNK, count),
        part(rows, at + 2 * CHUNK, count),
        part(rows, at + 3 * CHUNK, count),
    )


@function
def _tables(tables, total, start, count):
    return (
        part(tables, start, count),
        part(tables, total + start, count),
        part(tables, 2 * total + start, count),
        part(tables, 3 * total + start, count),
        part(tables, 4 * total + start, count),
    )


@function
def _alone(a, b, s, c):
    """A pole's P and Q at a node."""
    x, y = -a * c, s - b * c
    scale = 0.5 / (x * x + y * y)
    real, imag = (c * x + s * y) * scale, (s * x - c * y) * scale
    return real, imag, -imag, real


@function
def _pair(a, b, size, s2, c2, sc):
    """P and Q of a pole, whose square is ``size``, and its conjugate at a node."""
    x, y = size * c2 - s2, 2.0 * a * sc
    scale = 1.0 / (x * x + y * y)
    x, y = x * scale, y * scale
    real, imag = a * c2 + s2, (1.0 - a) * sc
    return -imag * y - real * x, imag * x - real * y, b * (sc * y - c2 * x), -b * (sc * x + c2 * y)


@function
def _make(a, b, pairs, tables, rows):
    """A pole's rows."""
    s, c, s2, c2, sc = tables
    p_real, p_imag, q_real, q_imag = rows
    size = a * a + b * b
    if pairs:
        for j in range(s.size):
            p, q, r, t = _pair(a, b, size, read(s2, j, 0), read(c2, j, 0), read(sc, j, 0))
            write(p_real, j, p, 1)
            write(p_imag, j, q, 2)
            write(q_real, j, r, 3)
            write(q_imag, j, t, 4)
    else:
        for j in range(s.size):
            p, q, r, t = _alone(a, b, read(s, j, 0), read(c, j, 0))
            write(p_real, j, p, 1)
            write(p_imag, j, q, 2)
            write(q_real, j, r, 3)
            write(q_imag, j, t, 4)


@function
def _move(p, q, r, t, u, v, x, y, c2, sc):
    """Half of what a pole receives at a node, of its P and Q and of U and V."""
    a, b = 0.5 * (p * p - q * q - r * r + t * t), p * q - r * t
    d, e = p * r - q * t, p * t + q * r
    # times k / 2
    a, b = c2 * a + sc * b, c2 * b - sc * a
    d, e = c2 * d + sc * e, c2 * e - sc * d
    return u * a + v * b + x * d + y * e, u * d + v * e - x * a - y * b


@reduction
def _grade(a, b, pairs, tables, both, rows):
    """A pole's gradient, of its U and V; makes its rows on the way."""
    s, c, s2, c2, sc = tables
    u_real, u_imag, v_real, v_imag = both
    p_real, p_imag, q_real, q_imag = rows
    size, real, imag = a * a + b * b, 0.0, 0.0
    if pairs:
        for j in range(s.size):
            p, q, r, t = _pair(a, b, size, read(s2, j, 0), read(c2, j, 0), read(sc, j, 0))
            u, v = cast(read(u_real, j, 5), p), cast(read(u_imag, j, 5), p)
            x, y = cast(read(v_real, j, 5), p), cast(read(v_imag, j, 5), p)
            more_real, more_imag = _move(p, q, r, t, u, v, x, y, read(c2, j, 0), read(sc, j, 0))
            real += more_real
            imag += more_imag
            write(p_real, j, p, 1)
            write(p_imag, j, q, 2)
            write(q_real, j, r, 3)
            write(q_imag, j, t, 4)
    else:
        for j in range(s.size):
            p, q, r, t = _alone(a, b, read(s, j, 0), read(c, j, 0))
            u, v = cast(read(u_real, j, 5), p), cast(read(u_imag, j, 5), p)
            x, y = cast(read(v_real, j, 5), p), cast(read(v_imag, j, 5), p)
            more_real, more_imag = _move(p, q, r, t, u, v, x, y, read(c2, j, 0), read(sc, j, 0))
            real += more_real
            imag += more_imag
            write(p_real, j, p, 1)
            write(p_imag, j, q, 2)
            write(q_real, j, r, 3)
            write(q_imag, j, t, 4)
    return 2.0 * real, 2.0 * imag


@function
def _weights_of(weights, shape, channel, m, pole):
    """Of two sums, real and imaginary parts of the weights of two poles."""
    _, number, size, _ = shape
    at = 2 * ((channel * number + m) * size + pole)
    return part(weights, at, 2 * POLES), part(weights, at + 2 * size, 2 * POLES)


@function
def _gather(weights, rows, sums):
    """Adds what two poles give to two sums."""
    (a0, b0, c0, d0), (a1, b1, c1, d1) = rows
    x0, y0, x1, y1 = sums
    u0, v0, u1, v1 = weights[0][0], weights[0][1], weights[0][2], weights[0][3]
    s0, t0, s1, t1 = weights[1][0], weights[1][1], weights[1][2], weights[1][3]
    for j in range(x0.size):
        a, b, c, d = read(a0, j, 0), read(b0, j, 0), read(c0, j, 0), read(d0, j, 0)
        e, f, g, h = read(a1, j, 0), read(b1, j, 0), read(c1, j, 0), read(d1, j, 0)
        write(x0, j, read(x0, j, 1) + u0 * a + v0 * c + u1 * e + v1 * g, 1)
        write(y0, j, read(y0, j, 2) + u0 * b + v0 * d + u1 * f + v1 * h, 2)
        write(x1, j, read(x1, j, 3) + s0 * a + t0 * c + s1 * e + t1 * g, 3)
        write(y1, j, read(y1, j, 4) + s0 * b + t0 * d + s1 * f + t1 * h, 4)


@reduction
def _weigh(sums, rows, grad_weights):
    """Adds what the weights of two poles receive from two sums."""
    (a0, b0, c0, d0), (a1, b1, c1, d1) = rows
    x0, y0, x1, y1 = sums
    u0 = cast(0, x0[0])
    v0, u1, v1, s0, t0, s1, t1 = u0, u0, u0, u0, u0, u0, u0
    for j in range(x0.size):
        x, y, p, q = read(x0, j, 0), read(y0, j, 0), read(x1, j, 0), read(y1, j, 0)
        a, b, c, d = read(a0, j, 0), read(b0, j, 0), read(c0, j, 0), read(d0, j, 0)
        u0, v0, s0, t0 = u0 + (x * a + y * b), v0 + (x * c + y * d), s0 + (p * a + q * b), t0 + (p * c + q * d)
        a, b, c, d = read(a1, j, 0), read(b1, j, 0), read(c1, j, 0), read(d1, j, 0)
        u1, v1, s1, t1 = u1 + (x * a + y * b), v1 + (x * c + y * d), s1 + (p * a + q * b), t1 + (p * c + q * d)
    first, second = grad_weights
    for index, value in enumerate((u0, v0, u1, v1)):
        first[index] += value
    for index, value in enumerate((s0, t0, s1, t1)):
        second[index] += value


@function
def _arrive(weights, index, sums, both):
    """Adds to U and V of a pole what two sums give."""
    x0, y0, x1, y1 = sums
    u_real, u_imag, v_real, v_imag = both
    u0, v0, u1, v1 = weights[0][2 * index], weights[0][2 * index + 1], weights[1][2 * index], weights[1][2 * index + 1]
    for j in range(x0.size):
        x, y, p, q = read(x0, j, 0), read(y0, j, 0), read(x1, j, 0), read(y1, j, 0)
        write(u_real, j, read(u_real, j, 1) + u0 * x + u1 * p, 1)
        write(u_imag, j, read(u_imag, j, 2) + u0 * y + u1 * q, 2)
        write(v_real, j, read(v_real, j, 3) + v0 * x + v1 * p, 3)
        write(v_imag, j, read(v_imag, j, 4) + v0 * y + v1 * q, 4)


@function
def _interleave(rows, index, sums):
    """Writes a sum, real and imaginary part side by side."""
    at, count = 2 * index * CHUNK, sums.size // 2
    real, imag = part(rows, at, count), part(rows, at + CHUNK, count)
    for j in range(count):
        write(sums, 2 * j, read(real, j, 0), 1)
        write(sums, 2 * j + 1, read(imag, j, 0), 1)


@function
def _separate(rows, index, grad):
    """Fetches a sum's gradient."""
    at, count = 2 * index * CHUNK, grad.size // 2
    real, imag = part(rows, at, count), part(rows, at + CHUNK, count)
    for j in range(count):
        write(real, j, read(grad, 2 * j, 0), 1)
        write(imag, j, read(grad, 2 * j + 1, 0), 2)


@function
def _sum_row(operands, shape, channel, start, scratch, sums):
    """All sums of a channel at the nodes of one row; of ``given`` sums, the others have no weight."""
    weights, poles, pairs, tables, given = operands
    _, number, size, total = shape
    made, held = scratch
    count = min(CHUNK, total - start)
    rows, here = (_four(made, 0, count), _four(made, 4, count)), _tables(tables, total, start, count)
    _clear(part(held, 0, 2 * number * CHUNK))
    for pole in range(0, size, POLES):
        for index in range(POLES):
            at = 2 * (channel * size + pole + index)
            _make(poles[at], poles[at + 1], pairs, here, rows[index])
        for m in range(0, number, SUMS):
            _gather(_weights_of(weights, shape, channel, m, pole), rows, _four(held, 2 * m, count))
    for m in range(given):
        target = part(sums, 2 * ((channel * given + m) * total + start), 2 * count)
        _interleave(held, m, target)


@function
def _grade_row(operands, shape, channel, bounds, start, scratch, grad, grad_weights, grad_poles):
    """Adds what some poles of a channel receive from the nodes of one row."""
    weights, poles, pairs, tables, given = operands
    _, number, size, total = shape
    made, held, gathered = scratch
    count = min(CHUNK, total - start)
    rows, here = (_four(made, 0, count), _four(made, 4, count)), _tables(tables, total, start, count)
    both = _four(gathered, 0, count)
    for m in range(given):
        source = part(grad, 2 * ((channel * given + m) * total + start), 2 * count)
        _separate(held, m, source)
    _clear(part(held, 2 * given * CHUNK, 2 * (number - given) * CHUNK))
    for pole in range(bounds[0], bounds[1], POLES):
        for index in range(POLES):
            at = 2 * (channel * size + pole + index)
            _clear(part(gathered, 0, 4 * CHUNK))
            for m in range(0, number, SUMS):
                _arrive(_weights_of(weights, shape, channel, m, pole), index, _four(held, 2 * m, count), both)
            real, imag = _grade(poles[at], poles[at + 1], pairs, here, both, rows[index])
            grad_poles[at] += real
            grad_poles[at + 1] += imag
        for m in range(0, number, SUMS):
            _weigh(_four(held, 2 * m, count), rows, _weights_of(grad_weights, shape, channel, m, pole))


@function
def _sum_rows(operands, shape, unit, stop, sums):
    rows, dtype = (shape[3] + CHUNK - 1) // CHUNK, operands[0].dtype
    scratch = np.empty(4 * POLES * CHUNK, dtype), np.empty(2 * shape[1] * CHUNK, dtype)
    for row in range(unit, stop):
        _sum_row(operands, shape, row // rows, row % rows * CHUNK, scratch, sums)


@function
def _grade_poles(operands, shape, unit, stop, grad, grad_weights, grad_poles):
    _, number, size, total = shape
    dtype, groups = operands[0].dtype, size // POLES
    made, held = np.empty(4 * POLES * CHUNK, dtype), np.empty(2 * number * CHUNK, dtype)
    scratch = made, held, np.empty(4 * CHUNK, dtype)
    while unit < stop:
        channel, first = unit // groups, unit % groups
        last = min(groups, first + stop - unit)
        for start in range(0, total, CHUNK):
            bounds = first * POLES, last * POLES
            _grade_row(operands, shape, channel, bounds, start, scratch, grad, grad_weights, grad_poles)
        unit += last - first


@kernel
def _forward(operands, shape, tasks, sums):
    for index in prange(tasks.size - 1):
        _sum_rows(operands, shape, tasks[index], tasks[index + 1], sums)


@kernel
def _backward(operands, shape, tasks, grad, grad_weights, grad_poles):
    for index in prange(tasks.size - 1):
        _grade_poles(operands, shape, tasks[index], tasks[index + 1], grad, grad_weights, grad_poles)


def forward(weights: Tensor, poles: Tensor, length: int, conjugate_pairs: bool) -> Tensor:
    """As the op ``cauchy_forward``."""
    operands, shape = _prepare(weights, poles, length, conjugate_pairs)
    width, _, _, total = shape
    sums = weights.new_empty((width, weights.shape[1], total))
    tasks = _tasks(width * -(-total // CHUNK), shape)
    _forward(tasks.size - 1, operands, shape, tasks, array(torch.view_as_real(sums)))
    return sums


def backward(
    grad_sums: Tensor, weights: Tensor, poles: Tensor, length: int, conjugate_pairs: bool
) -> tuple[Tensor, Tensor]:
    """As the op ``cauchy_backward``."""
    operands, shape = _prepare(weights, poles, length, conjugate_pairs)
    width, number, size, _ = shape
    grad_weights = torch.zeros((width, number, size), dtype=torch.complex128)
    grad_poles = torch.zeros((width, size), dtype=torch.complex128)
    # a pole's gradients are one task's, which adds row after row: the same bits on any number of threads
    tasks = _tasks(width * (size // POLES), shape)
    arriving, *to = (array(torch.view_as_real(tensor)) for tensor in (grad_sums, grad_weights, grad_poles))
    _backward(tasks.size - 1, operands, shape, tasks, arriving, *to)
    _, given, there = weights.shape
    return grad_weights[:, :given, :there].to(weights.dtype), grad_poles[:, :there].clone()


def _prepare(
    weights: Tensor, poles: Tensor, length: int, conjugate_pairs: bool
) -> tuple[tuple[object, ...], tuple[int, ...]]:
    """What both kernels read, and D, M, N and F, of which M and N are multiples."""
    width, given, size = weights.shape
    number, whole = -(-given // SUMS) * SUMS, -(-size // POLES) * POLES
    if (number, whole) != (given, size):
        padded = weights.new_zeros((width, number, whole))
        padded[:, :given, :size] = weights
        weights, poles = padded, torch.cat((poles, poles.new_full((width, whole - size), -1)), 1)
    tables = half_angles(length, weights.device)
    numbers = array(torch.view_as_real(weights)), array(torch.view_as_real(poles))
    operands = *numbers, conjugate_pairs, array(tables), given
    return operands, (width, number, whole, tables.shape[1])


def _tasks(units: int, shape: tuple[int, ...]) -> np.ndarray:
    """The first unit of every thread, and their number."""
    width, number, size, total = shape
    threads = threads_for(width * size * total * (2 + number))
    return np.array([units * cut // threads for cut in range(threads + 1)], dtype=np.int64)
