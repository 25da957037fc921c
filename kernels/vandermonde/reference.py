"""``vandermonde`` with every power of every term held at once: the specification, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def vandermonde(exponents: Tensor, weights: Tensor, length: int) -> Tensor:
    """``kernel_l = Re(sum_n weights_n exp(exponents_n l))``; arguments and result as those of the public function."""
    positions = torch.arange(length, dtype=torch.float64, device=exponents.device)
    powers = torch.exp(exponents.to(torch.complex128)[..., None] * positions).to(weights.dtype)  # (D, N, length)
    return (weights[..., None] * powers).sum(1).real
