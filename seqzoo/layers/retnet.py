"""RetNet: linear attention with rotary positions and a fixed decay a head."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.mixer import State, StateSpec, register
from seqzoo.modules.heads import HeadMixer, count_heads
from seqzoo.modules.options import scaled_width
from seqzoo.modules.positions import count_positions
from seqzoo.modules.rotary import Rotary
from seqzoo.packing import Packing


@register(
    "retnet",
    paper="Retentive Network: A Successor to Transformer for Large Language Models",
    arxiv="2307.08621",
    year=2023,
)
class RetNet(HeadMixer):
    """Multi-scale retention, "Retentive Network", https://arxiv.org/abs/2307.08621, section 2.

    For every head h, with queries and keys rotated by their positions::

        S_t = (1 - 2^(-5 - h)) S_{t-1} + k_t v_t^T        o_t = q_t S_t / sqrt(K)
        y_t = W_o (silu(W_g x_t) norm(o_t))

    State: ``{"S": (B, H, K, V), "position": (B,)}``, float32 (float64 for float64 inputs) and int64, and ``"conv"``
    with ``d_conv``.

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads; None means as many as ``head_dim`` needs.
        head_dim: K, even; None means 256, or the largest divisor of ``d_model`` below.
        expand_v: V in multiples of K.
        d_conv: Taps of a convolution before q, k and v are split; None means without.
        bias: Whether the projections have biases.
    """

    activation = None
    variants = ({"n_heads": 2}, {"n_heads": 4, "expand_v": 1, "d_conv": 2, "bias": True})

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2,
        d_conv: int | None = None,
        bias: bool = False,
    ) -> None:
        if n_heads is None and head_dim is None and d_model % 2 == 0:
            # rotations need pairs
            head_dim = 2 * count_heads(d_model // 2, None, None, 128)[1]
        heads, size = count_heads(d_model, n_heads, head_dim, 256)
        value = scaled_width(size, "expand_v", expand_v)
        super().__init__(d_model, n_heads=heads, key_dim=size, value_dim=value, d_conv=d_conv, bias=bias)
        self.rotary = Rotary(size)
        self.reset_parameters()

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        """Rotation, then the recurrence with decays that are constants of the architecture."""
        positions, after = count_positions(x, None if state is None else state["position"], packing)
        q, k = self.rotary(q, positions), self.rotary(k, positions)
        heads = torch.arange(self.n_heads, device=x.device, dtype=torch.float64)
        log_decay = torch.log1p(-torch.exp2(-5 - heads))
        log_decay = log_decay.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        o, S = linear_attention(q, k, v, log_decay, None if state is None else state["S"], cu_seqlens=packing)
        return o, {"S": S, "position": after}

    def recurrent_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """The matrix of every head, and how many tokens there were."""
        return super().recurrent_spec(batch_size, dtype) | {"position": ((batch_size,), torch.int64)}
