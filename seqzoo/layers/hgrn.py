"""HGRN: an elementwise gated recurrence with a lower bound on what it forgets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.linear_scan import linear_scan
from seqzoo.mixer import Mixed, State, StateSpec, register
from seqzoo.modules.heads import OutputNorm
from seqzoo.modules.options import check_number, scaled_width
from seqzoo.modules.vector_mixer import VectorMixer
from seqzoo.packing import Packing


@register(
    "hgrn", paper="Hierarchically Gated Recurrent Neural Network for Sequence Modeling", arxiv="2311.04823", year=2023
)
class HGRN(VectorMixer):
    """HGRN, "Hierarchically Gated Recurrent Neural Network", https://arxiv.org/abs/2311.04823, section 3, real-valued.

    With ``f = lower_bound + (1 - lower_bound) sigmoid(W_f x)``::

        h_t = f_t h_{t-1} + (1 - f_t) silu(W_i x_t)
        y_t = W_o (norm(h_t) silu(W_g x_t))

    HGRN raises ``lower_bound`` from layer to layer.

    State: ``{"h": (B, expand * d_model)}``, float32 (float64 for float64 inputs), and ``"conv"`` with ``d_conv``.

    Args:
        d_model: Width of inputs and outputs.
        expand: Channels in multiples of ``d_model``.
        lower_bound: Least factor on the state, at least 0 and below 1.
        d_conv: Taps of a convolution on the inputs; None means without.
        bias: Whether the projections have biases.
    """

    variants = ({}, {"expand": 1.5, "lower_bound": 0.5, "d_conv": 2, "bias": True})

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 1,
        lower_bound: float = 0.0,
        d_conv: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model, width=scaled_width(d_model, "expand", expand), conv_width=d_model, d_conv=d_conv)
        if not 0 <= check_number("lower_bound", lower_bound) < 1:
            raise ValueError(f"lower_bound must be at least 0 and below 1, got {lower_bound}")
        self.lower_bound = lower_bound
        self.in_proj = nn.Linear(d_model, 3 * self.width, bias=bias)
        self.norm = OutputNorm(self.width)
        self.out_proj = nn.Linear(self.width, d_model, bias=bias)
        self.reset_parameters()

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Convolves, projects, scans, normalises, gates, projects."""
        u, after = self.convolve(x, x, state, packing)
        forget, value, gate = self.in_proj(u).chunk(3, dim=-1)
        raw = forget.to(accumulator(forget.dtype))
        # the weight of the new value without cancelling
        weight = (1 - self.lower_bound) * torch.sigmoid(-raw)
        factor = torch.sigmoid(raw) if self.lower_bound == 0 else 1 - weight
        h, final = linear_scan(
            factor, (weight * F.silu(value)).to(value.dtype), None if state is None else state["h"], cu_seqlens=packing
        )
        return Mixed(self.out_proj(self.norm(h, gate)), after | {"h": final})

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """One value a channel."""
        return super().state_spec(batch_size, dtype) | {"h": ((batch_size, self.width), accumulator(dtype))}
