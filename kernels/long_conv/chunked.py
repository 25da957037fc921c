"""``long_conv`` by FFT in PyTorch operations, on any device.

A kernel and, at the negative lags, a reverse kernel are one circular kernel of n positions, where n leaves room enough
that no product wraps around into the T outputs. Then ``y = irfft(rfft(u) K)``, and with G the spectrum of y's gradient
``grad_u = irfft(G conj(K))`` and ``grad_kernel = irfft(sum_b G_b conj(U_b))`` at the kernel's lags. That is three
transforms forward and three backward, five where the spectra were not kept.

A transform wants time as the last dimension. On a CPU the work is cut into blocks of channels, and of sequences where
these are short, whose rows stay in the caches from the first copy to the last: n real numbers each, zero from T on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.long_conv.op import kept_shapes, lags, transform_length

# bytes of the rows of a block, elsewhere than on a CPU limited by memory alone
BLOCK_CPU, BLOCK = 1 << 21, 1 << 28
# channels that are copied at once fill a cache line
CHANNELS = 16
# positions between rows of a power of two fall onto the same few sets of a cache
SKEW = 16


def forward(u: Tensor, kernel: Tensor, kernel_reverse: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``long_conv_forward``."""
    y = torch.empty_like(u)
    sizes = kept_shapes(u, kernel, kernel_reverse, keep)
    kept = u.new_empty(sizes[0], dtype=accumulator(u.dtype)), u.new_empty(sizes[1], dtype=accumulator(u.dtype))
    if u.numel() == 0:
        return y, *kept
    work = Work(u, kernel, kernel_reverse)
    u_spectra, kernel_spectra = work.spectra(kept, keep)
    for memory, spectra in zip(kept, (u_spectra, kernel_spectra), strict=True):
        if spectra is not None:
            memory[2 * spectra.numel() :] = 0  # room to spare is part of the op's results
    for channels in work.channels():
        of_kernel = work.transform_kernel(kernel, kernel_reverse, channels)
        if kernel_spectra is not None:
            torch.conj_physical(of_kernel, out=kernel_spectra[channels])
        for rows in work.rows():
            spectrum = work.transform(u, rows, channels)
            if u_spectra is not None:
                torch.conj_physical(spectrum, out=u_spectra[rows, channels])
            work.invert(spectrum.mul_(of_kernel), y, rows, channels)
    return y, kept[0], kept[1]


