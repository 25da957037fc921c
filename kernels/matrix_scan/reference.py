"""The definition of ``matrix_scan`` and ``row_power``, in plain PyTorch: differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor


def matrix_scan(matrix: Tensor, added: Tensor, first: Tensor) -> Tensor:
    """As :func:`seqzoo.kernels.matrix_scan.matrix_scan`."""
    states, before = [], torch.zeros_like(added[0]) if len(added) else added.sum(0)
    for index in range(len(added)):
        before = matrix @ torch.where(first[index], 0, before) + added[index]
        states.append(before)
    return torch.stack(states) if states else added


def row_power(rows: Tensor, matrix: Tensor, exponent: int) -> Tensor:
    """As :func:`seqzoo.kernels.matrix_scan.row_power`."""
    for _ in range(exponent):
        rows = (rows[:, None] @ matrix)[:, 0]
    return rows
