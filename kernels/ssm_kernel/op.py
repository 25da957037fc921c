"""The public ``ssm_kernel``: its documentation and the formulas between its parameters and the ops that sum them up."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.cauchy import cauchy
from seqzoo.kernels.checks import COMPLEX_OF
from seqzoo.kernels.derivatives import needs_gradient, once
from seqzoo.kernels.dispatch import define, require, slot
from seqzoo.kernels.matrix_scan import row_power
from seqzoo.kernels.ssm_kernel.discretise import (
    REAL_OF,
    StateSpace,
    as_reader,
    diagonal_steps,
    from_reader,
    low_rank_steps,
    state_space,
)
from seqzoo.kernels.vandermonde import vandermonde


def ssm_kernel(
    poles: Tensor,
    b: Tensor,
    c: Tensor,
    step: Tensor,
    length: int,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    discretisation: str = "zoh",
    conjugate_pairs: bool = False,
) -> Tensor:
    """The convolution kernel of state spaces ``x' = A x + b u``, ``y = Re(c x)``, one a channel, in steps.

    ``K_l = Re(c A_d^l b_d)`` with A_d and b_d the discretised A and b. A is ``diag(poles)``, as in S4D
    (https://arxiv.org/abs/2206.11893, section 3), and the kernel a product with a Vandermonde matrix; or
    ``diag(poles) - sum_r p_r q_r^*``, as in S4 (https://arxiv.org/abs/2111.00396, section 3), and its generating
    function a few products with a Cauchy matrix. Neither matrix is ever stored. Powers and nodes are made in float64.
    c is that of the state space: it is truncated here, for the length asked for.

    Args:
        poles: ``(D, N)``, complex64 or complex128, with real parts that are not positive.
        b: ``(D, N)``, of the poles' dtype, as all that follow.
        c: ``(D, N)``, a row: it is not conjugated.
        step: ``(D,)``, real, positive: the time between two tokens.
        length: How many taps.
        low_rank: p and q, each ``(D, N)`` or ``(D, R, N)``; q is conjugated. Needs ``"bilinear"``.
        discretisation: ``"zoh"``, where the input is constant between tokens: ``A_d = exp(step A)``; or ``"bilinear"``,
            ``A_d = (I - step / 2 A)^-1 (I + step / 2 A)``.
        conjugate_pairs: Whether the N states stand for 2 N: all that is given, and its conjugate. Every sum over states
            then has both, and is real.

    Returns:
        kernel: ``(D, length)``, float32, or float64 for complex128.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If shapes or devices disagree, the discretisation is unknown, or it is not ``"bilinear"`` with a low
            rank; under ``seqzoo.ops.checks`` if a pole's real part is positive or a step not.
        RuntimeError: If an implementation asked for by name cannot run; if it is differentiated twice, forward or under
            ``torch.func``, which ``backend("reference")`` allows.

    Example:
        >>> import torch
        >>> from seqzoo.ops import ssm_kernel
        >>> poles, ones = torch.full((1, 1), -1.0 + 0j), torch.ones(1, 1, dtype=torch.complex64)
        >>> ssm_kernel(poles, ones, ones, torch.full((1,), 0.5), 3, discretisation="bilinear")
        tensor([[0.4000, 0.2400, 0.1440]])
    """
    space = state_space(poles, b, c, step, low_rank, discretisation, conjugate_pairs)
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"length must be an int, got {type(length).__name__}")
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    if slot.backend == "reference":
        from seqzoo.kernels.ssm_kernel import reference

        return reference.ssm_kernel(narrowed(space, poles.dtype), length).to(REAL_OF[poles.dtype])
    require(poles.device, poles.dtype == torch.complex128)
    if space.low_rank is None:
        exponents, inputs = diagonal_steps(space)
        return vandermonde(exponents, (space.readout * inputs).to(poles.dtype), length)
    if length == 0 or poles.numel() == 0:
        return poles.real.new_zeros((poles.shape[0], length))
    return _low_rank_kernel(space, length, poles.dtype)


def narrowed(space: StateSpace, dtype: torch.dtype) -> StateSpace:
    """The space in the precision that it was given in, for what the tolerance is derived from."""
    pair = None if space.low_rank is None else (space.low_rank[0].to(dtype), space.low_rank[1].to(dtype))
    return space._replace(
        poles=space.poles.to(dtype),
        b=space.b.to(dtype),
        c=space.c.to(dtype),
        step=space.step.to(REAL_OF[dtype]),
        low_rank=pair,
    )


def _low_rank_kernel(space: StateSpace, length: int, dtype: torch.dtype) -> Tensor:
    """By the generating function ``sum_l K_l z^l`` at the roots of unity times r, whose transform back is ``K_l r^l``.

    Of the finite sum, ``c (I - r^length A_d^length)`` in place of c. With ``R = ((1 - z) I - step / 2 (1 + z)
    diag(poles))^-1`` and ``h = step / 2 (1 + z)`` Woodbury's identity gives
    ``step (c R b - h (c R p) (1 + h q^* R p)^-1 (q^* R b))``. On the unit circle itself a slow pole of ``A_d`` lies
    beside a node, where these differences cancel, and those of the gradients twice; ``r^length`` of 1 / e keeps it away
    and costs the last tap a digit's fraction.
    """
    shrink = -torch.arange(length, dtype=torch.float64, device=space.step.device) / length
    if space.conjugate_pairs:
        spectrum = _generating(space, length)
    else:
        # a real part is half a sum with the conjugate, here of a system that does not act on the first
        other = space._replace(
            poles=space.poles.conj(), b=space.b.conj(), c=space.c.conj(), low_rank=_conjugate(space.low_rank)
        )
        spectrum = (_generating(space, length) + _generating(other, length)) / 2
    return _transform(spectrum.to(dtype), length) / shrink.exp().to(REAL_OF[dtype])


def _conjugate(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    return None if pair is None else (pair[0].conj(), pair[1].conj())


def _generating(space: StateSpace, length: int) -> Tensor:
    """The generating function of the finite kernel at half of the drawn-in nodes, ``(D, length // 2 + 1)``.

    ``cauchy`` has its nodes w on the unit circle. For ``z = r w`` is ``(1 - z) - x (1 + z)`` the same as
    ``scale ((1 - w) - y (1 + w))`` with ``scale = ((1 + r) - (1 - r) x) / 2`` and
    ``y = ((1 + r) x - (1 - r)) / (2 scale)``.
    """
    if space.low_rank is None:
        raise ValueError("a diagonal state space has its kernel from its powers")
    p, q = space.low_rank
    steps, _ = low_rank_steps(space)
    faded = row_power(as_reader(space.c), steps.real_transition(), length)
    c = space.c - math.exp(-1) * from_reader(faded)
    rows, columns = torch.cat((c[:, None], q.conj()), 1), torch.cat((space.b[:, None], p), 1)
    weights = (rows[:, :, None] * columns[:, None]).flatten(1, 2)
    half = space.step[:, None] / 2
    less = torch.full((), -1 / length, dtype=torch.float64, device=half.device).expm1()  # r - 1
    x = half * space.poles
    scale = 1 + less / 2 * (1 + x)
    sums = cauchy(
        weights / scale[:, None], ((2 + less) * x + less) / (2 * scale), length, conjugate_pairs=space.conjugate_pairs
    )
    angles = torch.arange(length // 2 + 1, dtype=torch.float64, device=half.device) * (2 * math.pi / length)
    above = half * (1 + torch.polar((1 + less).expand_as(angles), -angles))
    rank = p.shape[1]
    table = [[sums[:, row * (rank + 1) + column] for column in range(rank + 1)] for row in range(rank + 1)]
    return space.step[:, None] * _schur(table, above)


def _schur(table: list[list[Tensor]], above: Tensor) -> Tensor:
    """``s - h p (1 + h m)^-1 q`` elementwise, of the table ``[[s, p], [q, m]]``, by elimination from its end."""
    rank = len(table) - 1
    rows = [[entry if column == 0 else above * entry for column, entry in enumerate(row)] for row in table]
    for index in range(1, rank + 1):
        rows[index][index] = 1 + rows[index][index]
    for pivot in range(rank, 0, -1):
        for row in range(pivot):
            factor = rows[row][pivot] / rows[pivot][pivot]
            rows[row] = [rows[row][column] - factor * rows[pivot][column] for column in range(pivot)]
    return rows[0][0]


def _transform(spectrum: Tensor, length: int) -> Tensor:
    """The real sequences ``(D, length)`` of half spectra ``(D, length // 2 + 1)``."""
    if not needs_gradient(spectrum):
        return _forward(spectrum, length, "")
    return _Transform.apply(spectrum, length)


def _forward_fake(spectrum: Tensor, length: int, backend: str) -> Tensor:
    return spectrum.new_empty((spectrum.shape[0], length), dtype=REAL_OF[spectrum.dtype])


def _backward_fake(gradient: Tensor, length: int, backend: str) -> Tensor:
    return gradient.new_empty((gradient.shape[0], length // 2 + 1), dtype=COMPLEX_OF[gradient.dtype])


_forward = define(
    "ssm_kernel", "transform_forward", "(Tensor spectrum, SymInt length, str backend) -> Tensor", _forward_fake
)
_backward = define(
    "ssm_kernel", "transform_backward", "(Tensor gradient, SymInt length, str backend) -> Tensor", _backward_fake
)


class _Transform(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spectrum: Tensor, length: int) -> Tensor:
        ctx.length = length
        # linear, but a second derivative has to find something that it depends on
        ctx.save_for_backward(spectrum)
        return _forward(spectrum, length, "")

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        return _backward(gradients[0], ctx.length, ""), None
