"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotates the two halves of every head by angles that grow with the position, https://arxiv.org/abs/2104.09864.

    Args:
        x: ``(B, T, H, K)``, K even.
        positions: int64 ``(B, T)``, or ``(1, T)`` for all rows.
        base: Wavelengths are ``2 pi base ** (2 i / K)``.

    Returns:
        ``(B, T, H, K)``, of x's dtype; computed in float32 at least.
    """
    half = x.shape[-1] // 2
    # float64: in float32 the angle of position 100,000 is off by 0.004
    rates = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = positions[..., None, None].to(torch.float64) * rates
    dtype = accumulator(x.dtype)
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1).to(x.dtype)
