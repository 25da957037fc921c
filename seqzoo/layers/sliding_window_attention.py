"""Softmax attention over the last tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seqzoo.mixer import State, StateSpec, register
from seqzoo.modules.attention import AttentionMixer
from seqzoo.modules.key_values import attend_to_ring, ring_spec
from seqzoo.modules.options import check_count
from seqzoo.packing import Packing


@register("sliding_window_attention", paper="Longformer: The Long-Document Transformer", arxiv="2004.05150", year=2020)
class SlidingWindowAttention(AttentionMixer):
    """Attention to the last tokens alone, https://arxiv.org/abs/2004.05150, section 3.1, in its causal form::

        o_t = sum over t - window < s <= t of softmax_s(q_t k_s / sqrt(K)) v_s        y_t = W_o o_t

    State: a ring of constant size, ``{"k": (B, window, G, K), "v": (B, window, G, K), "length": (B,)}``: rotated keys
    and values, of the inputs' dtype, the token at position p at place ``p % window``, and the tokens seen.

    Args:
        d_model: Width of inputs and outputs.
        window: Tokens that a token sees, its own included.
        n_heads: Heads of queries, H; None means ``d_model // head_dim``.
        n_kv_heads: Heads of keys and values, G, which divides H; None means H.
        head_dim: Width of a head, K; None means the largest even divisor of ``d_model`` up to 64.
        rotary_base: Base of the rotary positions; None means that there are none.
        rotary_scaling: As of :class:`Attention`, like the four that follow.
        qk_norm: Whether queries and keys of every head are RMS-normalised.
        sinks: Whether every head learns a score that joins its sums without a value.
        logit_cap: Greatest magnitude of scores; None means any.
        bias: Whether the projections have biases.
    """

    variants = (
        {"window": 5, "n_heads": 2},
        {"window": 3, "n_heads": 4, "n_kv_heads": 2, "qk_norm": True, "sinks": True, "logit_cap": 2.0, "bias": True},
        {"window": 2, "rotary_base": None},
    )

    def __init__(
        self,
        d_model: int,
        *,
        window: int = 512,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary_base: float | None = 10000.0,
        rotary_scaling: Mapping[str, Any] | None = None,
        qk_norm: bool = False,
        sinks: bool = False,
        logit_cap: float | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rotary_base=rotary_base,
            rotary_scaling=rotary_scaling,
            qk_norm=qk_norm,
            sinks=sinks,
            logit_cap=logit_cap,
            bias=bias,
        )
        self.window = check_count("window", window)
        self.reset_parameters()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, packing: Packing | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """Attention to the ring and to one another."""
        return attend_to_ring(q, k, v, state, packing, return_state, self.window, **self.options())

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """A ring."""
        return ring_spec(batch_size, self.window, self.n_kv_heads, self.head_dim, self.head_dim, dtype)

    def pairs(self, length: int) -> int:
        """Those inside the window."""
        inside = min(length, self.window)
        return inside * (inside + 1) // 2 + (length - inside) * self.window
