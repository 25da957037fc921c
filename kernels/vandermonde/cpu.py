"""``vandermonde`` on the CPU: the products of :mod:`.chunked` on tables that Numba makes and sums.

A row of a table is the one before it times a factor, in double precision: a complex multiplication a power, where the
exponential would take ten times as long.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import prange
from torch import Tensor

from seqzoo.kernels.linear_scan.cpu import columns
from seqzoo.kernels.numba_memory import read, write
from seqzoo.kernels.numba_runtime import array, function, kernel, threads_for
from seqzoo.kernels.vandermonde.chunked import evaluate, grade


@function
def _begin(exponents, factors, step, state_re, state_im, factor_re, factor_im):
    """The first row, in double precision, and what leads from one to the next."""
    for n in range(exponents.size):
        decay, turn = math.exp(step * exponents[n].real), step * exponents[n].imag
        factor_re[n], factor_im[n] = decay * math.cos(turn), decay * math.sin(turn)
        state_re[n], state_im[n] = 1.0, 0.0
    for n in range(factors.size):
        state_re[n], state_im[n] = factors[n].real, factors[n].imag


@function
def _advance(state_re, state_im, factor_re, factor_im, to_re, to_im):
    for n in range(to_re.size):
        a, b = read(state_re, n, 0), read(state_im, n, 1)
        c, d = read(factor_re, n, 2), read(factor_im, n, 3)
        write(to_re, n, a, 4)
        write(to_im, n, b, 5)
        write(state_re, n, a * c - b * d, 0)
        write(state_im, n, a * d + b * c, 1)


@kernel
def _tabulate(exponents, factors, factor_width, step, channels, count, size, table, tasks):
    for task in prange(tasks):
        state_re, state_im, factor_re, factor_im = np.empty(size), np.empty(size), np.empty(size), np.empty(size)
        for channel in range(channels * task // tasks, channels * (task + 1) // tasks):
            given = columns(factors, factor_width, channel, 0, factor_width)
            of_channel = columns(exponents, size, channel, 0, size)
            _begin(of_channel, given, step, state_re, state_im, factor_re, factor_im)
            for row in range(channel * count, (channel + 1) * count):
                to_re, to_im = columns(table, 2 * size, row, 0, size), columns(table, 2 * size, row, size, size)
                _advance(state_re, state_im, factor_re, factor_im, to_re, to_im)


@function
def _add(number, table_re, table_im, values_re, values_im, total_re, total_im, late_re, late_im):
    for n in range(table_re.size):
        a, b = read(table_re, n, 0), read(table_im, n, 1)
        c, d = read(values_re, n, 2), read(values_im, n, 3)
        re, im = np.float64(a * c - b * d), np.float64(a * d + b * c)
        write(total_re, n, read(total_re, n, 4) + re, 4)
        write(total_im, n, read(total_im, n, 5) + im, 5)
        write(late_re, n, read(late_re, n, 6) + number * re, 6)
        write(late_im, n, read(late_im, n, 7) + number * im, 7)


@kernel
def _contract(table, values, channels, count, size, totals, tasks):
    for task in prange(tasks):
        for channel in range(channels * task // tasks, channels * (task + 1) // tasks):
            sums = 4 * channel
            total_re, total_im = columns(totals, size, sums, 0, size), columns(totals, size, sums + 1, 0, size)
            late_re, late_im = columns(totals, size, sums + 2, 0, size), columns(totals, size, sums + 3, 0, size)
            for index in range(count):
                row = channel * count + index
                _add(
                    float(index),
                    columns(table, 2 * size, row, 0, size),
                    columns(table, 2 * size, row, size, size),
                    columns(values, 2 * size, row, 0, size),
                    columns(values, 2 * size, row, size, size),
                    total_re,
                    total_im,
                    late_re,
                    late_im,
                )


def forward(exponents: Tensor, weights: Tensor, length: int) -> Tensor:
    """As the op ``vandermonde_forward``."""
    return evaluate(exponents, weights, length, tabulate)


def backward(grad: Tensor, exponents: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As the op ``vandermonde_backward``."""
    return grade(grad, exponents, weights, tabulate, contract)


def tabulate(exponents: Tensor, factors: Tensor | None, step: int, count: int, dtype: torch.dtype) -> Tensor:
    """As that of :mod:`.chunked`."""
    channels, size = exponents.shape
    table = exponents.new_empty((channels, count, 2 * size), dtype=dtype)
    threads = threads_for(table.numel())
    given, width = (exponents.new_empty(0), 0) if factors is None else (factors, size)
    _tabulate(threads, array(exponents), array(given), width, float(step), channels, count, size, array(table), threads)
    return table


def contract(table: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """As that of :mod:`.chunked`."""
    channels, count, size = table.shape[0], table.shape[1], table.shape[2] // 2
    totals = table.new_zeros((channels, 4, size), dtype=torch.float64)
    threads = threads_for(table.numel())
    _contract(threads, array(table), array(values), channels, count, size, array(totals), threads)
    return torch.complex(totals[:, 0], totals[:, 1]), torch.complex(totals[:, 2], totals[:, 3])
