"""The short convolution before the mixer of most layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from seqzoo.kernels.causal_conv import causal_conv
from seqzoo.kernels.causal_conv.op import ACTIVATIONS, NARROWEST, WIDEST
from seqzoo.packing import Packing


class ShortConv(nn.Module):
    """:func:`seqzoo.ops.causal_conv` with its weights, ``weight`` ``(D, 1, W)`` and ``bias`` ``(D,)``.

    Their names and shapes are those of the ``torch.nn.Conv1d`` with a group a channel that published models hold.

    Args:
        d_model: Channels.
        d_conv: W, the tokens that an output sees, from 2 to 8.
        bias: Whether there is a bias.
        activation: ``"silu"``, or None.
    """

    def __init__(self, d_model: int, d_conv: int, *, bias: bool = True, activation: str | None = "silu") -> None:
        super().__init__()
        if not isinstance(d_conv, int) or not NARROWEST <= d_conv <= WIDEST:
            raise ValueError(f"d_conv must be an integer from {NARROWEST} to {WIDEST}, got {d_conv!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(d_model, 1, d_conv))
        self.bias = nn.Parameter(torch.empty(d_model)) if bias else None
        self.reset_parameters()

    def forward(self, x: Tensor, state: Tensor | None = None, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
        """``(B, T, D)`` and the inputs before it to ``(B, T, D)`` and the inputs before what follows."""
        return causal_conv(x, self.weight[:, 0], self.bias, state, activation=self.activation, cu_seqlens=packing)

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the state: the last W - 1 inputs, in their own dtype."""
        width, _, taps = self.weight.shape
        return (batch_size, taps - 1, width), dtype

    def reset_parameters(self) -> None:
        """Uniform within ``1 / sqrt(W)``, as ``torch.nn.Conv1d`` with one channel a group."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """The options, as ``print`` shows them."""
        width, _, taps = self.weight.shape
        return f"{width}, d_conv={taps}, bias={self.bias is not None}, activation={self.activation!r}"
