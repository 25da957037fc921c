"""``block_recurrence`` by matrix products over all sequences at once, on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.block_recurrence.reference import EPSILON


class _Turn(NamedTuple):
    """Who takes part in one step of the loop over blocks: the n-th block of every sequence that has one.

    Attributes:
        rows: The sequences.
        blocks: Their blocks.
        fresh: Of these, by place, those whose states are projected, because they are not inside the block already.
        entered: The others.
        done: Those whose block is complete.
    """

    rows: Tensor
    blocks: Tensor
    fresh: Tensor
    entered: Tensor
    done: Tensor


def _turns(layout: Tensor) -> list[_Turn]:
    inside, touched, complete = layout.tolist()
    first, total = [], 0
    for count in touched:
        first.append(total)
        total += count
    turns = []
    for index in range(max(touched, default=0)):
        rows = [row for row, count in enumerate(touched) if count > index]
        within = [index == 0 and inside[row] != 0 for row in rows]
        lists = (
            rows,
            [first[row] + index for row in rows],
            [place for place, one in enumerate(within) if not one],
            [place for place, one in enumerate(within) if one],
            [place for place, row in enumerate(rows) if complete[row] > index],
        )
        turns.append(_Turn(*(torch.tensor(one, dtype=torch.int64, device=layout.device) for one in lists)))
    return turns


class _Cell:
    """The maps of the states, in the precision of the tokens."""

    def __init__(
        self,
        kind: torch.dtype,
        heads: int,
        ids: Tensor,
        in_weight: Tensor,
        in_bias: Tensor | None,
        gate_weight: Tensor,
        gate_bias: Tensor,
        keep: Tensor | None,
        accumulated: torch.dtype,
    ) -> None:
        self.kind, self.heads, self.accumulated = kind, heads, accumulated
        self.ids, self.gate_weight, self.gate_bias = ids.to(kind), gate_weight.to(kind), gate_bias.to(kind)
        split = in_weight.shape[0] // 2
        self.query_weight, self.kv_weight = in_weight.to(kind).split(split)
        self.query_bias, self.kv_bias = (None, None) if in_bias is None else in_bias.to(kind).split(split)
        self.kept = None if keep is None else torch.sigmoid(keep.to(accumulated))

    def read(self, c: Tensor) -> Tensor:
        """What the projections see of the states."""
        return F.rms_norm(c, c.shape[-1:], eps=EPSILON).to(self.kind) + self.ids

    def heads_of(self, x: Tensor) -> Tensor:
        """``(R, S, H K)`` to ``(R, H, S, K)``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and weights of softmax attention, all by heads."""
        scores = (q @ k.mT).to(self.accumulated) * q.shape[-1] ** -0.5
        weights = scores.softmax(-1)
        return weights.to(self.kind) @ v, weights

    def attend_backward(
        self, gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        of_weights = (gradient @ v.mT).to(self.accumulated)
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        of_scores = of_scores.to(self.kind)
        return of_scores @ k, of_scores.mT @ q, weights.to(self.kind).mT @ gradient

    def look(self, read: Tensor, kv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Both attentions, ``(R, S, 2 D)``, and by heads q, k, v and weights of the one, then of the other."""
        queries = F.linear(read, self.query_weight, self.query_bias)
        q_s, q_t = (self.heads_of(part) for part in queries.chunk(2, dim=-1))
        k_s, v_s = (self.heads_of(part) for part in kv.chunk(2, dim=-1))
        k_t, v_t = k.transpose(1, 2), v.transpose(1, 2)
        own, own_weights = self.attend(q_s, k_s, v_s)
        other, other_weights = self.attend(q_t, k_t, v_t)
        h = torch.cat([part.transpose(1, 2).flatten(2) for part in (own, other)], dim=-1)
        return h, (q_s, k_s, v_s, own_weights, q_t, k_t, v_t, other_weights)

    def change(self, c: Tensor, h: Tensor) -> Tensor:
        """The next states."""
        raw = F.linear(h, self.gate_weight, self.gate_bias).to(self.accumulated)
        if self.kept is not None:
            return self.kept * c + (1 - self.kept) * raw
        z, i, f = raw.chunk(3, dim=-1)
        return torch.sigmoid(f + 1) * c + torch.sigmoid(i - 1) * torch.tanh(z)

    def change_backward(self, gradient: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of c, of what the map gives, and of the logits of what is kept."""
        raw = F.linear(h, self.gate_weight, self.gate_bias).to(self.accumulated)
        if self.kept is not None:
            of_kept = (gradient * (c - raw)).sum((0, 1)) * self.kept * (1 - self.kept)
            return gradient * self.kept, gradient * (1 - self.kept), of_kept
        z, i, f = raw.chunk(3, dim=-1)
        z, i, f = torch.tanh(z), torch.sigmoid(i - 1), torch.sigmoid(f + 1)
        of_raw = (gradient * i * (1 - z * z), gradient * z * i * (1 - i), gradient * c * f * (1 - f))
        return gradient * f, torch.cat(of_raw, dim=-1), None


def forward(
    states: Tensor, state_kv: Tensor, k: Tensor, v: Tensor, layout: Tensor, *parameters: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``block_recurrence_forward``."""
    cell = _Cell(k.dtype, k.shape[2], *parameters, states.dtype)  # pyright: ignore - as the op's schema orders them
    blocks = k.shape[0]
    kv = k.new_zeros((blocks, *state_kv.shape[1:]))
    starts = states.new_zeros((blocks, *states.shape[1:]))
    final = states.clone()
    for turn in _turns(layout):
        c = final[turn.rows]
        starts[turn.blocks] = c
        read = cell.read(c)
        if len(turn.entered):
            kv[turn.blocks[turn.entered]] = state_kv[turn.rows[turn.entered]]
        if len(turn.fresh):
            kv[turn.blocks[turn.fresh]] = F.linear(read[turn.fresh], cell.kv_weight, cell.kv_bias)
        if len(turn.done):
            here = turn.blocks[turn.done]
            h, _ = cell.look(read[turn.done], kv[here], k[here], v[here])
            final[turn.rows[turn.done]] = cell.change(c[turn.done], h)
    return kv, final, starts


def backward(
    grad_kv: Tensor,
    grad_final_states: Tensor,
    states: Tensor,
    state_kv: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Tensor,
    ids: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    keep: Tensor | None,
    kv: Tensor,
    starts: Tensor,
) -> tuple[Tensor, ...]:
    """As the op ``block_recurrence_backward``."""
    parameters = (ids, in_weight, in_bias, gate_weight, gate_bias, keep)
    cell = _Cell(k.dtype, k.shape[2], *parameters, states.dtype)
    kind, wide = k.dtype, states.dtype
    sums = [k.new_zeros(() if value is None else value.shape, dtype=wide) for value in parameters]
    of_ids, of_in, of_in_bias, of_gate, of_gate_bias, of_keep = sums
    half = state_kv.shape[2]
    arriving = grad_final_states.clone()
    grad_state_kv, grad_k, grad_v = torch.zeros_like(state_kv), torch.zeros_like(k), torch.zeros_like(v)
    for turn in reversed(_turns(layout)):
        c, of_kv, of_c = starts[turn.blocks], grad_kv[turn.blocks], arriving[turn.rows]
        read = cell.read(c)
        of_read = torch.zeros_like(c)
        if len(turn.done):
            here, seen = turn.blocks[turn.done], read[turn.done]
            h, by_heads = cell.look(seen, kv[here], k[here], v[here])
            of_c[turn.done], of_raw, of_kept = cell.change_backward(of_c[turn.done], c[turn.done], h)
            if of_kept is not None:
                of_keep += of_kept
            of_gate_bias += of_raw.sum((0, 1))
            of_raw = of_raw.to(kind)
            of_gate += _product(of_raw, h, wide)
            own, other = (cell.heads_of(part) for part in (of_raw @ cell.gate_weight).chunk(2, dim=-1))
            of_q_s, *of_own = cell.attend_backward(own, *by_heads[:4])
            of_q_t, *of_other = cell.attend_backward(other, *by_heads[4:])
            of_kv[turn.done] += torch.cat([_tokens(part).flatten(2) for part in of_own], dim=-1)
            grad_k[here], grad_v[here] = (_tokens(part) for part in of_other)
            of_queries = torch.cat([_tokens(part).flatten(2) for part in (of_q_s, of_q_t)], dim=-1)
            of_in[:half] += _product(of_queries, seen, wide)
            if cell.query_bias is not None:
                of_in_bias[:half] += of_queries.to(wide).sum((0, 1))
            of_read[turn.done] = (of_queries @ cell.query_weight).to(wide)
        if len(turn.fresh):
            of_fresh = of_kv[turn.fresh]
            of_in[half:] += _product(of_fresh, read[turn.fresh], wide)
            if cell.kv_bias is not None:
                of_in_bias[half:] += of_fresh.to(wide).sum((0, 1))
            of_read[turn.fresh] += (of_fresh @ cell.kv_weight).to(wide)
        if len(turn.entered):
            grad_state_kv[turn.rows[turn.entered]] = of_kv[turn.entered]
        of_ids += of_read.sum(0)
        # of the norm, from here on
        size = torch.rsqrt(c.square().mean(-1, keepdim=True) + EPSILON)
        along = (of_read * c).mean(-1, keepdim=True) * size * size
        arriving[turn.rows] = of_c + size * (of_read - along * c)
    of_parameters = [
        k.new_empty(0) if given is None else value.to(given.dtype)
        for value, given in zip(sums, parameters, strict=True)
    ]
    return arriving, grad_state_kv, grad_k, grad_v, *of_parameters


def _tokens(x: Tensor) -> Tensor:
    """``(R, H, S, K)`` to ``(R, S, H, K)``."""
    return x.transpose(1, 2)


def _product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """The gradient of a map's weight, ``(R, S, A)`` and ``(R, S, B)`` to ``(A, B)``."""
    return (left.flatten(0, 1).mT @ right.flatten(0, 1)).to(wide)
