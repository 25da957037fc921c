"""The inverse transform at the end of ``ssm_kernel``: an op, because traced it would tie a compiler to lengths."""

from __future__ import annotations

import torch
from torch import Tensor


def transform_forward(spectrum: Tensor, length: int) -> Tensor:
    """As the op ``ssm_kernel_transform_forward``."""
    return torch.fft.irfft(spectrum, n=length)


def transform_backward(gradient: Tensor, length: int) -> Tensor:
    """As the op ``ssm_kernel_transform_backward``."""
    spectrum = torch.fft.rfft(gradient) / length
    # all but the real frequencies stand for two
    spectrum[:, 1 : (length + 1) // 2] *= 2
    return spectrum