def backward(
    grad_y: Tensor,
    u: Tensor,
    kernel: Tensor,
    kernel_reverse: Tensor | None,
    u_spectra: Tensor,
    kernel_spectra: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``long_conv_backward``."""
    grad_u, grad_kernel = torch.empty_like(u), torch.zeros_like(kernel)
    grad_reverse = kernel.new_empty(0) if kernel_reverse is None else torch.zeros_like(kernel_reverse)
    if u.numel() == 0:
        return grad_u, grad_kernel, grad_reverse
    work = Work(u, kernel, kernel_reverse)
    of_u, of_kernel = work.spectra((u_spectra, kernel_spectra), keep)
    for channels in work.channels():
        if of_kernel is None:
            transposed = work.transform_kernel(kernel, kernel_reverse, channels).conj_physical_()
        else:
            transposed = of_kernel[channels]
        total = torch.zeros_like(transposed)
        for rows in work.rows():
            inputs = work.transform(u, rows, channels).conj_physical_() if of_u is None else of_u[rows, channels]
            spectrum = work.transform(grad_y, rows, channels)
            if spectrum.shape[0] == 1:
                total.addcmul_(spectrum[0], inputs[0])
            else:
                total += (spectrum * inputs).sum(0)
            work.invert(spectrum.mul_(transposed), grad_u, rows, channels)
        by_lag = torch.fft.irfft(total, n=work.length)
        taps, taps_reverse = work.taps
        grad_kernel[channels, :taps] = by_lag[:, :taps]
        if kernel_reverse is not None:
            grad_reverse[channels, :1] = by_lag[:, : min(1, taps_reverse)]
            grad_reverse[channels, 1:taps_reverse] = by_lag[:, work.length + 1 - taps_reverse :].flip(1)
    return grad_u, grad_kernel, grad_reverse


class Work:
    """How a call is cut into blocks, and the rows that they use in turn.

    Attributes:
        length: n, the positions of a transform.
        taps: How many of the kernel's lags, and of the reverse kernel's, the sequences reach.
    """

    def __init__(self, u: Tensor, kernel: Tensor, kernel_reverse: Tensor | None) -> None:
        self.batch, self.total, self.width = u.shape
        self.dtype = accumulator(u.dtype)
        self.length = transform_length(lags(u, kernel, kernel_reverse))
        self.taps = tuple(0 if one is None else min(one.shape[1], self.total) for one in (kernel, kernel_reverse))
        on_cpu = u.device.type == "cpu"
        rows = (BLOCK_CPU if on_cpu else BLOCK) // (self.length * self.dtype.itemsize)
        self.n_channels = _even(self.width, max(rows, CHANNELS))
        self.n_sequences = _even(self.batch, rows // self.n_channels)
        rows = self.n_channels * self.n_sequences
        self._padded = u.new_zeros(rows * self.length, dtype=self.dtype)
        # a transposition of rows that lie far apart misses the caches: on a CPU they are first brought together
        self._tile = u.new_empty(rows * self.total, dtype=self.dtype) if on_cpu else None
        self._skewed = u.new_empty(rows * (self.total + SKEW), dtype=self.dtype) if on_cpu else None

    def channels(self) -> Iterator[slice]:
        """The blocks of channels."""
        return _slices(self.width, self.n_channels)

    def rows(self) -> Iterator[slice]:
        """The blocks of sequences."""
        return _slices(self.batch, self.n_sequences)

    def spectra(self, kept: tuple[Tensor, Tensor], keep: bool) -> tuple[Tensor | None, Tensor | None]:
        """Complex views of the memory that keeps the spectra of u, ``(B, D, n // 2 + 1)``, and of the kernels."""
        if not keep:
            return None, None
        shape = (self.width, self.length // 2 + 1, 2)
        of_u, of_kernel = kept
        return torch.view_as_complex(_like(of_u, (self.batch, *shape))), torch.view_as_complex(_like(of_kernel, shape))

    def transform_kernel(self, kernel: Tensor, kernel_reverse: Tensor | None, channels: slice) -> Tensor:
        """``(channels, n // 2 + 1)``, the spectrum of both kernels."""
        taps, taps_reverse = self.taps
        circle = kernel.new_zeros(channels.stop - channels.start, self.length, dtype=self.dtype)
        circle[:, :taps] = kernel[channels, :taps]
        if kernel_reverse is not None:
            circle[:, : min(1, taps_reverse)] += kernel_reverse[channels, : min(1, taps_reverse)]
            circle[:, self.length + 1 - taps_reverse :] += kernel_reverse[channels, 1:taps_reverse].flip(1)
        return torch.fft.rfft(circle)

    def transform(self, x: Tensor, rows: slice, channels: slice) -> Tensor:
        """``(rows, channels, n // 2 + 1)``, the spectrum of a block of ``(B, T, D)``."""
        block = x[rows, :, channels]
        if self._tile is not None:
            block = _like(self._tile, block.shape).copy_(block)
        block = block.transpose(1, 2)
        padded = _like(self._padded, (*block.shape[:2], self.length))
        padded[..., : self.total] = block
        return torch.fft.rfft(padded)

    def invert(self, spectrum: Tensor, y: Tensor, rows: slice, channels: slice) -> None:
        """Writes what a spectrum stands for into a block of ``(B, T, D)``."""
        result = torch.fft.irfft(spectrum, n=self.length)[..., : self.total]
        if self._skewed is not None:
            skewed = _like(self._skewed, (*result.shape[:2], self.total + SKEW))[..., : self.total]
            result = skewed.copy_(result)
        y[rows, :, channels] = result.transpose(1, 2)


def _like(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first values of a block's memory, in this shape."""
    return memory[: math.prod(shape)].view(shape)


def _even(size: int, most: int) -> int:
    """The size of equal parts, none above ``most`` and each at least 1."""
    parts = -(-size // max(1, most))
    return -(-size // parts)


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
