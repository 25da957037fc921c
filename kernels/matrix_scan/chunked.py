"""``matrix_scan`` and ``row_power`` by matrix products, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(matrix: Tensor, added: Tensor, first: Tensor) -> Tensor:
    """As the op ``matrix_scan_forward``."""
    states = torch.empty_like(added)
    before = None
    for index in range(len(added)):
        states[index] = added[index]
        if before is not None:
            kept = torch.where(first[index], 0, before)
            states[index].baddbmm_(matrix, kept)
        before = states[index]
    return states


def backward(grad_states: Tensor, matrix: Tensor, states: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """As the op ``matrix_scan_backward``."""
    grad_added = torch.empty_like(grad_states)
    arriving = None
    for index in reversed(range(len(states))):
        grad_added[index] = grad_states[index]
        if arriving is not None:
            # what the state behind this one made of it, unless that one is a sequence's first
            received = torch.bmm(matrix.mT, arriving)
            grad_added[index] += torch.where(first[index + 1], 0, received)
        arriving = grad_added[index]
    if len(states) < 2:
        return torch.zeros_like(matrix), grad_added
    before = torch.where(first[1:, None, None], 0, states[:-1])
    columns = (value.permute(1, 2, 0, 3).flatten(2) for value in (grad_added[1:], before))
    return torch.bmm(next(columns), next(columns).mT), grad_added


def _squares(matrix: Tensor, exponent: int) -> list[Tensor]:
    """Of the exponent's bits the powers, the last of them the highest that is needed."""
    found = [matrix]
    while len(found) < exponent.bit_length():
        found.append(torch.bmm(found[-1], found[-1]))
    return found


def power_forward(rows: Tensor, matrix: Tensor, exponent: int) -> Tensor:
    """As the op ``row_power_forward``."""
    result = rows[:, None].clone()
    for bit, power in enumerate(_squares(matrix, exponent)):
        if exponent >> bit & 1:
            result = torch.bmm(result, power)
    return result[:, 0]


def power_backward(gradient: Tensor, rows: Tensor, matrix: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """As the op ``row_power_backward``."""
    powers, before = _squares(matrix, exponent), []
    result = rows[:, None]
    for bit, power in enumerate(powers):
        before.append(result)
        if exponent >> bit & 1:
            result = torch.bmm(result, power)
    arriving, of_power = gradient[:, None], torch.zeros_like(matrix)
    for bit in reversed(range(len(powers))):
        power = powers[bit]
        if bit + 1 < len(powers):
            of_power = torch.bmm(of_power, power.mT) + torch.bmm(power.mT, of_power)
        if exponent >> bit & 1:
            of_power = of_power + torch.bmm(before[bit].mT, arriving)
            arriving = torch.bmm(arriving, power.mT)
    return arriving[:, 0].clone(), of_power
