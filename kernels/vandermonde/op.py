"""The public ``vandermonde``: its documentation, its checks and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.checks import (
    COMPLEX,
    check_activation,
    check_device,
    check_finite,
    check_rank,
    check_shape,
    check_sign,
)
from seqzoo.kernels.derivatives import needs_gradient, once
from seqzoo.kernels.dispatch import define, slot


def vandermonde(exponents: Tensor, weights: Tensor, length: int) -> Tensor:
    """Sums of complex exponentials at whole positions: ``kernel_l = Re(sum_n weights_n exp(exponents_n l))``.

    The convolution kernel of a diagonal state space, as of S4D (https://arxiv.org/abs/2206.11893, section 3.3): a
    product with a Vandermonde matrix, which is never held. Powers are made in double precision whatever the dtypes,
    because the phase of the last position may be thousands of turns, and then rounded to the kernel's dtype.
    Differentiable once, in exponents and weights.

    Args:
        exponents: Logarithms of the factors from one position to the next, ``(D, N)`` with real parts of at most 0:
            complex128, or complex64, of whose rounding position l has l times as much.
        weights: What each power is multiplied by, ``(D, N)``: complex128 or complex64.
        length: The number of positions, which begin at 0.

    Returns:
        ``(D, length)``: float64 where the weights are complex128, else float32.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If shapes or devices disagree, or the length is negative.
        RuntimeError: If an implementation asked for by name cannot run; if it is differentiated twice, forward or under
            ``torch.func``, which ``backend("reference")`` allows.

    Example:
        >>> import math, torch
        >>> from seqzoo.ops import vandermonde
        >>> exponents = torch.tensor([[complex(math.log(0.5), math.pi)]], dtype=torch.complex128)
        >>> vandermonde(exponents, torch.tensor([[8 + 0j]]), 4).tolist()
        [[8.0, -4.0, 2.0, -1.0]]
    """
    check_activation("exponents", exponents, COMPLEX)
    check_rank("exponents", exponents, 2, "(D, N)")
    check_activation("weights", weights, COMPLEX)
    check_shape("weights", weights, tuple(exponents.shape), of="(D, N)")
    check_device("weights", weights, "exponents", exponents.device)
    if not isinstance(length, int | torch.SymInt):
        raise TypeError(f"length must be an int, got {type(length).__name__}")
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    check_finite(exponents=exponents, weights=weights)
    check_sign("exponents", exponents)
    exponents = exponents.to(torch.complex128)
    if slot.backend == "reference":
        from seqzoo.kernels.vandermonde import reference

        return reference.vandermonde(exponents, weights, length)
    arguments = (exponents, weights, length, slot.backend or "")
    if not needs_gradient(exponents, weights):
        return _forward(*arguments)  # nothing to record
    return _Vandermonde.apply(*arguments)


def real_dtype(weights: Tensor) -> torch.dtype:
    """The dtype of the kernel, in which products of rounded powers are made."""
    return torch.float64 if weights.dtype == torch.complex128 else torch.float32


def _forward_fake(exponents: Tensor, weights: Tensor, length: int, backend: str) -> Tensor:
    return weights.new_empty((weights.shape[0], length), dtype=real_dtype(weights))


def _backward_fake(grad: Tensor, exponents: Tensor, weights: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return exponents.new_empty(exponents.shape), weights.new_empty(weights.shape)


# exponents are complex128 whatever is computed, so the weights say what that is
_forward = define(
    "vandermonde",
    "forward",
    "(Tensor exponents, Tensor weights, SymInt length, str backend) -> Tensor",
    _forward_fake,
    always_wide=("exponents",),
)
_backward = define(
    "vandermonde",
    "backward",
    "(Tensor grad, Tensor exponents, Tensor weights, str backend) -> (Tensor grad_exponents, Tensor grad_weights)",
    _backward_fake,
    always_wide=("exponents",),
)


class _Vandermonde(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exponents: Tensor, weights: Tensor, length: int, backend: str) -> Tensor:
        ctx.save_for_backward(exponents, weights)
        ctx.backend = backend
        return _forward(exponents, weights, length, backend)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        return (*_backward(*gradients, *ctx.saved_tensors, ctx.backend), None, None)
