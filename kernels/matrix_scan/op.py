"""Recurrences by a dense matrix that does not depend on time: what S4 needs where its states are not diagonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.derivatives import needs_gradient, once
from seqzoo.kernels.dispatch import define, slot


def matrix_scan(matrix: Tensor, added: Tensor, first: Tensor) -> Tensor:
    """``h_n = matrix h_{n-1} + added_n``, where ``h_{n-1}`` counts as zero for a sequence's first.

    Called with arguments that :func:`seqzoo.ops.ssm_scan` made. Differentiable once, in ``matrix`` and ``added``.

    Args:
        matrix: ``(D, S, S)``, real.
        added: ``(n, D, S, R)``: n steps of R rows beside each other.
        first: ``(n, R)``, bool: whether a sequence begins there.

    Returns:
        h: ``(n, D, S, R)``.
    """
    if slot.backend == "reference":
        from seqzoo.kernels.matrix_scan import reference

        return reference.matrix_scan(matrix, added, first)
    if not needs_gradient(matrix, added):
        return _forward(matrix, added, first, "")
    return _MatrixScan.apply(matrix, added, first, "")


def row_power(rows: Tensor, matrix: Tensor, exponent: int) -> Tensor:
    """``rows matrix^exponent`` by repeated squaring, ``log2(exponent)`` products of matrices.

    Called with arguments that :func:`seqzoo.ops.ssm_kernel` made. Differentiable once, in ``rows`` and ``matrix``.

    Args:
        rows: ``(D, S)``, real.
        matrix: ``(D, S, S)``.
        exponent: Not negative.

    Returns:
        ``(D, S)``.
    """
    if slot.backend == "reference":
        from seqzoo.kernels.matrix_scan import reference

        return reference.row_power(rows, matrix, exponent)
    if not needs_gradient(rows, matrix):
        return _power_forward(rows, matrix, exponent, "")
    return _RowPower.apply(rows, matrix, exponent, "")


def _forward_fake(matrix: Tensor, added: Tensor, first: Tensor, backend: str) -> Tensor:
    return torch.empty_like(added, memory_format=torch.contiguous_format)


def _backward_fake(
    grad_states: Tensor, matrix: Tensor, states: Tensor, first: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(matrix, memory_format=contiguous), torch.empty_like(states, memory_format=contiguous)


def _power_forward_fake(rows: Tensor, matrix: Tensor, exponent: int, backend: str) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _power_backward_fake(
    gradient: Tensor, rows: Tensor, matrix: Tensor, exponent: int, backend: str
) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(rows, memory_format=contiguous), torch.empty_like(matrix, memory_format=contiguous)


_forward = define(
    "matrix_scan", "forward", "(Tensor matrix, Tensor added, Tensor first, str backend) -> Tensor", _forward_fake
)
_backward = define(
    "matrix_scan",
    "backward",
    "(Tensor grad_states, Tensor matrix, Tensor states, Tensor first, str backend)"
    " -> (Tensor grad_matrix, Tensor grad_added)",
    _backward_fake,
)
_power_forward = define(
    "matrix_scan",
    "power_forward",
    "(Tensor rows, Tensor matrix, SymInt exponent, str backend) -> Tensor",
    _power_forward_fake,
)
_power_backward = define(
    "matrix_scan",
    "power_backward",
    "(Tensor gradient, Tensor rows, Tensor matrix, SymInt exponent, str backend)"
    " -> (Tensor grad_rows, Tensor grad_matrix)",
    _power_backward_fake,
)


class _MatrixScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, added: Tensor, first: Tensor, backend: str) -> Tensor:
        states = _forward(matrix, added, first, backend)
        ctx.save_for_backward(matrix, states, first)
        ctx.backend = backend
        return states

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        matrix, states, first = ctx.saved_tensors
        return *_backward(gradients[0], matrix, states, first, ctx.backend), None, None


class _RowPower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, exponent: int, backend: str) -> Tensor:
        ctx.save_for_backward(rows, matrix)
        ctx.exponent, ctx.backend = exponent, backend
        return _power_forward(rows, matrix, exponent, backend)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        rows, matrix = ctx.saved_tensors
        return *_power_backward(gradients[0], rows, matrix, ctx.exponent, ctx.backend), None, None
