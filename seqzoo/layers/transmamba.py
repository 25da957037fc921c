"""TransMamba: one set of projections, read as attention by the first tokens and as a state space by the others."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from seqzoo.kernels.attention import attention
from seqzoo.layers.mamba2 import Mamba2
from seqzoo.mixer import State, StateSpec, register
from seqzoo.modules.compaction import Compaction
from seqzoo.modules.key_values import attend_to_joined, replace_places, token_positions
from seqzoo.packing import Packing


@register(
    "transmamba",
    paper="TransMamba: Flexibly Switching between Transformer and Mamba",
    arxiv="2503.24067",
    year=2025,
)
class TransMamba(Mamba2):
    """TransMamba, https://arxiv.org/abs/2503.24067, over the projections, convolution, gate and norm of Mamba-2::

        q = C    k = B    v = x
        o_t = softmax over s <= t of (q_t k_s / sqrt(d_state)) v_s                                for t < P
        o_t = q_t S_t    S_t = exp(-exp(A_log) step_t) S_{t-1} + k_t (step_t v_t)^T                for t >= P
        y_t = W_out (norm((o_t + D v_t) silu(z_t)))

    The state space enters the transition point P with what it would hold had it run from the start,
    ``S = sum over s < P of exp(sum of the log decays after s) k_s (step_s v_s)^T``: the paper's memory converter, which
    loses nothing. So tokens from P on are those of Mamba-2, and those before P are those of attention. Models change P
    from layer to layer, for example 0, 128, 256 and so on up to 8192, and again: ``pattern`` takes one entry a layer.

    State: ``{"conv": (B, d_conv - 1, E + 2 G d_state), "S": (B, H, d_state, head_dim), "k": (B, P, G, d_state),
    "v": (B, P, H, head_dim), "length": (B,)}``: what Mamba-2 has, the keys and values of the first P tokens, of the
    inputs' dtype, and the tokens seen.

    Args:
        d_model: Width of inputs and outputs.
        transition_point: P, the tokens at the start of a sequence that attend to one another; 0 is Mamba-2.
        d_state: Rows of a head's state, which is the width of q and k.
        d_conv: Taps of the convolution, 2 to 8.
        expand: Channels E in multiples of ``d_model``.
        n_heads: Heads; None means as many as ``head_dim`` needs.
        head_dim: Channels of a head; None means 64, or the largest divisor of E below.
        n_groups: Groups of heads that share q and k.
        bias: Whether W_in and W_out have biases.
    """

    variants = (
        {"transition_point": 7, "d_state": 4, "n_heads": 2},
        {"transition_point": 3, "d_state": 3, "n_heads": 4, "n_groups": 2, "d_conv": 2, "bias": True},
    )

    def __init__(
        self,
        d_model: int,
        *,
        transition_point: int = 512,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        n_heads: int | None = None,
        head_dim: int | None = None,
        n_groups: int = 1,
        bias: bool = False,
    ) -> None:
        try:
            point = operator.index(transition_point)
        except TypeError:
            point = -1
        if isinstance(transition_point, bool) or point < 0:
            raise ValueError(f"transition_point must be an integer from 0 on, got {transition_point!r}")
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            n_heads=n_heads,
            head_dim=head_dim,
            n_groups=n_groups,
            bias=bias,
        )
        self.transition_point = point

    def recur(
        self,
        C: Tensor,
        B: Tensor,
        values: Tensor,
        log_decay: Tensor,
        u: Tensor,
        state: State | None,
        packing: Packing | None,
    ) -> tuple[Tensor, State]:
        """Both readings, of which each token takes one."""
        o, after = super().recur(C, B, values, log_decay, u, state, packing)
        # heads that share q and k attend alike: they are one with the values of all
        v = u.unflatten(2, (self.n_groups, -1)).flatten(3)
        if state is None:
            rows = u.shape[0] if packing is None else packing.n_sequences
            held = {"k": B.new_zeros(rows, self.transition_point, *B.shape[2:]), "length": B.new_zeros(rows).long()}
            held["v"] = v.new_zeros(rows, self.transition_point, *v.shape[2:])
        else:
            held = {
                "k": state["k"].to(B.dtype),
                "v": state["v"].to(v.dtype).unflatten(2, (self.n_groups, -1)).flatten(3),
            }
            held["length"] = state["length"]
        places = torch.arange(self.transition_point, device=u.device).expand(held["length"].shape[0], -1)
        kept = replace_places(held, B, v, packing, places)
        after |= {
            "k": kept["k"],
            "v": kept["v"].unflatten(3, (-1, self.head_dim)).flatten(2, 3),
            "length": kept["length"],
        }
        if self.transition_point == 0:
            return o, after
        if state is None and packing is None and not torch.compiler.is_compiling():
            first = self.transition_point
            attended, _ = attention(C[:, :first], B[:, :first], v[:, :first])
            return torch.cat((self._heads(attended), o[:, first:]), 1), after
        _, position = token_positions(u, held["length"], packing)
        active = (position < self.transition_point).view(u.shape[:2])
        early = Compaction.of(active, packing)
        places = torch.where(places < held["length"][:, None], places, -1)
        q, k, v = (early.gather(value) for value in (C, B, v))
        attended = attend_to_joined(q, k, v, held, places, early.packing)
        return torch.where(active[..., None, None], early.scatter(self._heads(attended), active), o), after

    def _heads(self, attended: Tensor) -> Tensor:
        """``(B, T, G, H / G head_dim)`` to ``(B, T, H, head_dim)``."""
        return attended.unflatten(3, (-1, self.head_dim)).flatten(2, 3)

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """Mamba-2's, and the first keys and values."""
        shape = batch_size, self.transition_point
        return super().state_spec(batch_size, dtype) | {
            "k": ((*shape, self.n_groups, self.d_state), dtype),
            "v": ((*shape, self.n_heads, self.head_dim), dtype),
            "length": ((batch_size,), torch.int64),
        }

    def flops(self, length: int) -> int:
        """Those of Mamba-2, and scores and sums of the first tokens."""
        first = min(length, self.transition_point)
        return super().flops(length) + first * (first + 1) * (self.n_groups * self.d_state + self.width)
