"""HiPPO: matrices whose state spaces remember their input in a basis of functions, and what diagonalises them.

From "HiPPO" (https://arxiv.org/abs/2008.07669) and "How to Train Your HiPPO" (https://arxiv.org/abs/2206.12037). Each
is a normal matrix minus one of low rank, ``A = V diag(poles) V^* - sum_r P_r P_r^T``. All is computed in float64 on the
CPU, wherever a model is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MEASURES = ("legs", "legt", "fourier")
# the real part of poles that have none, as those of the windowed measures
LEAST_DECAY = 1e-4


class Hippo(NamedTuple):
    """A matrix ``(N, N)``, its input ``(N,)``, and P, ``(R, N)``, with which ``A + P^T P`` is normal."""

    A: Tensor
    B: Tensor
    P: Tensor


class Normal(NamedTuple):
    """The normal part in its eigenvectors, one of each conjugate pair: poles ``(N / 2,)`` and V ``(N, N / 2)``."""

    poles: Tensor
    V: Tensor


def hippo(measure: str, size: int) -> Hippo:
    """The matrices of a measure.

    Args:
        measure: ``"legs"``, scaled Legendre polynomials: the whole past, fading; ``"legt"``, Legendre polynomials, or
            ``"fourier"``, over a window of the last unit of time.
        size: N, even.
    """
    index = torch.arange(size, dtype=torch.float64, device="cpu")
    norms = (2 * index + 1).sqrt()
    if measure == "legs":
        A = -(norms[:, None] * norms).tril(-1) - torch.diag(index + 1)
        return Hippo(A, norms, (index + 0.5).sqrt()[None])
    if measure == "legt":
        signs = (-1.0) ** (index[:, None] - index)
        A = -norms[:, None] * norms * torch.where(index[:, None] < index, signs, 1)
        parity = torch.stack((index % 2 == 0, index % 2 == 1)).to(A.dtype)
        return Hippo(A, norms, parity * norms)
    if measure == "fourier":
        # cosine and sine of every frequency: of the first, 0, a constant and nothing
        at_start = math.sqrt(2) * (1 - index % 2)
        at_start[0] = 1
        turning = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        for cosine in range(2, size, 2):
            turning[cosine, cosine + 1] = -math.pi * cosine
            turning[cosine + 1, cosine] = math.pi * cosine
        return Hippo(turning - 2 * at_start[:, None] * at_start, 2 * at_start, math.sqrt(2) * at_start[None])
    raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")


def diagonalise(matrices: Hippo) -> Normal:
    """Diagonalises the normal part.

    A vector's phase is free: it is the one in which the input's entry is real and not negative.
    """
    normal = matrices.A + matrices.P.T @ matrices.P
    size = len(normal)
    decay = normal.diagonal().mean()
    skew = (normal - normal.T) / 2
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    still = frequencies.abs() <= 1e-9 * frequencies.abs().max()
    turning = (frequencies > 0) & ~still
    poles, V = 1j * frequencies[turning], vectors[:, turning]
    if bool(still.any()):
        # vectors that nothing turns can be real; two of them are a vector and its conjugate
        real = torch.linalg.svd(skew).Vh[-int(still.sum()) :].T
        V = torch.cat((torch.complex(real[:, 0::2], real[:, 1::2]) / math.sqrt(2), V), 1)
        poles = torch.cat((poles.new_zeros(V.shape[1] - len(poles)), poles))
    inputs = V.mH @ matrices.B.to(V.dtype)
    V = V * torch.where(inputs == 0, 1, inputs / inputs.abs())
    if V.shape[1] * 2 != size:
        raise ValueError(f"a state of {size} is not made of conjugate pairs")
    return Normal(decay.clamp(max=-LEAST_DECAY) + poles, V)
