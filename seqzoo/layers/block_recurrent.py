"""Block-recurrent transformer: attention in a window, and state vectors that change from block to block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.attention import attention
from seqzoo.kernels.block_recurrence import block_recurrence
from seqzoo.kernels.checks import accumulator
from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec, nearest, register
from seqzoo.modules.heads import count_heads
from seqzoo.modules.key_values import attend_to_ring, ring_spec
from seqzoo.modules.options import check_count, check_flags
from seqzoo.modules.positions import count_positions
from seqzoo.modules.rotary import Rotary
from seqzoo.packing import Packing

GATES = ("fixed", "lstm")


@register("block_recurrent", paper="Block-Recurrent Transformers", arxiv="2203.07852", year=2022)
class BlockRecurrent(SequenceMixer):
    """The recurrent layer of "Block-Recurrent Transformers", https://arxiv.org/abs/2203.07852, section 3.

    A sequence is cut into blocks of W tokens. Vertically every token attends to the last W tokens and, with another
    query, to the S state vectors as they were when its block began::

        q, q', k, v = W_in x_t
        y_t = W_o [attention(q, the last W k and v), attention(q', k_s, v_s)]        q and k are rotated by t

    Horizontally, when a block is complete, the states c attend to one another and to the tokens of the block, whose
    keys and values are the same, and not rotated here; each state is told from the others by a learned id::

        q_s, q_t, k_s, v_s = W_c (rms_norm(c) + ids)
        h = [attention(q_s, k_s, v_s), attention(q_t, the block's k and v)]
        fixed gate: c' = sigmoid(b) c + (1 - sigmoid(b)) (W_z h + b_z)
        lstm gate:  c' = sigmoid(W_f h + b_f + 1) c + sigmoid(W_i h + b_i - 1) tanh(W_z h + b_z)

    States begin as zero, so that the first block sees the ids alone. There is no feed-forward part on their way (the
    paper's "skip"). The paper's relative bias of tokens is a rotation here, and the norm of the states is RMS.

    Blocks follow one another, T / W in a row; everything of the tokens, and all sequences, are done at once. Where
    blocks begin depends on how many tokens each sequence has seen: a call reads that on the host, once forwards and
    once backwards.

    State: ``{"states": (B, S, D), "state_k": (B, S, H, K), "state_v": (B, S, H, K)}``, c as float32 (float64 for
    float64 inputs) and its keys and values during the block that is under way, of the inputs' dtype, zero where none
    is; and the ring of the last tokens, ``{"k": (B, W, H, K), "v": (B, W, H, K), "length": (B,)}``, as of
    :class:`SlidingWindowAttention`.

    Args:
        d_model: Width of inputs and outputs, and of a state vector.
        block_size: W.
        n_states: S.
        n_heads: Heads, H; None means ``d_model // head_dim``.
        head_dim: Width of a head, K; None means the largest even divisor of ``d_model`` up to 64.
        gate: ``"fixed"`` or ``"lstm"``.
        rotary_base: Base of the rotary positions; None means that there are none.
        bias: Whether the projections have biases; that to the gate has one.
    """

    packs = True
    fp32_parameters = ("keep",)
    variants = (
        {"block_size": 3, "n_states": 4, "n_heads": 2},
        {"block_size": 2, "n_states": 3, "gate": "lstm", "n_heads": 4, "rotary_base": None, "bias": True},
        {"block_size": 6, "n_states": 2, "head_dim": 8},
    )

    def __init__(
        self,
        d_model: int,
        *,
        block_size: int = 512,
        n_states: int = 512,
        n_heads: int | None = None,
        head_dim: int | None = None,
        gate: str = "fixed",
        rotary_base: float | None = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model)
        check_flags(bias=bias)
        if gate not in GATES:
            raise ValueError(f"there is no gate {gate!r}; {nearest(str(gate), GATES)}")
        if n_heads is None and head_dim is None:
            head_dim = max((size for size in range(2, 65, 2) if d_model % size == 0), default=None)
        self.n_heads, self.head_dim = count_heads(d_model, n_heads, head_dim, 64)
        self.block_size, self.n_states = check_count("block_size", block_size), check_count("n_states", n_states)
        self.in_proj = nn.Linear(d_model, 4 * d_model, bias=bias)
        self.rotary = None if rotary_base is None else Rotary(self.head_dim, base=rotary_base)
        self.state_ids = nn.Parameter(torch.empty(self.n_states, d_model))
        self.state_proj = nn.Linear(d_model, 4 * d_model, bias=bias)
        self.gate_proj = nn.Linear(2 * d_model, d_model if gate == "fixed" else 3 * d_model)
        self.keep = nn.Parameter(torch.empty(d_model)) if gate == "fixed" else None
        self.out_proj = nn.Linear(2 * d_model, d_model, bias=bias)
        self.reset_parameters()

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Projects, attends to the window, runs the states over the blocks, attends to them, projects."""
        if x.shape[0] * x.shape[1] == 0:
            if state is None:
                rows = x.shape[0] if packing is None else packing.n_sequences
                state = self.init_state(rows, device=x.device, dtype=x.dtype)
            return Mixed(self.out_proj(torch.cat((x, x), dim=-1)), state)
        q, q_states, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in self.in_proj(x).chunk(4, dim=-1))
        # under autocast the projections are narrower than x, whose dtype the state has
        kind = q.dtype
        ring = None
        if state is not None:
            ring = {"k": state["k"].to(kind), "v": state["v"].to(kind), "length": state["length"]}
        positions, after = count_positions(x, None if ring is None else ring["length"], packing)
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        o, next_ring = attend_to_ring(q, k, v, ring, packing, return_state, self.block_size)

        blocks = Blocks.of(x, self.block_size, ring, packing)
        keys, values = (blocks.take(value, held) for value, held in self._unrotated(k, v, positions, ring))
        if state is None:
            states = x.new_zeros(blocks.rows, self.n_states, self.d_model, dtype=accumulator(x.dtype))
            entering = k.new_zeros(blocks.rows, self.n_states, 2 * self.d_model)
        else:
            states = state["states"]
            entering = torch.cat((state["state_k"].flatten(2), state["state_v"].flatten(2)), dim=-1).to(kind)
        kv, states = block_recurrence(
            states,
            entering,
            keys,
            values,
            blocks.layout,
            self.state_ids,
            self.state_proj.weight,
            self.state_proj.bias,
            self.gate_proj.weight,
            self.gate_proj.bias,
            self.keep,
        )
        by_state = (part.unflatten(-1, (self.n_heads, -1)).flatten(0, 1)[None] for part in kv.chunk(2, dim=-1))
        of_states, _ = attention(
            q_states.flatten(0, 1)[None],
            *by_state,
            causal=False,
            cu_seqlens=blocks.bounds,
            cu_seqlens_k=torch.arange(kv.shape[0] + 1, dtype=torch.int32, device=x.device) * self.n_states,
        )
        y = self.out_proj(torch.cat((o.flatten(2), of_states[0].unflatten(0, x.shape[:2]).flatten(2)), dim=-1))
        if next_ring is None:
            return Mixed(y)
        kept = {name: next_ring[name].to(x.dtype) for name in ("k", "v")}
        under_way = blocks.last(kv, entering, after).to(x.dtype).unflatten(-1, (2, self.n_heads, -1))
        found = {"states": states, "state_k": under_way[:, :, 0], "state_v": under_way[:, :, 1]}
        return Mixed(y, found | kept | {"length": after})

    def _unrotated(
        self, k: Tensor, v: Tensor, positions: Tensor, ring: State | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Keys and values of the tokens, each with those of the ring, none of them rotated.

        Keys of new tokens are turned back too, so that a token counts the same whichever call it came in.
        """
        if ring is None:
            held_k = held_v = None
        else:
            held_k, held_v = ring["k"], ring["v"]
        if self.rotary is not None:
            k = self.rotary(k, -positions)
            if ring is not None and held_k is not None:
                # the places before this one hold the tokens of the block that is under way; others are not taken
                place = torch.remainder(ring["length"], self.block_size)
                begin = (ring["length"] - place)[:, None]
                held_k = self.rotary(held_k, -(begin + torch.arange(self.block_size, device=k.device)))
        return [(k, held_k), (v, held_v)]

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """The state vectors, their keys and values in the block that is under way, and the ring."""
        vectors = (batch_size, self.n_states)
        heads = ((*vectors, self.n_heads, self.head_dim), dtype)
        return {
            "states": ((*vectors, self.d_model), accumulator(dtype)),
            "state_k": heads,
            "state_v": heads,
            **ring_spec(batch_size, self.block_size, self.n_heads, self.head_dim, self.head_dim, dtype),
        }

    def flops(self, length: int) -> int:
        """2 a weight and token, or state and complete block; 4 D a pair of a query and a key."""
        of_tokens = sum(part.weight.numel() for part in (self.in_proj, self.out_proj))
        of_states = sum(part.weight.numel() for part in (self.state_proj, self.gate_proj))
        inside, blocks = min(length, self.block_size), length // self.block_size
        pairs = inside * (inside + 1) // 2 + (length - inside) * self.block_size + length * self.n_states
        pairs += blocks * self.n_states * (self.n_states + self.block_size)
        return 2 * length * of_tokens + 2 * blocks * self.n_states * of_states + 4 * self.d_model * pairs

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """The states' ids and the logits of what they keep do not decay."""
        names = ("state_ids",) if self.keep is None else ("state_ids", "keep")
        return {name: {"weight_decay": 0.0} for name in names}

    def reset_parameters(self) -> None:
        """PyTorch's initialisation with zero biases, standard normal ids; half of a state is kept, more or less."""
        for layer in (self.in_proj, self.state_proj, self.gate_proj, self.out_proj):
            layer.reset_parameters()
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.state_ids)
        if self.keep is not None:
            nn.init.normal_(self.keep, std=0.1)


class Blocks(NamedTuple):
    """The blocks in which the tokens of a call lie, those of a sequence behind one another.

    There are as many, N, as the tokens could touch at most, so that no shape depends on values; the last may be empty.

    Attributes:
        rows: R, the sequences.
        layout: int64 ``(3, R)``, as :func:`seqzoo.kernels.block_recurrence` takes it.
        lengths: int64 ``(R,)``, the new tokens of each sequence.
        ends: int64 ``(R,)``, behind the last block of each sequence.
        bounds: int32 ``(N + 1,)``, the tokens before each block.
        source: int64 ``(N, W)``, for every place in a block where its token is: among the W places of each sequence's
            ring, and behind those among the new tokens. Anywhere, where a block has no token.
    """

    rows: int
    layout: Tensor
    lengths: Tensor
    ends: Tensor
    bounds: Tensor
    source: Tensor

    @classmethod
    def of(cls, x: Tensor, size: int, ring: State | None, packing: Packing | None) -> Blocks:
        """Those of tokens ``(B, T, D)``, in blocks of ``size``, which follow those of a ring."""
        batch, total = x.shape[:2]
        if packing is None:
            rows, count = batch, batch * ((total + 2 * size - 2) // size)
            lengths = torch.full((batch,), total, device=x.device)
            first = torch.arange(batch, device=x.device) * total
        else:
            rows = packing.n_sequences
            count = (total + rows * (2 * size - 2)) // size
            lengths, first = packing.lengths.to(torch.int64), packing.cu_seqlens[:-1].to(torch.int64)
        inside = torch.zeros_like(lengths) if ring is None else torch.remainder(ring["length"], size)
        reach = inside + lengths
        touched = torch.where(lengths > 0, (reach + size - 1) // size, 0)
        ends = touched.cumsum(0)
        layout = torch.stack((inside, touched, torch.where(lengths > 0, reach // size, 0)))

        block = torch.arange(count, device=x.device)
        row = torch.bucketize(block, ends, right=True).clamp(max=rows - 1)
        # where the block begins in the sequence, counted from its first new token
        begin = (block - (ends - touched)[row]) * size - inside[row]
        bounds = torch.where(block < ends[-1], first[row] + begin.clamp(min=0), batch * total)
        bounds = torch.cat((bounds, bounds.new_full((1,), batch * total))).to(torch.int32)
        places = torch.arange(size, device=x.device)
        token = begin[:, None] + places
        source = first[row, None] + token
        if ring is not None:
            source = torch.where(token < 0, row[:, None] * size + places, rows * size + source)
        taken = (token < lengths[row, None]) & (block < ends[-1])[:, None]
        return cls(rows, layout, lengths, ends, bounds, torch.where(taken, source, 0))

    def take(self, new: Tensor, held: Tensor | None) -> Tensor:
        """New tokens ``(B, T, H, K)`` and those of rings ``(R, W, H, K)`` by blocks, ``(N, W, H, K)``."""
        tokens = new.flatten(0, 1) if held is None else torch.cat((held.flatten(0, 1), new.flatten(0, 1)))
        return tokens.index_select(0, self.source.flatten()).unflatten(0, self.source.shape)

    def last(self, kv: Tensor, given: Tensor, after: Tensor) -> Tensor:
        """What each sequence has in the block that is under way after so many tokens; zero between two blocks.

        Args:
            kv: ``(N, S, 2 D)``.
            given: ``(R, S, 2 D)``, what sequences without new tokens keep.
            after: int64 ``(R,)``.
        """
        found = kv.index_select(0, (self.ends - 1).clamp(min=0))
        found = torch.where((torch.remainder(after, self.source.shape[1]) > 0)[:, None, None], found, 0)
        return torch.where((self.lengths > 0)[:, None, None], found, given)
