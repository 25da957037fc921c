"""HGRN2: gated linear attention whose keys are what the decay leaves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.mixer import State, register
from seqzoo.modules.heads import HeadMixer, count_heads
from seqzoo.modules.options import check_number
from seqzoo.packing import Packing


@register("hgrn2", paper="HGRN2: Gated Linear RNNs with State Expansion", arxiv="2404.07904", year=2024)
class HGRN2(HeadMixer):
    """HGRN2, "Gated Linear RNNs with State Expansion", https://arxiv.org/abs/2404.07904, section 3.

    For every head, with ``q = silu(W_q x)`` and ``f = lower_bound + (1 - lower_bound) sigmoid(W_f x)``::

        S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T        o_t = q_t S_t
        y_t = W_o norm(o_t)

    HGRN2 raises ``lower_bound`` from layer to layer. Each head has a norm of its own; the authors' code has one over
    all heads.

    State: ``{"S": (B, H, K, K)}``, float32 (float64 for float64 inputs), and ``"conv"`` with ``d_conv``.

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads; None means as many as ``head_dim`` needs.
        head_dim: K; None means 128, or the largest divisor of ``d_model`` below.
        lower_bound: Least factor on the state, at least 0 and below 1.
        d_conv: Taps of a convolution before q, f and v are split; None means without.
        bias: Whether the projections have biases.
    """

    activation = None
    gate = None
    variants = ({"n_heads": 2}, {"n_heads": 4, "lower_bound": 0.5, "d_conv": 2, "bias": True})

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        lower_bound: float = 0.0,
        d_conv: int | None = None,
        bias: bool = False,
    ) -> None:
        heads, size = count_heads(d_model, n_heads, head_dim, 128)
        if not 0 <= check_number("lower_bound", lower_bound) < 1:
            raise ValueError(f"lower_bound must be at least 0 and below 1, got {lower_bound}")
        super().__init__(d_model, n_heads=heads, key_dim=size, value_dim=size, d_conv=d_conv, bias=bias)
        self.lower_bound = lower_bound
        self.reset_parameters()

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        """The recurrence; k is the projection of f."""
        raw = k.to(accumulator(k.dtype))
        # 1 - f without cancelling; f's logarithm without losing small ones
        keys = (1 - self.lower_bound) * torch.sigmoid(-raw)
        log_decay = F.logsigmoid(raw) if self.lower_bound == 0 else torch.log1p(-keys)
        given = None if state is None else state["S"]
        o, S = linear_attention(F.silu(q), keys.to(q.dtype), v, log_decay, given, scale=1.0, cu_seqlens=packing)
        return o, {"S": S}
