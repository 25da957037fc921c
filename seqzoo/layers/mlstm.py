"""mLSTM: the matrix memory of xLSTM, with exponential gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.kernels.linear_attention.op import WIDEST_KEY, check_keys
from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec, register
from seqzoo.modules.heads import OutputNorm, count_heads
from seqzoo.modules.options import check_count, check_flags, scaled_width
from seqzoo.modules.positions import count_positions
from seqzoo.modules.short_conv import ShortConv
from seqzoo.packing import Packing

# doublings of the stabiliser's reach in a compiled graph, which does not know the length: 2^30 tokens
DOUBLINGS = 30
# exp(80) times any output is finite in float32
STEEPEST = 80.0


@register("mlstm", paper="xLSTM: Extended Long Short-Term Memory", arxiv="2405.04517", year=2024)
class MLSTM(SequenceMixer):
    """The mLSTM block of xLSTM, https://arxiv.org/abs/2405.04517, section 2.3 and figure 10.

    With ``[u, z] = W_up x`` of ``E = expand * d_model`` channels each and ``c = silu(conv(u))``; q and k are
    block-diagonal maps of c, v one of u; for every head, with ``log f = logsigmoid(w_f [q, k, v])`` and
    ``i = w_i [q, k, v]``::

        m_t = max(log f_t + m_{t-1}, i_t)                 keeps the exponentials finite; the outputs do not depend on it
        S_t = exp(log f_t + m_{t-1} - m_t) S_{t-1} + exp(i_t - m_t) k_t v_t^T / sqrt(K)
        n_t = exp(log f_t + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t) k_t / sqrt(K)
        h_t = q_t S_t / max(|q_t n_t|, exp(-m_t))
        y_t = W_down ((norm(h_t) + skip c_t) silu(z_t))

    The norm is an RMS norm of every head where the authors' code has a layer norm.

    State: ``{"conv": (B, d_conv - 1, E), "S": (B, H, K, K), "n": (B, H, K), "m": (B, H)}``, the first of the inputs'
    dtype, the others float32 (float64 for float64 inputs).

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads, 4 as in the paper unless they do not divide E or would have more than 256 keys each.
        expand: Channels in multiples of ``d_model``.
        d_conv: Taps of the convolution; None means without.
        block_size: Width of the blocks of the maps to q, k and v.
        bias: Whether the outer projections have biases.
    """

    packs = True
    variants = ({"n_heads": 2}, {"n_heads": 4, "expand": 1, "d_conv": None, "block_size": 2, "bias": True})

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        expand: float = 2,
        d_conv: int | None = 4,
        block_size: int = 4,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model)
        self.width = scaled_width(d_model, "expand", expand)
        self.n_heads, self.head_dim = count_heads(self.width, n_heads, None, min(-(-self.width // 4), WIDEST_KEY))
        check_flags(bias=bias)
        check_keys(self.head_dim)
        if self.width % check_count("block_size", block_size):
            raise ValueError(f"block_size must divide the {self.width} channels, got {block_size}")
        blocks = self.width // block_size
        self.up_proj = nn.Linear(d_model, 2 * self.width, bias=bias)
        self.conv1d = None if d_conv is None else ShortConv(self.width, d_conv)
        self.qkv_weight = nn.Parameter(torch.empty(3, blocks, block_size, block_size))
        self.gates_proj = nn.Linear(3 * self.width, 2 * self.n_heads)
        self.norm = OutputNorm(self.head_dim, gate=None)
        self.skip = nn.Parameter(torch.empty(self.width))
        self.out_proj = nn.Linear(self.width, d_model, bias=bias)
        self.reset_parameters()

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Projects, convolves, runs the memory, normalises, gates, projects."""
        u, z = self.up_proj(x).chunk(2, dim=-1)
        c, after = u, {}
        if self.conv1d is not None:
            c, conv = self.conv1d(u, None if state is None else state["conv"].to(u.dtype), packing)
            # under autocast the projection is narrower than x, whose dtype the state of a convolution has
            after["conv"] = conv.to(x.dtype)
        q, k, v = (self._blocks(value, weight) for value, weight in zip((c, c, u), self.qkv_weight, strict=True))
        forget, enter = self.gates_proj(torch.cat((q, k, v), dim=-1)).to(accumulator(x.dtype)).chunk(2, dim=-1)
        q, k, v = (value.unflatten(-1, (self.n_heads, -1)) for value in (q, k, v))
        log_f = F.logsigmoid(forget)
        before, m, last = stabiliser(log_f, enter, None if state is None else state["m"], packing)
        k = (k * (torch.exp(enter - m) * self.head_dim**-0.5)[..., None]).to(v.dtype)
        given = None if state is None else torch.cat((state["S"], state["n"][..., None]), dim=-1)
        # the sum of the keys is one more column
        v = F.pad(v, (0, 1), value=1.0)
        log_decay = log_f + before - m
        # never positive but for a rounding of the size of m
        log_decay = log_decay - log_decay.detach().clamp(min=0)
        o, S = linear_attention(q, k, v, log_decay, given, scale=1.0, cu_seqlens=packing)
        o = o.to(m.dtype)
        h = o[..., :-1] / torch.maximum(o[..., -1:].abs(), torch.exp(-m.clamp(min=-STEEPEST))[..., None])
        y = (self.norm(h.to(u.dtype)).flatten(2) + self.skip.to(c.dtype) * c) * F.silu(z)
        return Mixed(self.out_proj(y), after | {"S": S[..., :-1], "n": S[..., -1], "m": last})

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """The convolution's last inputs, the memory, the sum of its keys, and the logarithm of both their scales."""
        kind, rows = accumulator(dtype), (batch_size, self.n_heads)
        memory = {
            "S": ((*rows, self.head_dim, self.head_dim), kind),
            "n": ((*rows, self.head_dim), kind),
            "m": (rows, kind),
        }
        return memory if self.conv1d is None else {"conv": self.conv1d.state_spec(batch_size, dtype), **memory}

    def reset_parameters(self) -> None:
        """Input gates near 1, forget gates that begin open with biases from 3 to 6 over the heads, as in its code."""
        for layer in (self.up_proj, self.conv1d, self.norm, self.out_proj):
            if layer is not None:
                layer.reset_parameters()
        for layer in (self.up_proj, self.out_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        bound = self.qkv_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.qkv_weight, -bound, bound)
        nn.init.ones_(self.skip)
        nn.init.zeros_(self.gates_proj.weight)
        with torch.no_grad():
            forget, enter = self.gates_proj.bias.chunk(2)
            forget.copy_(torch.linspace(3.0, 6.0, self.n_heads, device=forget.device))
            enter.normal_(std=0.1)

    def _blocks(self, x: Tensor, weight: Tensor) -> Tensor:
        parts = x.unflatten(-1, (weight.shape[0], -1))
        return torch.einsum("btnk,nkl->btnl", parts, weight.to(x.dtype)).flatten(2)


