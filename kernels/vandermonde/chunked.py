"""``vandermonde`` in PyTorch operations: any device, no compiler, and no matrix of all powers.

A position is ``l = i C + j`` with j below C, about the square root of the length, and its power the product of two from
tables of as many rows: ``exp(x l) = exp(x C i) exp(x j)``. The rows of a table are ``[Re, Im]`` of all N terms side by
side, so with the weights in the first one and the conjugate in the second a channel's kernel is one matrix product of
real numbers, ``Re(sum_n P_in Q_jn) = [Re P_i, Im P_i] . [Re Q_j, -Im Q_j]``. Backwards, with g cut like the kernel,

    U_i = sum_j conj(Q_j) g_ij,  V_j = sum_i conj(P_i) g_ij
    grad_weights = sum_i conj(P_i) U_i
    grad_exponents = conj(weights) (C sum_i i conj(P_i) U_i + sum_j j conj(Q_j) V_j)

are two such products and sums over rows, P now without the weights. Tables are made in double precision and rounded;
channels are taken in blocks whose tables stay in the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqzoo.kernels.vandermonde.op import real_dtype

# elements of the tables and kernels of a block of channels: on a CPU they stay in its caches, elsewhere they are many
CACHED, MANY = 1 << 19, 1 << 24

Tabulate = Callable[[Tensor, Tensor | None, int, int, torch.dtype], Tensor]
Contract = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward(exponents: Tensor, weights: Tensor, length: int) -> Tensor:
    """As the op ``vandermonde_forward``."""
    return evaluate(exponents, weights, length, tabulate)


def backward(grad: Tensor, exponents: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As the op ``vandermonde_backward``."""
    return grade(grad, exponents, weights, tabulate, contract)


def evaluate(exponents: Tensor, weights: Tensor, length: int, tabulate: Tabulate) -> Tensor:
    """The kernel, from tables as :func:`tabulate` makes them."""
    rows, columns = cut(length)
    dtype, conjugates = real_dtype(weights), torch.conj_physical(exponents)
    kernel = weights.new_empty((weights.shape[0], length), dtype=dtype)
    for block in blocks(exponents, rows, columns):
        coarse = tabulate(exponents[block], weights[block], columns, rows, dtype)
        fine = tabulate(conjugates[block], None, 1, columns, dtype)
        if rows * columns == length:
            torch.bmm(coarse, fine.mT, out=kernel[block].unflatten(1, (rows, columns)))
        else:
            kernel[block] = torch.bmm(coarse, fine.mT).flatten(1)[:, :length]
    return kernel


def grade(
    grad: Tensor, exponents: Tensor, weights: Tensor, tabulate: Tabulate, contract: Contract
) -> tuple[Tensor, Tensor]:
    """The gradients, from tables as :func:`tabulate` makes them and sums over their rows as :func:`contract` does."""
    length = grad.shape[1]
    rows, columns = cut(length)
    conjugates = torch.conj_physical(exponents)
    grad_exponents, grad_weights = torch.empty_like(exponents), torch.empty_like(weights)
    for block in blocks(exponents, rows, columns):
        coarse = tabulate(conjugates[block], None, columns, rows, grad.dtype)
        fine = tabulate(conjugates[block], None, 1, columns, grad.dtype)
        missing = rows * columns - length
        arriving = (pad(grad[block], (0, missing)) if missing else grad[block]).unflatten(1, (rows, columns))
        total, by_row = contract(coarse, torch.bmm(arriving, fine))
        _, by_column = contract(fine, torch.bmm(arriving.mT, coarse))
        grad_weights[block] = total
        grad_exponents[block] = torch.conj_physical(weights[block]) * by_row.mul_(columns).add_(by_column)
    return grad_exponents, grad_weights


def cut(length: int) -> tuple[int, int]:
    """Rows and columns of a kernel cut into rows of equal length, the last one perhaps shorter: about as many of each.

    Of columns a power of two: the product of an exponent with it is exact.
    """
    columns = 1 << (max(length - 1, 0).bit_length() + 1) // 2
    return -(-length // columns), columns


def blocks(exponents: Tensor, rows: int, columns: int) -> Iterator[slice]:
    """The channels, as many at a time as have tables and kernels of the right size together."""
    width, size = exponents.shape
    most = CACHED if exponents.device.type == "cpu" else MANY
    count = max(1, most // max(2 * size * (rows + columns) + rows * columns, 1))
    for first in range(0, width, count):
        yield slice(first, min(first + count, width))


def tabulate(exponents: Tensor, factors: Tensor | None, step: int, count: int, dtype: torch.dtype) -> Tensor:
    """``factors * exp(exponents * step * i)`` for i below ``count``: ``[Re, Im]``, ``(B, count, 2 N)``.

    Args:
        exponents: complex128 ``(B, N)``.
        factors: ``(B, N)``; 1 where None.
        step: Positions from row to row.
        count: The number of rows, which doubles until it is reached.
        dtype: The real dtype to which the rows are rounded.
    """
    powers = (torch.ones_like(exponents) if factors is None else factors.to(exponents.dtype))[:, None]
    while powers.shape[1] < count:
        more = powers[:, : count - powers.shape[1]]
        powers = torch.cat((powers, more * torch.exp(exponents * (step * powers.shape[1]))[:, None]), 1)
    return torch.cat((powers.real, powers.imag), -1)[:, :count].to(dtype)


def contract(table: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the rows of the products of a table's with those of another, and the same times the rows' numbers.

    Args:
        table: ``[Re, Im]``, ``(B, count, 2 N)``.
        values: The same of what it is multiplied by.

    Returns:
        The sums, complex128 ``(B, N)`` each.
    """
    one, other = (torch.complex(*half.chunk(2, -1)) for half in (table, values))
    products = (one * other).to(torch.complex128)
    numbers = torch.arange(table.shape[1], dtype=torch.float64, device=table.device)
    return products.sum(1), (products * numbers[:, None]).sum(1)
