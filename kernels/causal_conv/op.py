"""The public ``causal_conv``: its documentation, its checks and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.checks import (
    check_activation,
    check_device,
    check_finite,
    check_parameter,
    check_rank,
    check_same,
    check_shape,
)
from seqzoo.kernels.derivatives import needs_gradient, once
from seqzoo.kernels.dispatch import check_boundaries, define, slot
from seqzoo.packing import Packing, assert_values, boundaries

ACTIVATIONS = (None, "silu")
NARROWEST, WIDEST = 2, 8


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Short causal convolution of every channel by itself: ``y_t = act(bias + sum_j weight_j x_{t - W + 1 + j})``.

    The convolution before the mixer of H3 (https://arxiv.org/abs/2212.14052, section 3), Mamba
    (https://arxiv.org/abs/2312.00752, section 3.4) and most layers since. Computed in float32 (float64 for float64
    inputs) whatever the inputs' dtype. Differentiable once, in all four tensors and through both results; the backward
    pass recomputes what is under the activation. Where the package ``causal_conv1d`` is installed it serves the forward
    pass of the CUDA tensors that it takes.

    Args:
        x: ``(B, T, D)``: float64, float32, bfloat16 or float16.
        weight: ``(D, W)``, W from 2 to 8, the last tap on the present token. Of x's dtype or float32.
        bias: ``(D,)``, of x's dtype or float32; none when omitted.
        initial_state: The W - 1 inputs before the first token, oldest first, ``(B, W - 1, D)``, of x's dtype; zero when
            omitted. With ``cu_seqlens`` those of every sequence, ``(S, W - 1, D)``.
        activation: ``"silu"``, or None.
        cu_seqlens: Boundaries of packed sequences, int32 ``(S + 1,)`` from 0 to T, or a Packing; B is then 1.

    Returns:
        y: ``(B, T, D)``, of x's dtype.
        final_state: ``(B, W - 1, D)`` or ``(S, W - 1, D)``, of x's dtype: the last W - 1 inputs, those of the initial
            state among them where a sequence is shorter.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If the activation is unknown, W out of range, or shapes, devices or boundaries disagree.
        RuntimeError: If an implementation asked for by name cannot run; if it is differentiated twice, forward or under
            ``torch.func``, which ``backend("reference")`` allows.

    Example:
        >>> import torch
        >>> from seqzoo.ops import causal_conv
        >>> y, final_state = causal_conv(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[10.0, 1.0]]))
        >>> y.flatten().tolist(), final_state.flatten().tolist()
        ([1.0, 12.0, 23.0], [3.0])
    """
    if slot.parallel is not None:
        return slot.parallel.causal_conv(x, weight, bias, initial_state, activation, cu_seqlens)
    check_activation("x", x)
    check_rank("x", x, 3, "(B, T, D)")
    check_parameter("weight", weight, "x", x.dtype)
    check_rank("weight", weight, 2, "(D, W)")
    batch, total, width = x.shape
    taps = weight.shape[1]
    if not NARROWEST <= taps <= WIDEST:
        raise ValueError(f"weight must have from {NARROWEST} to {WIDEST} taps, got {taps} in {tuple(weight.shape)}")
    check_shape("weight", weight, (width, taps), of="(D, W)")
    check_device("weight", weight, "x", x.device)
    if bias is not None:
        check_parameter("bias", bias, "x", x.dtype)
        check_shape("bias", bias, (width,), of="(D,)")
        check_device("bias", bias, "x", x.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    bounds = boundaries(cu_seqlens, batch, total, x.device)
    if initial_state is not None:
        check_same("initial_state", initial_state, "x", x.dtype)
        rows, letters = (batch, "(B, W - 1, D)") if bounds is None else (bounds.shape[0] - 1, "(S, W - 1, D)")
        check_shape("initial_state", initial_state, (rows, taps - 1, width), of=letters)
        check_device("initial_state", initial_state, "x", x.device)
    check_finite(x=x, weight=weight, bias=bias, initial_state=initial_state)
    if slot.backend == "reference":
        check_boundaries(bounds, total)
        from seqzoo.kernels.causal_conv import reference

        return reference.causal_conv(x, weight, bias, initial_state, activation=activation, cu_seqlens=bounds)
    if isinstance(cu_seqlens, Tensor) and x.device.type == "cuda":
        assert_values(cu_seqlens, total)
    arguments = (x, weight, bias, initial_state, bounds, activation, slot.backend or "")
    if not needs_gradient(x, weight, bias, initial_state):
        return _forward(*arguments)  # nothing to record
    y, final_state = _CausalConv.apply(*arguments)
    return y, final_state


def n_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences there are, each with a state of its own."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((n_sequences(x, cu_seqlens), weight.shape[1] - 1, x.shape[2]))


def _backward_fake(
    grad_y: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if initial_state is None else x.new_empty(initial_state.shape),
    )


_forward = define(
    "causal_conv",
    "forward",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, str? activation, str backend)"
    " -> (Tensor y, Tensor final_state)",
    _forward_fake,
)
# the gradient of what was not given has no elements
_backward = define(
    "causal_conv",
    "backward",
    "(Tensor grad_y, Tensor grad_final_state, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state,"
    " Tensor? cu_seqlens, str? activation, str backend)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_initial_state)",
    _backward_fake,
)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        activation: str | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
        ctx.options = activation, backend
        return _forward(x, weight, bias, initial_state, cu_seqlens, activation, backend)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        # once: a checkpoint gives every saved tensor back a single time
        saved = ctx.saved_tensors
        _, _, bias, initial_state, _ = saved
        grad_x, grad_weight, grad_bias, grad_state = _backward(*gradients, *saved, *ctx.options)
        return (
            grad_x,
            grad_weight,
            None if bias is None else grad_bias,
            None if initial_state is None else grad_state,
            None,
            None,
            None,
        )
