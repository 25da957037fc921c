"""Lightning attention: linear attention with a fixed decay a head, as in TransNormerLLM and LASP."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.mixer import State, register
from seqzoo.modules.heads import HeadMixer, count_heads
from seqzoo.modules.options import check_number
from seqzoo.packing import Packing


@register(
    "lightning_attention",
    paper="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
    arxiv="2401.04658",
    year=2024,
)
class LightningAttention(HeadMixer):
    """Lightning attention, https://arxiv.org/abs/2401.04658.

    For every head h of H, with ``q, k, v = silu(W x)``::

        S_t = exp(-decay_scale 2^(-8 (h + 1) / H)) S_{t-1} + k_t v_t^T        o_t = q_t S_t
        y_t = W_o (sigmoid(W_g x_t) norm(o_t))

    These rates are those of the authors' code and of the models trained with it; the paper prints ``8 h / H``, with
    which most heads would forget everything within a token. TransNormerLLM, https://arxiv.org/abs/2307.14995, lowers
    ``decay_scale`` from layer to layer, ``1 - layer / n_layers``; its own layer has no activation on v or the gate, and
    one norm over all heads.

    State: ``{"S": (B, H, K, K)}``, float32 (float64 for float64 inputs), and ``"conv"`` with ``d_conv``.

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads; None means as many as ``head_dim`` needs.
        head_dim: K; None means 128, or the largest divisor of ``d_model`` below.
        decay_scale: Factor on the decay rates; 0 means no decay.
        d_conv: Taps of a convolution before q, k and v are split; None means without.
        bias: Whether the projections have biases.
    """

    gate = "sigmoid"
    variants = ({"n_heads": 2}, {"n_heads": 4, "decay_scale": 0.3, "d_conv": 2, "bias": True})

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        decay_scale: float = 1.0,
        d_conv: int | None = None,
        bias: bool = False,
    ) -> None:
        heads, size = count_heads(d_model, n_heads, head_dim, 128)
        if check_number("decay_scale", decay_scale) < 0:
            raise ValueError(f"decay_scale must not be negative, got {decay_scale}")
        super().__init__(d_model, n_heads=heads, key_dim=size, value_dim=size, d_conv=d_conv, bias=bias)
        self.decay_scale = decay_scale
        self.reset_parameters()

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        """The recurrence with decays that are constants of the architecture."""
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        heads = torch.arange(1, self.n_heads + 1, device=x.device, dtype=dtype)
        log_decay = -self.decay_scale * torch.exp2(-8 * heads / self.n_heads)
        given = None if state is None else state["S"]
        o, S = linear_attention(q, k, v, log_decay, given, scale=1.0, cu_seqlens=packing)
        return o, {"S": S}
