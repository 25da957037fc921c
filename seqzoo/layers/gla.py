"""Gated linear attention: a decay for every key that follows from the input."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.kernels.linear_attention.op import WIDEST_KEY
from seqzoo.mixer import State, register
from seqzoo.modules.heads import HeadMixer, count_heads
from seqzoo.modules.options import check_count, check_number, scaled_width
from seqzoo.packing import Packing


@register(
    "gla", paper="Gated Linear Attention Transformers with Hardware-Efficient Training", arxiv="2312.06635", year=2023
)
class GLA(HeadMixer):
    """Gated linear attention, https://arxiv.org/abs/2312.06635, section 4.

    For every head::

        alpha_t = sigmoid(W_2 W_1 x_t + b) ** (1 / 16)                   (K,)
        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T        o_t = q_t S_t / sqrt(K)
        y_t = W_o (silu(W_g x_t) norm(o_t))

    State: ``{"S": (B, H, K, V)}``, float32 (float64 for float64 inputs), and ``"conv"`` with ``d_conv``.

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads, 4 as in the paper unless they do not divide ``expand_k * d_model`` or would have more than 256
            keys each.
        expand_k: Keys of all heads in multiples of ``d_model``.
        expand_v: Values of all heads in multiples of ``d_model``.
        gate_rank: Rank of the decay's projection.
        gate_power: Divisor of the decay's logarithm: larger forgets more slowly.
        d_conv: Taps of a convolution before q, k and v are split; None means without.
        bias: Whether the projections have biases (the decay's always has).
    """

    activation = None
    variants = ({}, {"n_heads": 2, "expand_k": 1, "gate_rank": 3, "d_conv": 2, "bias": True})

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1,
        gate_rank: int = 16,
        gate_power: float = 16.0,
        d_conv: int | None = None,
        bias: bool = False,
    ) -> None:
        keys, values = scaled_width(d_model, "expand_k", expand_k), scaled_width(d_model, "expand_v", expand_v)
        heads, size = count_heads(keys, n_heads, None, min(-(-keys // 4), WIDEST_KEY))
        if values % heads:
            raise ValueError(f"n_heads must divide the {values} values of expand_v, got {heads}")
        value = values // heads
        check_count("gate_rank", gate_rank)
        check_number("gate_power", gate_power, above=0)
        super().__init__(d_model, n_heads=heads, key_dim=size, value_dim=value, d_conv=d_conv, bias=bias)
        self.gate_power = gate_power
        self.decay_proj = nn.Sequential(nn.Linear(d_model, gate_rank, bias=False), nn.Linear(gate_rank, keys))
        self.reset_parameters()

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        """The recurrence with a decay for every key."""
        raw = self.decay_proj(x).to(accumulator(x.dtype))
        log_decay = F.logsigmoid(raw).unflatten(-1, (self.n_heads, -1)) / self.gate_power
        o, S = linear_attention(q, k, v, log_decay, None if state is None else state["S"], cu_seqlens=packing)
        return o, {"S": S}
