"""GateLoop: an elementwise complex recurrence whose factor follows from the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqzoo.kernels.checks import COMPLEX_OF, accumulator
from seqzoo.kernels.linear_scan import linear_scan
from seqzoo.mixer import Mixed, State, StateSpec, register
from seqzoo.modules.heads import OutputNorm
from seqzoo.modules.options import scaled_width
from seqzoo.modules.vector_mixer import VectorMixer
from seqzoo.packing import Packing


@register(
    "gateloop",
    paper="GateLoop: Fully Data-Controlled Linear Recurrence for Sequence Modeling",
    arxiv="2311.01927",
    year=2023,
)
class GateLoop(VectorMixer):
    """GateLoop, https://arxiv.org/abs/2311.01927, section 3, with a head a channel (as its author trained it).

    ::

        a_t = sigmoid(W_alpha x_t) exp(i W_beta x_t)
        h_t = a_t h_{t-1} + k_t v_t        o_t = Re(q_t h_t)
        y_t = W_o (norm(o_t) silu(W_g x_t))

    State: ``{"h": (B, expand * d_model)}``, complex64 (complex128 for float64 inputs), and ``"conv"`` with ``d_conv``.

    Args:
        d_model: Width of inputs and outputs.
        expand: Channels in multiples of ``d_model``.
        d_conv: Taps of a convolution on the inputs; None means without.
        bias: Whether the projections have biases.
    """

    variants = ({}, {"expand": 1.5, "d_conv": 2, "bias": True})

    def __init__(self, d_model: int, *, expand: float = 1, d_conv: int | None = None, bias: bool = False) -> None:
        super().__init__(d_model, width=scaled_width(d_model, "expand", expand), conv_width=d_model, d_conv=d_conv)
        self.in_proj = nn.Linear(d_model, 6 * self.width, bias=bias)
        self.norm = OutputNorm(self.width)
        self.out_proj = nn.Linear(self.width, d_model, bias=bias)
        self.reset_parameters()

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Convolves, projects, scans, normalises, gates, projects."""
        u, after = self.convolve(x, x, state, packing)
        q, k, v, alpha, beta, gate = self.in_proj(u).chunk(6, dim=-1)
        dtype = accumulator(q.dtype)
        a = torch.polar(torch.sigmoid(alpha.to(dtype)), beta.to(dtype))
        addend = (k.to(dtype) * v).to(a.dtype)
        h, final = linear_scan(a, addend, None if state is None else state["h"], cu_seqlens=packing)
        o = (q * h.real).to(q.dtype)
        return Mixed(self.out_proj(self.norm(o, gate)), after | {"h": final})

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """One complex value a channel."""
        kind = COMPLEX_OF[accumulator(dtype)]
        return super().state_spec(batch_size, dtype) | {"h": ((batch_size, self.width), kind)}