def stabiliser(
    log_f: Tensor, enter: Tensor, initial: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``m_t = max(log_f_t + m_{t-1}, enter_t)`` within every sequence, by doubling.

    With gradients, which the outputs do not need but the tensors of a state, each by itself, do.

    Args:
        log_f: ``(B, T, H)``.
        enter: ``(B, T, H)``.
        initial: m before the first token, ``(B, H)`` or one row a packed sequence; zero when omitted.
        packing: Of packed sequences.

    Returns:
        m before every token, m behind it, and m behind the last token of every sequence.
    """
    total, heads = log_f.shape[1:]
    since, lengths = count_positions(log_f, None, packing)
    if initial is None:
        initial = log_f.new_zeros(lengths.shape[0], heads)
    rows = initial[:, None] if packing is None else initial[packing.sequence_index][None]
    sums, m = log_f, enter
    doublings = DOUBLINGS if torch.compiler.is_compiling() else max(total - 1, 0).bit_length()
    for step in (2**power for power in range(doublings)):
        connected = (since >= step)[..., None]
        m = torch.where(connected, torch.maximum(m, sums + m.roll(step, 1)), m)
        sums = torch.where(connected, sums + sums.roll(step, 1), sums)
    m = torch.maximum(m, sums + rows)
    before = torch.where((since > 0)[..., None], m.roll(1, 1), rows)
    if packing is None:
        # a state must not keep all tokens alive
        return before, m, m[:, -1].clone(memory_format=torch.contiguous_format) if total else initial
    ends = (packing.cu_seqlens[1:].to(torch.int64) - 1).clamp(min=0)
    return before, m, torch.where((lengths > 0)[:, None], m[0][ends] if total else initial, initial)
