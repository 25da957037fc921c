"""Prefix linear attention: linear attention that sees the beginning of a sequence as a whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.layers.linear_attention import FEATURE_MAPS, LinearAttention
from seqzoo.mixer import Mixed, State, register
from seqzoo.packing import Packing


@register(
    "prefix_linear_attention",
    paper="Just read twice: closing the recall gap for recurrent language models",
    arxiv="2407.05483",
    year=2024,
)
class PrefixLinearAttention(LinearAttention):
    """Prefix linear attention of JRT-RNN, "Just read twice", https://arxiv.org/abs/2407.05483, section 4.

    Linear attention with a second pair of keys and values, k^e and v^e, for the first M tokens, the prefix. For every
    head, with features phi of queries and keys, and for *all* tokens t, those of the prefix too::

        S_t = sum over s <= M of phi(k^e_s) v^e_s^T + sum over s <= t of phi(k_s) v_s^T      z_t the same without values
        o_t = phi(q_t) S_t / (phi(q_t) z_t)

    M is each packed sequence's own, ``Packing.from_lengths(lengths, prefix_lengths=...)``; a dense batch and a packing
    without prefix lengths have none, and are causal. So is a sequence from its prefix on: a token of the prefix sees
    all of it, and should not be trained to predict the next one.

    A prefix lies in one piece: what a call is given as prefix it sees as a whole, one longer than its sequence is a
    ValueError. With a state given, the prefix is the beginning of the new tokens, which all see what went before as
    well; pieces that follow a prefix have none of their own.

    State: ``{"S": (B, H, features, head_dim), "z": (B, H, features)}``, float32 (float64 for float64 inputs), the
    prefix's sums included.

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads; None means as many as ``head_dim`` needs.
        head_dim: Width of a head; None means 16 with the Taylor map, else 64, or the largest divisor of ``d_model``
            below.
        feature_map: As of :class:`LinearAttention`; ``"taylor"`` is the paper's.
        bias: Whether the projections have biases.
    """

    variants = (
        {"head_dim": 4},
        {"n_heads": 2, "feature_map": "elu+1", "bias": True},
        {"n_heads": 4, "feature_map": "learned"},
    )

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        feature_map: str = "taylor",
        bias: bool = False,
    ) -> None:
        super().__init__(d_model, n_heads=n_heads, head_dim=head_dim, feature_map=feature_map, bias=bias)
        # rows of q, k, v, and behind them of the prefix's k and v
        self.in_proj = nn.Linear(d_model, sum(self.widths) + sum(self.widths[1:]), bias=bias)
        self.reset_parameters()

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Projects, adds the prefix's sums to the state, recurs."""
        weight, bias = self.in_proj.weight, self.in_proj.bias
        own = sum(self.widths)
        if packing is None or packing.prefix_lengths is None:
            qkv = F.linear(x, weight[:own], None if bias is None else bias[:own])
        else:
            qkv, prefix = self.in_proj(x).split((own, weight.shape[0] - own), dim=-1)
            state = self.read_prefix(prefix, state, packing, packing.prefix_lengths)
        o, after = self.remember(x, qkv, state, packing)
        return Mixed(self.read(x, o), after)

    def flops(self, length: int) -> int:
        """2 a matrix weight and token, of tokens without a prefix."""
        return super().flops(length) - 2 * length * self.d_model * sum(self.widths[1:])

    def read_prefix(self, prefix: Tensor, state: State | None, packing: Packing, lengths: Tensor) -> State:
        """The state with the sums over each sequence's prefix.

        Args:
            prefix: ``(1, T, 2 D)``, the prefix's keys and values, of which those behind the prefixes do not count.
            state: What it is added to; None for zero.
            packing: Of the sequences.
            lengths: int64 ``(S,)``, of the prefixes.
        """
        k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in prefix.split(self.widths[1:], dim=-1))
        if self.feature_proj is not None:
            k = torch.einsum("bthk,hkl->bthl", k, self.feature_proj[1].to(k.dtype))
        k = FEATURE_MAPS[self.feature_map][0](k).to(v.dtype)
        inside = (packing.positions < lengths[packing.sequence_index])[None, :, None, None]
        # both, because zero times NaN is NaN: what follows a prefix must not reach it
        k, v = k.where(inside, 0), F.pad(v, (0, 1), value=1.0).where(inside, 0)
        given = None if state is None else torch.cat((state["S"], state["z"][..., None]), dim=-1)
        # of no interest is what queries read: the sums are the final state; Dynamo refuses one tensor in two places
        _, S = linear_attention(k.detach(), k, v, None, given, causal=False, cu_seqlens=packing)
        return {"S": S[..., :-1], "z": S[..., -1]}
