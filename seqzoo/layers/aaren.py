"""Aaren: softmax attention with one learned query a head, which is a recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.linear_scan import linear_scan
from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec, register
from seqzoo.modules.heads import count_heads
from seqzoo.modules.options import check_flags
from seqzoo.modules.positions import count_positions
from seqzoo.modules.short_conv import ShortConv
from seqzoo.packing import Packing

# doublings of the greatest score's reach in a compiled graph, which does not know the length: 2^30 tokens
DOUBLINGS = 30


@register("aaren", paper="Attention as an RNN", arxiv="2405.13956", year=2024)
class Aaren(SequenceMixer):
    """Attention as a recurrent network, https://arxiv.org/abs/2405.13956, section 3.

    For every head, with a learned query q and the scores ``s_t = q k_t / sqrt(K)``::

        m_t = max(m_{t-1}, s_t)                keeps the exponentials finite; the outputs do not depend on it
        u_t = exp(m_{t-1} - m_t) u_{t-1} + exp(s_t - m_t)
        w_t = exp(m_{t-1} - m_t) w_{t-1} + exp(s_t - m_t) v_t
        o_t = w_t / u_t = sum over s <= t of softmax_s(q k_s / sqrt(K)) v_s        y_t = W_o o_t

    It pools: the query is the same for every token, so an output is a weighted mean of what came so far, and no token
    can look another one up. Order shows in the keys alone, where a convolution or positions put it.

    State: ``{"m": (B, H), "u": (B, H), "w": (B, H, K)}``, float32 (float64 for float64 inputs), and ``"conv"`` with
    ``d_conv``, of the inputs' dtype. Without tokens u is zero, and m counts as minus infinity.

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads; None means as many as ``head_dim`` needs.
        head_dim: Width of a head, K; None means 64, or the largest divisor of ``d_model`` below.
        d_conv: Taps of a convolution before k and v are split; None means without.
        bias: Whether the projections have biases.
    """

    packs = True
    variants = ({"n_heads": 16}, {"n_heads": 8, "d_conv": 3, "bias": True})

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        d_conv: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model)
        check_flags(bias=bias)
        self.n_heads, self.head_dim = count_heads(d_model, n_heads, head_dim, 64)
        self.in_proj = nn.Linear(d_model, 2 * d_model, bias=bias)
        self.conv1d = None if d_conv is None else ShortConv(2 * d_model, d_conv, bias=False)
        self.query = nn.Parameter(torch.empty(self.n_heads, self.head_dim))
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        self.reset_parameters()

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Projects, convolves, scores, sums up, projects."""
        kv, after = self.in_proj(x), {}
        if self.conv1d is not None:
            kv, conv = self.conv1d(kv, None if state is None else state["conv"].to(kv.dtype), packing)
            # under autocast the projection is narrower than x, whose dtype the state of a convolution has
            after["conv"] = conv.to(x.dtype)
        kind = accumulator(x.dtype)
        k, v = (value.unflatten(-1, (self.n_heads, -1)).to(kind) for value in kv.chunk(2, dim=-1))
        # a matrix product would run in the narrower dtype under autocast
        scores = (k * self.query.to(kind)).sum(-1) * self.head_dim**-0.5
        before, m, last = running_maximum(scores, state, packing)
        # the sum of the weights is one more column
        added = (torch.exp(scores - m)[..., None] * F.pad(v, (0, 1), value=1.0)).flatten(2)
        kept = torch.exp(before - m)[..., None].expand(-1, -1, -1, self.head_dim + 1).flatten(2)
        given = None if state is None else torch.cat((state["w"], state["u"][..., None]), dim=-1).flatten(1)
        sums, final = linear_scan(kept, added, given, cu_seqlens=packing)
        sums, final = (value.unflatten(-1, (self.n_heads, -1)) for value in (sums, final))
        # the greatest term of u is 1
        o = (sums[..., :-1] / sums[..., -1:]).to(kv.dtype)
        return Mixed(self.out_proj(o.flatten(2)), after | {"m": last, "u": final[..., -1], "w": final[..., :-1]})

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """The convolution's last inputs, the greatest score, the sum of the weights and that of the weighted values."""
        kind, rows = accumulator(dtype), (batch_size, self.n_heads)
        spec: StateSpec = {"m": (rows, kind), "u": (rows, kind), "w": ((*rows, self.head_dim), kind)}
        return spec if self.conv1d is None else {"conv": self.conv1d.state_spec(batch_size, dtype), **spec}

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """Queries do not decay: that would make every output a plain mean."""
        return {"query": {"weight_decay": 0.0}}

    def reset_parameters(self) -> None:
        """PyTorch's initialisation with zero biases; standard normal queries."""
        for layer in (self.in_proj, self.conv1d, self.out_proj):
            if layer is not None:
                layer.reset_parameters()
        for layer in (self.in_proj, self.out_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.query)


def running_maximum(scores: Tensor, state: State | None, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
    """The greatest score so far in every sequence, with gradients.

    A scan that takes a score where it is a record and else keeps what it has: exact, and its gradient sums up in a
    fixed order.

    Args:
        scores: ``(B, T, H)``.
        state: ``"m"``, the greatest before, and ``"u"``, zero where there was no token; None for none anywhere.
        packing: Of packed sequences.

    Returns:
        That before every token, minus infinity where there is none; that behind it; and that behind the last token of
        every sequence.
    """
    since, lengths = count_positions(scores, None, packing)
    if state is None:
        initial = scores.new_zeros(lengths.shape[0], scores.shape[2])
        greatest = torch.full_like(initial, -torch.inf)
    else:
        initial, greatest = state["m"], state["m"].masked_fill(state["u"] == 0, -torch.inf)
    rows = greatest[:, None] if packing is None else greatest[packing.sequence_index][None]
    record = scores > _greatest_before(scores.detach(), rows.detach(), since, packing)
    m, last = linear_scan((~record).to(scores.dtype), scores.where(record, 0), initial, cu_seqlens=packing)
    return torch.where((since > 0)[..., None], m.roll(1, 1), rows), m, last


def _greatest_before(scores: Tensor, rows: Tensor, since: Tensor, packing: Packing | None) -> Tensor:
    """The greatest score before every token, ``(B, T, H)``, by doubling where sequences are packed."""
    if packing is None:
        return torch.cat((rows, scores), dim=1).cummax(dim=1).values[:, :-1]
    m, total = scores, scores.shape[1]
    doublings = DOUBLINGS if torch.compiler.is_compiling() else max(total - 1, 0).bit_length()
    for step in (2**power for power in range(doublings)):
        m = torch.where((since >= step)[..., None], torch.maximum(m, m.roll(step, 1)), m)
    return torch.where((since > 0)[..., None], torch.maximum(m.roll(1, 1), rows), rows)
