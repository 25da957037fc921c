"""``long_conv`` as a loop over time: the specification, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator


def long_conv(u: Tensor, kernel: Tensor, *, kernel_reverse: Tensor | None = None) -> Tensor:
    """``y_t = sum_{s <= t} kernel_{t - s} u_s + sum_{s >= t} kernel_reverse_{s - t} u_s``; arguments as checked."""
    dtype = accumulator(u.dtype)
    values, total = u.to(dtype), u.shape[1]
    taps = kernel.to(dtype).t()  # (L, D)
    taps_reverse = None if kernel_reverse is None else kernel_reverse.to(dtype).t()
    outputs = []
    for t in range(total):
        past = values[:, max(0, t + 1 - taps.shape[0]) : t + 1].flip(1)
        y = (past * taps[: t + 1]).sum(1)
        if taps_reverse is not None:
            future = values[:, t : t + taps_reverse.shape[0]]
            y = y + (future * taps_reverse[: total - t]).sum(1)
        outputs.append(y)
    return torch.stack(outputs, dim=1).to(u.dtype) if outputs else u[:, :0]
