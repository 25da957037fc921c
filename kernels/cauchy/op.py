"""The public ``cauchy``: its documentation, its checks and its registration."""

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


def cauchy(weights: Tensor, poles: Tensor, length: int, *, conjugate_pairs: bool = False) -> Tensor:
    """Weighted sums over poles at the roots of unity: ``sum_n w_n / ((1 - z_j) - p_n (1 + z_j))``.

    The Cauchy kernel of S4 (https://arxiv.org/abs/2111.00396, section 3 and appendix C) at the nodes
    ``z_j = exp(-2 pi i j / length)``, multiplied through by ``(1 + z_j)``: regular at z = -1, and without a pole at any
    node while the poles' real parts are negative. With ``p = step / 2 * lambda`` it is the bilinear discretisation's:
    for ``A = (1 + p) / (1 - p)`` the kernel ``K_l = Re(sum_n c_n A_n**l)`` of ``length`` taps is the inverse real FFT
    of the sums whose weights are ``c_n (1 - A_n**length) (1 - p_n) / 2``, with conjugate pairs.

    Nodes and denominators are made in float64, because near a pole they cancel; quotients are rounded to the weights'
    precision and summed in it. Nothing of size (D, N, length) is held. Differentiable once, in weights and poles.

    Args:
        weights: Of each sum over the same poles, ``(D, M, N)``: complex128 or complex64.
        poles: ``(D, N)``, complex128 or complex64, with negative real parts. Widened to complex128.
        length: The number of nodes around the unit circle, at least 1.
        conjugate_pairs: Adds to every term that of the conjugates,
            ``conj(w_n) / ((1 - z_j) - conj(p_n) (1 + z_j))``.

    Returns:
        The sums at the first F = length // 2 + 1 nodes, ``(D, M, F)``, of the weights' dtype.

    Raises:
        TypeError: If a tensor is not complex or the length not an int.
        ValueError: If shapes or devices disagree, or the length is not positive.
        RuntimeError: If an implementation asked for by name cannot run; if it is differentiated twice, forward or under
            ``torch.func``, which ``backend("reference")`` allows.

    Example:
        >>> import torch
        >>> from seqzoo.ops import cauchy
        >>> weights = torch.ones(1, 1, 1, dtype=torch.complex64)
        >>> cauchy(weights, torch.tensor([[-0.5 + 0j]]), 2).flatten().tolist()
        [(1+0j), (0.5+0j)]
    """
    check_activation("weights", weights, COMPLEX)
    check_rank("weights", weights, 3, "(D, M, N)")
    check_activation("poles", poles, COMPLEX)
    width, _, size = weights.shape
    check_shape("poles", poles, (width, size), of="(D, N)")
    check_device("poles", poles, "weights", weights.device)
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"length must be an int, got {type(length).__name__}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    check_finite(weights=weights, poles=poles)
    check_sign("poles", poles)
    poles = poles.to(torch.complex128)
    if slot.backend == "reference":
        from seqzoo.kernels.cauchy import reference

        return reference.cauchy(weights, poles, length, conjugate_pairs=conjugate_pairs)
    arguments = (weights, poles, length, conjugate_pairs, slot.backend or "")
    if not needs_gradient(weights, poles):
        return _forward(*arguments)  # nothing to record
    return _Cauchy.apply(*arguments)


def n_nodes(length: int) -> int:
    """How many nodes there are in the upper half of the unit circle, both real ones included."""
    return length // 2 + 1


def _forward_fake(weights: Tensor, poles: Tensor, length: int, conjugate_pairs: bool, backend: str) -> Tensor:
    width, sums, _ = weights.shape
    return weights.new_empty((width, sums, n_nodes(length)))


def _backward_fake(
    grad_sums: Tensor, weights: Tensor, poles: Tensor, length: int, conjugate_pairs: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), poles.new_empty(poles.shape)


_forward = define(
    "cauchy",
    "forward",
    "(Tensor weights, Tensor poles, SymInt length, bool conjugate_pairs, str backend) -> Tensor sums",
    _forward_fake,
    always_wide=("poles",),
)
_backward = define(
    "cauchy",
    "backward",
    "(Tensor grad_sums, Tensor weights, Tensor poles, SymInt length, bool conjugate_pairs, str backend)"
    " -> (Tensor grad_weights, Tensor grad_poles)",
    _backward_fake,
    always_wide=("poles",),
)


class _Cauchy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, poles: Tensor, length: int, conjugate_pairs: bool, backend: str) -> Tensor:
        ctx.save_for_backward(weights, poles)
        ctx.options = length, conjugate_pairs, backend
        return _forward(weights, poles, length, conjugate_pairs, backend)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        grad_weights, grad_poles = _backward(*gradients, *ctx.saved_tensors, *ctx.options)
        return grad_weights, grad_poles, None, None, None
