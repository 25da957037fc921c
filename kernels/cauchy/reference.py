"""``cauchy`` as it is written, every quotient at once: the specification, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cauchy(weights: Tensor, poles: Tensor, length: int, *, conjugate_pairs: bool = False) -> Tensor:
    """The sums; arguments and results as those of the public function, taken as checked."""
    if conjugate_pairs:
        weights, poles = torch.cat((weights, weights.conj()), 2), torch.cat((poles, poles.conj()), 1)
    half = math.pi / length * torch.arange(length // 2 + 1, dtype=torch.float64, device=weights.device)
    # 1 - z and 1 + z of z = exp(-2i half), where a subtraction would cancel
    one_minus = torch.complex(2 * half.sin() ** 2, torch.sin(2 * half))
    one_plus = torch.complex(2 * half.cos() ** 2, -torch.sin(2 * half))
    quotients = (one_minus - poles.to(torch.complex128)[:, :, None] * one_plus).reciprocal().to(weights.dtype)
    return torch.einsum("dmn,dnf->dmf", weights, quotients)
