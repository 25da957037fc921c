"""The public ``long_conv``: its documentation, its checks and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.checks import (
    accumulator,
    check_activation,
    check_device,
    check_finite,
    check_parameter,
    check_rank,
    check_shape,
)
from seqzoo.kernels.derivatives import needs_gradient, once
from seqzoo.kernels.dispatch import define, slot


def long_conv(u: Tensor, kernel: Tensor, *, kernel_reverse: Tensor | None = None, recompute: bool = False) -> Tensor:
    """Convolution of every channel with a kernel as long as the sequence: ``y_t = sum_{s <= t} kernel_{t - s} u_s``.

    The convolution of S4 (https://arxiv.org/abs/2111.00396, section 2.4) and of its successors, by FFT; FlashFFTConv
    (https://arxiv.org/abs/2311.05908) says what limits it on GPUs. With ``kernel_reverse`` it looks both ways:
    ``sum_{s >= t} kernel_reverse_{s - t} u_s`` is added, lag 0 counts in both kernels, and u is transformed once for
    both. Computed in float32 (float64 for float64 inputs) whatever the inputs' dtype. Differentiable once, in all three
    tensors.

    A transform mixes all positions of a channel. Outputs before a change of the inputs keep their value to within
    ``8 eps max|u| |kernel|_1``, with the rounding unit ``eps`` of the precision of the computation, and not their bits;
    what is not finite reaches its whole channel.

    Args:
        u: ``(B, T, D)``: float64, float32, bfloat16 or float16.
        kernel: ``(D, L)``, lag 0 first, of u's dtype or float32. Lags from L on count as zero; those from T on have no
            effect, and gradients of zero.
        kernel_reverse: ``(D, L')`` for the tokens that follow, by the same rules; none when omitted.
        recompute: Whether the backward pass transforms u and the kernels again, two transforms more than six, or the
            forward pass keeps their spectra beside the inputs: ``(B + 1) D`` rows of about T + L numbers.

    Returns:
        y: ``(B, T, D)``, of u's dtype.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If shapes or devices disagree.
        RuntimeError: If an implementation asked for by name cannot run; if it is differentiated twice, forward or under
            ``torch.func``, which ``backend("reference")`` allows.

    Example:
        >>> import torch
        >>> from seqzoo.ops import long_conv
        >>> y = long_conv(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[1.0, 0.0, 10.0]]))
        >>> y.flatten().round(decimals=4).tolist()
        [1.0, 2.0, 13.0]
    """
    check_activation("u", u)
    check_rank("u", u, 3, "(B, T, D)")
    _check_kernel("kernel", kernel, u)
    if kernel_reverse is not None:
        _check_kernel("kernel_reverse", kernel_reverse, u)
    check_finite(u=u, kernel=kernel, kernel_reverse=kernel_reverse)
    if slot.backend == "reference":
        from seqzoo.kernels.long_conv import reference

        return reference.long_conv(u, kernel, kernel_reverse=kernel_reverse)
    backend = slot.backend or ""
    if not needs_gradient(u, kernel, kernel_reverse):
        return _forward(u, kernel, kernel_reverse, False, backend)[0]  # nothing to record
    return _LongConv.apply(u, kernel, kernel_reverse, not recompute, backend)


def _check_kernel(name: str, kernel: Tensor, u: Tensor) -> None:
    check_parameter(name, kernel, "u", u.dtype)
    check_rank(name, kernel, 2, "(D, L)")
    check_shape(name, kernel, (u.shape[2], kernel.shape[1]), of="(D, L)")
    check_device(name, kernel, "u", u.device)


def lags(u: Tensor, *kernels: Tensor | None) -> Any:
    """The number of positions that a transform must tell apart: T, and the longest reach of a kernel."""
    longest = 1
    for kernel in kernels:
        if kernel is not None:
            longest = torch.sym_max(longest, torch.sym_min(kernel.shape[1], u.shape[1]))
    return u.shape[1] + longest - 1


def transform_length(wanted: int) -> int:
    """The least multiple of 8 from ``wanted`` on without a prime factor above 5, which every FFT library does fast."""
    eighths = (wanted + 7) // 8
    best = 1 << (eighths - 1).bit_length()
    five = 1
    while five < best:
        odd = five
        while odd < best:
            best = min(best, odd << max(0, -(-eighths // odd) - 1).bit_length())
            odd *= 3
        five *= 5
    return 8 * best


def kept_length(wanted: Any) -> Any:
    """The most frequencies that a transform for ``wanted`` positions has, in arithmetic that a compiler follows.

    A search for the length would tie compiled code to one T. Numbers without a prime factor above 5 are dense enough
    that the room to spare stays below an eighth, and a twelfth from 1500 positions on.
    """
    return (wanted + torch.sym_min(wanted // 8 + 11, wanted // 15 + 115)) // 2 + 1


def kept_shapes(u: Tensor, kernel: Tensor, kernel_reverse: Tensor | None, keep: bool) -> tuple[Any, Any]:
    """Numbers of real values in which the spectra of u and of the kernels are kept: none without ``keep``."""
    if not keep:
        return 0, 0
    batch, _, width = u.shape
    row = 2 * width * kept_length(lags(u, kernel, kernel_reverse))
    return batch * row, row


def _forward_fake(
    u: Tensor, kernel: Tensor, kernel_reverse: Tensor | None, keep: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(u.dtype)
    of_u, of_kernel = kept_shapes(u, kernel, kernel_reverse, keep)
    return u.new_empty(u.shape), u.new_empty(of_u, dtype=dtype), u.new_empty(of_kernel, dtype=dtype)


def _backward_fake(
    grad_y: Tensor,
    u: Tensor,
    kernel: Tensor,
    kernel_reverse: Tensor | None,
    u_spectra: Tensor,
    kernel_spectra: Tensor,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        u.new_empty(u.shape),
        kernel.new_empty(kernel.shape),
        kernel.new_empty(0) if kernel_reverse is None else kernel_reverse.new_empty(kernel_reverse.shape),
    )


# spectra travel as real numbers, conjugated as the backward pass wants them, and without elements where not kept
_forward = define(
    "long_conv",
    "forward",
    "(Tensor u, Tensor kernel, Tensor? kernel_reverse, bool keep, str backend)"
    " -> (Tensor y, Tensor u_spectra, Tensor kernel_spectra)",
    _forward_fake,
)
# the gradient of what was not given has no elements
_backward = define(
    "long_conv",
    "backward",
    "(Tensor grad_y, Tensor u, Tensor kernel, Tensor? kernel_reverse, Tensor u_spectra, Tensor kernel_spectra,"
    " bool keep, str backend) -> (Tensor grad_u, Tensor grad_kernel, Tensor grad_kernel_reverse)",
    _backward_fake,
)


class _LongConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, kernel: Tensor, kernel_reverse: Tensor | None, keep: bool, backend: str) -> Tensor:
        y, u_spectra, kernel_spectra = _forward(u, kernel, kernel_reverse, keep, backend)
        ctx.save_for_backward(u, kernel, kernel_reverse, u_spectra, kernel_spectra)
        ctx.options = keep, backend
        return y

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        # once: a checkpoint gives every saved tensor back a single time
        saved = ctx.saved_tensors
        grad_u, grad_kernel, grad_reverse = _backward(*gradients, *saved, *ctx.options)
        kernel_reverse = saved[2]
        return grad_u, grad_kernel, None if kernel_reverse is None else grad_reverse, None, None
