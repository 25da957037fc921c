"""The position-wise networks between the mixers, chosen by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _MLP(nn.Module):
    """A hidden layer of ``hidden`` units between two linear maps without biases."""

    projections = 1

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.in_proj = nn.Linear(d_model, self.projections * hidden, bias=False)
        self.out_proj = nn.Linear(hidden, d_model, bias=False)

    def reset_parameters(self) -> None:
        """PyTorch's initialisation of linear layers."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()


class MLP(_MLP):
    """``W_o gelu(W x)``."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``."""
        return self.out_proj(F.gelu(self.in_proj(x)))


class GatedMLP(_MLP):
    """SwiGLU, ``W_o (silu(W_g x) * W_v x)``, https://arxiv.org/abs/2002.05202."""

    projections = 2

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``."""
        gate, value = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(F.silu(gate) * value)


# name -> (class, hidden units in multiples of d_model when none are asked for); both defaults hold 8 d_model^2 weights
MLPS = {"gated": (GatedMLP, 8 / 3), "plain": (MLP, 4.0)}


def hidden_units(d_model: int, ratio: float) -> int:
    """``ratio * d_model``, rounded up to a multiple of 16, on which matrix units run at full width."""
    return -(-max(1, round(ratio * d_model)) // 16) * 16
