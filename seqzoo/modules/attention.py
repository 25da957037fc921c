"""What attention layers share: grouped heads from one projection, norms and rotary positions of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.mixer import Mixed, SequenceMixer, State
from seqzoo.modules.heads import count_heads
from seqzoo.modules.options import check_count, check_flags, check_number
from seqzoo.modules.positions import count_positions
from seqzoo.modules.rotary import Rotary
from seqzoo.packing import Packing


class AttentionMixer(SequenceMixer):
    """Queries, keys and values of grouped heads, their norms and positions; a subclass defines :meth:`attend`.

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads of queries, H; None means ``d_model // head_dim``.
        n_kv_heads: Heads of keys and values, G; None means H.
        head_dim: Width of a head, K; None means the largest even divisor of ``d_model`` up to 64.
        rotary_base: Base of the rotary positions; None means that there are none.
        rotary_scaling: As of :class:`Rotary`.
        qk_norm: Whether queries and keys of every head are RMS-normalised, with a scale a feature.
        sinks: Whether every head learns a score that joins its sums without a value.
        logit_cap: Greatest magnitude of scores; None means any.
        bias: Whether the projections have biases.

    Raises:
        TypeError: If the scaling is no mapping.
        ValueError: If the heads do not divide, or an option does not fit.
    """

    packs = True
    fp32_parameters = ("sinks",)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None,
        n_kv_heads: int | None,
        head_dim: int | None,
        rotary_base: float | None,
        rotary_scaling: Mapping[str, Any] | None,
        qk_norm: bool,
        sinks: bool,
        logit_cap: float | None,
        bias: bool,
    ) -> None:
        super().__init__(d_model)
        check_flags(qk_norm=qk_norm, sinks=sinks, bias=bias)
        if n_heads is None and head_dim is None:
            head_dim = max((size for size in range(2, 65, 2) if d_model % size == 0), default=None)
        self.n_heads, self.head_dim = count_heads(d_model, n_heads, head_dim, 64)
        self.n_kv_heads = self.n_heads if n_kv_heads is None else check_count("n_kv_heads", n_kv_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads must divide the {self.n_heads} heads, got {n_kv_heads}")
        if rotary_base is None and rotary_scaling is not None:
            raise ValueError("rotary_scaling needs a rotary_base, which is None")
        if logit_cap is not None:
            check_number("logit_cap", logit_cap, above=0)
        self.logit_cap = logit_cap
        self.in_proj = nn.Linear(d_model, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim, bias=bias)
        self.rotary = None if rotary_base is None else Rotary(self.head_dim, base=rotary_base, scaling=rotary_scaling)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-5) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-5) if qk_norm else None
        self.sinks = nn.Parameter(torch.empty(self.n_heads)) if sinks else None
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, packing: Packing | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """q ``(B, T, H, K)`` and k, v ``(B, T, G, K)`` to o ``(B, T, H, K)`` and the state, or None."""
        raise NotImplementedError(f"{type(self).__name__} must define attend()")

    def options(self) -> dict[str, Any]:
        """What attention is told beside its tensors."""
        return {"sinks": self.sinks, "logit_cap": self.logit_cap}

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, T, D)`` to q ``(B, T, H, K)`` and k, v ``(B, T, G, K)``, normalised and rotated by positions."""
        heads, groups = self.n_heads, self.n_kv_heads
        qk, v = self.in_proj(x).unflatten(-1, (-1, self.head_dim)).split([heads + groups, groups], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([heads, groups], dim=2)
            qk = torch.cat((_normalised(q, self.q_norm), _normalised(k, self.k_norm)), dim=2)
        if self.rotary is not None:
            # at a token that is decoded the calls cost more than their work
            qk = self.rotary(qk, positions)
        q, k = qk.split([heads, groups], dim=2)
        return q, k, v

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Projects, rotates, attends, projects."""
        q, k, v = self.project(x, count_positions(x, None if state is None else state["length"], packing)[0])
        if state is None and not return_state:
            return Mixed(self.out_proj(self.attend(q, k, v, None, packing, False)[0].flatten(2)))
        # under autocast the projections are narrower than x, whose dtype the state has: a cache is never converted
        if state is not None:
            q, k, v = (one.to(x.dtype) for one in (q, k, v))
        o, after = self.attend(q, k, v, state, packing, return_state)
        if after is not None and q.dtype != x.dtype:
            after = {name: value.to(x.dtype) if name != "length" else value for name, value in after.items()}
        return Mixed(self.out_proj(o.flatten(2)), after)

    def flops(self, length: int) -> int:
        """2 a matrix weight and token, and a head's scores and sums over the keys that every query sees."""
        return super().flops(length) + 4 * self.d_model * self.pairs(length)

    def pairs(self, length: int) -> int:
        """Queries times the keys that each sees."""
        return length * (length + 1) // 2

    def reset_parameters(self) -> None:
        """PyTorch's initialisation with zero biases, scales of 1, sinks of 0."""
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.RMSNorm)):
                part.reset_parameters()
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)


def _normalised(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    dtype = accumulator(x.dtype)
    return F.rms_norm(x.to(dtype), tuple(norm.normalized_shape), norm.weight.to(dtype), norm.eps).to(x.dtype)
