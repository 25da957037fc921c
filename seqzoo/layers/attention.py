"""Softmax attention over all tokens so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.attention import attention
from seqzoo.mixer import State, StateSpec, register
from seqzoo.modules.attention import AttentionMixer
from seqzoo.modules.key_values import attend_to_cache, cache_spec
from seqzoo.modules.options import check_flags
from seqzoo.packing import Packing


@register("attention", paper="Attention Is All You Need", arxiv="1706.03762", year=2017)
class Attention(AttentionMixer):
    """Multi-head attention, https://arxiv.org/abs/1706.03762, section 3.2, with what language models have added::

        q_t, k_t, v_t = W x_t for every head        q and k are normalised (qk_norm) and rotated by t
        o_t = sum over s <= t of softmax_s(q_t k_s / sqrt(K)) v_s        y_t = W_o o_t

    Head h of the queries reads head ``h // (H // G)`` of the keys and values (https://arxiv.org/abs/2305.13245).

    State: the cache ``{"k": (B, capacity, G, K), "v": (B, capacity, G, K), "length": (B,)}`` of rotated keys and of
    values, of the inputs' dtype, with zeros behind ``length``. With gradients every call copies it. Without, it is
    written in place, doubles when it is full, and the state that was given must not be used again:
    :func:`seqzoo.fork` copies it. On a GPU a call with a state waits for the device to tell the lengths.

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads of queries, H; None means ``d_model // head_dim``.
        n_kv_heads: Heads of keys and values, G, which divides H; None means H.
        head_dim: Width of a head, K; None means the largest even divisor of ``d_model`` up to 64.
        causal: Whether tokens see no later one. Others read the future: no state, no decoding.
        rotary_base: Base of the rotary positions; None means that there are none.
        rotary_scaling: ``{"kind": "yarn", "factor": 4.0, "original": 4096}`` for sequences longer than those of
            training, or another kind of :class:`seqzoo.modules.rotary.Rotary`.
        qk_norm: Whether queries and keys of every head are RMS-normalised, with a scale a feature.
        sinks: Whether every head learns a score that joins its sums without a value.
        logit_cap: Greatest magnitude of scores; None means any.
        bias: Whether the projections have biases.
    """

    variants = (
        {"n_heads": 2},
        {"n_heads": 4, "n_kv_heads": 2, "qk_norm": True, "sinks": True, "logit_cap": 2.0, "bias": True},
        {"head_dim": 8, "n_kv_heads": 1, "rotary_scaling": {"kind": "yarn", "factor": 2, "original": 16}},
        {"n_heads": 2, "causal": False, "rotary_base": None},
    )

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
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
        check_flags(causal=causal)
        self.causal = causal
        if not causal:
            reason = "an output depends on the tokens after it"
            self.limits = dict.fromkeys(("step", "state", "causal"), reason)  # pyright: ignore - those of this one
        self.reset_parameters()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, packing: Packing | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """Attention to the cache and to one another."""
        if not self.causal:
            return attention(q, k, v, causal=False, cu_seqlens=packing, **self.options())[0], None
        return attend_to_cache(q, k, v, state, packing, return_state, **self.options())

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """A cache."""
        return cache_spec(batch_size, self.n_kv_heads, self.head_dim, self.head_dim, dtype) if self.causal else {}

    def pairs(self, length: int) -> int:
        """Half of all pairs, or all."""
        return super().pairs(length) if self.causal else length**2
