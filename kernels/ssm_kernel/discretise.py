"""State spaces of many channels, ``x' = A x + b u``, ``y = Re(c x)``, in steps, for ``ssm_kernel`` and ``ssm_scan``.

A is ``diag(poles)``, or ``diag(poles) - sum_r p_r q_r^*`` with a low rank R. All this is of the parameters' size, is
computed in complex128 and differentiated by autograd.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from seqzoo.kernels.checks import (
    COMPLEX,
    COMPLEX_OF,
    check_activation,
    check_device,
    check_finite,
    check_rank,
    check_same,
    check_shape,
    check_sign,
)
from seqzoo.kernels.dispatch import slot

Discretisation = Literal["zoh", "bilinear"]
REAL_OF = {value: key for key, value in COMPLEX_OF.items()}


class StateSpace(NamedTuple):
    """The arguments that describe a state space, checked and in complex128; see :func:`seqzoo.ops.ssm_kernel`.

    What makes up the low rank is ``(D, R, N)`` here.
    """

    poles: Tensor
    b: Tensor
    c: Tensor
    step: Tensor
    low_rank: tuple[Tensor, Tensor] | None
    discretisation: Discretisation
    conjugate_pairs: bool

    @property
    def readout(self) -> Tensor:
        """c with the factor of 2 that the conjugates add to a real part."""
        return 2 * self.c if self.conjugate_pairs else self.c


def state_space(
    poles: Tensor,
    b: Tensor,
    c: Tensor,
    step: Tensor,
    low_rank: tuple[Tensor, Tensor] | None,
    discretisation: str,
    conjugate_pairs: bool,
) -> StateSpace:
    """Checks the arguments and widens them.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If shapes or devices disagree or the discretisation is unknown or not for a low rank; under
            ``seqzoo.ops.checks`` if values are not finite, a pole's real part is positive or a step is not.
    """
    if discretisation not in ("zoh", "bilinear"):
        raise ValueError(f"discretisation must be zoh or bilinear, got {discretisation!r}")
    if low_rank is not None and discretisation != "bilinear":
        raise ValueError(f"a low rank needs discretisation='bilinear', got {discretisation!r}")
    check_activation("poles", poles, COMPLEX)
    check_rank("poles", poles, 2, "(D, N)")
    named = {"b": b, "c": c}
    if low_rank is not None:
        if not isinstance(low_rank, tuple | list) or len(low_rank) != 2:
            raise TypeError(f"low_rank must be a pair of Tensors (p, q), got {type(low_rank).__name__}")
        named |= {"p of low_rank": low_rank[0], "q of low_rank": low_rank[1]}
    for name, value in named.items():
        check_same(name, value, "poles", poles.dtype)
        check_device(name, value, "the poles", poles.device)
        if low_rank is None or name in ("b", "c"):
            check_shape(name, value, tuple(poles.shape), of="(D, N)")
        else:
            rank = low_rank[0].shape[1] if low_rank[0].dim() == 3 else 1
            width, size = poles.shape
            check_shape(name, value, (width, size), (width, rank, size), of="(D, N) or (D, R, N)")
    check_same("step", step, f"poles of {poles.dtype}", REAL_OF[poles.dtype])
    check_shape("step", step, (poles.shape[0],), of="(D,)")
    check_device("step", step, "the poles", poles.device)
    check_finite(poles=poles, step=step, **{name.split()[0]: value for name, value in named.items()})
    check_sign("the real part of poles", poles)
    if slot.checks and not torch.compiler.is_compiling() and bool((step <= 0).any()):
        index = int(torch.nonzero(step <= 0)[0])
        raise ValueError(f"step must be positive, got {step[index].item()} at index ({index},)")
    pair = None
    if low_rank is not None:
        p, q = (_wide(value if value.dim() == 3 else value[:, None]) for value in low_rank)
        pair = p, q
    words: Discretisation = "zoh" if discretisation == "zoh" else "bilinear"
    return StateSpace(_wide(poles), _wide(b), _wide(c), step.double(), pair, words, bool(conjugate_pairs))


def _wide(value: Tensor) -> Tensor:
    # contiguous, so that a view's sums run in the same order
    return value.to(torch.complex128).contiguous()


def diagonal_steps(space: StateSpace) -> tuple[Tensor, Tensor]:
    """Exponents and inputs, ``(D, N)``, of the steps of a diagonal space: ``x = exp(exponents) x + inputs u``."""
    scaled = space.step[:, None] * space.poles
    if space.discretisation == "bilinear":
        half = scaled / 2
        above = 1 + half
        # where a step ends in zero, the power 0 of that is still 1
        above = torch.where(above == 0, torch.finfo(torch.float64).tiny, above)
        return above.log() - (1 - half).log(), space.step[:, None] * space.b / (1 - half)
    return scaled, space.step[:, None] * space.b * _mean_exponential(scaled, _exponential_less_one(scaled))


def diagonal_step(space: StateSpace) -> tuple[Tensor, Tensor]:
    """Factors and inputs, ``(D, N)``, of one step: ``exp(exponents)`` of :func:`diagonal_steps`, at less cost."""
    scaled = space.step[:, None] * space.poles
    if space.discretisation == "bilinear":
        below = 1 - scaled / 2
        return (1 + scaled / 2) / below, space.step[:, None] * space.b / below
    less_one = _exponential_less_one(scaled)
    return 1 + less_one, space.step[:, None] * space.b * _mean_exponential(scaled, less_one)


def _exponential_less_one(x: Tensor) -> Tensor:
    """``exp(x) - 1`` without cancelling where x is small."""
    real = x.real.expm1() * x.imag.cos() - 2 * (x.imag / 2).sin().square()
    return torch.complex(real, x.real.exp() * x.imag.sin())


def _mean_exponential(x: Tensor, less_one: Tensor) -> Tensor:
    """``(exp(x) - 1) / x``, the mean of ``exp`` between 0 and x."""
    # at 0 the quotient counts as x: added to 1 - x / 2 that is 1 + x / 2, of the right value and slope
    zero = x == 0
    return less_one / x.masked_fill(zero, 1) + zero * (1 - x / 2)


class LowRankSteps(NamedTuple):
    """One step of a diagonal-plus-low-rank state space by the bilinear rule, in Woodbury's form.

    The inverse of ``I - step / 2 A`` is ``diag(diagonal) - sum_r left_r right_r``, ``(D, N)`` and ``(D, R, N)``; where
    conjugates of the states are not stored, with the conjugate of every product of ``right_r`` too. A step multiplies
    by twice the inverse minus the identity.
    """

    diagonal: Tensor
    left: Tensor
    right: Tensor
    conjugate_pairs: bool

    def to(self, dtype: torch.dtype) -> LowRankSteps:
        """The same in another precision."""
        parts = self.diagonal.to(dtype), self.left.to(dtype), self.right.to(dtype)
        return LowRankSteps(*parts, self.conjugate_pairs)

    def solve(self, x: Tensor) -> Tensor:
        """The inverse times states ``(..., D, N)``."""
        products = (self.right * x[..., None, :]).sum(-1, keepdim=True)
        if self.conjugate_pairs:
            products = 2 * products.real
        return self.diagonal * x - (self.left * products).sum(-2)

    def real_transition(self) -> Tensor:
        """The step as a real matrix on ``[Re x, Im x]``, ``(D, 2 N, 2 N)``."""
        linear = 2 * (torch.diag_embed(self.diagonal) - self.left.mT @ self.right)
        linear = linear - torch.eye(linear.shape[-1], dtype=linear.dtype, device=linear.device)
        rows = [[linear.real, -linear.imag], [linear.imag, linear.real]]
        if self.conjugate_pairs:
            # of the conjugates, which come from what is stored: linear in its conjugate
            other = -2 * self.left.mT @ self.right.conj()
            rows[0] = [rows[0][0] + other.real, rows[0][1] + other.imag]
            rows[1] = [rows[1][0] + other.imag, rows[1][1] - other.real]
        return torch.cat([torch.cat(row, -1) for row in rows], -2)


def low_rank_steps(space: StateSpace) -> tuple[LowRankSteps, Tensor]:
    """A step, and what it adds of an input of 1, ``(D, N)``."""
    if space.low_rank is None:
        raise ValueError("a diagonal state space has no low-rank steps")
    p, q = space.low_rank
    half = space.step[:, None] / 2
    diagonal = 1 / (1 - half * space.poles)
    left, right = (half * diagonal)[:, None] * p, q.conj() * diagonal[:, None]
    overlap = q.conj() @ left.mT
    scale = torch.eye(p.shape[1], dtype=p.dtype, device=p.device) + (
        2 * overlap.real if space.conjugate_pairs else overlap
    )
    # solve_ex: the other one reads on the host whether the matrix is singular
    steps = LowRankSteps(diagonal, torch.linalg.solve_ex(scale.mT, left)[0], right, space.conjugate_pairs)
    return steps, steps.solve(space.step[:, None] * space.b)


def as_real(x: Tensor) -> Tensor:
    """States or columns ``(..., N)`` as ``(..., 2 N)``: real parts, then imaginary ones."""
    return torch.cat((x.real, x.imag), -1)


def as_complex(x: Tensor) -> Tensor:
    """The states of which :func:`as_real` made these."""
    return torch.complex(*x.chunk(2, -1))


def as_reader(c: Tensor) -> Tensor:
    """A row c ``(..., N)`` as the one ``(..., 2 N)`` whose product with :func:`as_real` of x is ``Re(c x)``."""
    return torch.cat((c.real, -c.imag), -1)


def from_reader(row: Tensor) -> Tensor:
    """The row c of which :func:`as_reader` made this one."""
    real, negative = row.chunk(2, -1)
    return torch.complex(real, -negative)
