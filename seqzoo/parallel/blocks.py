"""Attention to keys that are not all there at once: the op's calls for each block, merged, and their derivative."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.kernels.attention import attention
from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.derivatives import once
from seqzoo.kernels.dispatch import chosen, slot
from seqzoo.parallel.exchange import Form, Group, message_bytes, once_a_forward, pack, unpack
from seqzoo.parallel.layout import Range, count, place
from seqzoo.parallel.ring import Ring, Transfer, block_forms
from seqzoo.parallel.spans import Call, Places, calls, spans


class Block(NamedTuple):
    """Keys, values, and the calls that attend to them; ``flat`` where those count all rows of a batch as one."""

    k: Tensor
    v: Tensor
    calls: list[Call]
    flat: bool = False


@dataclass(frozen=True, eq=False)
class Job:
    """What one call of :func:`parallel_attention` computes after its heads and keys have come.

    Attributes:
        group: The ranks.
        mixer: Name of the mixer, for errors.
        ring: How blocks go round.
        held: Tokens of the keys and values that are here from the beginning.
        own: The calls for them.
        earlier: Those for the keys and values of a state.
        causal: As of :func:`parallel_attention`, like the next three.
        window: Keys that a query sees at most.
        scale: Factor of the scores.
        logit_cap: Greatest magnitude of a score.
    """

    group: Group
    mixer: str
    ring: Ring
    held: tuple[Range, ...]
    own: list[Call]
    earlier: list[Call]
    causal: bool
    window: int | None
    scale: float | None
    logit_cap: float | None

    def calls(self, held: tuple[Range, ...]) -> list[Call]:
        """Those for keys of tokens that are held."""
        teams = self.ring.teams
        found = spans(teams.extent, teams.own, held)
        return calls(found, self.causal, self.window, teams.bounds is not None)

    def options(self, call: Call, queries: Places, keys: Places) -> dict[str, Any]:
        """Of the op."""
        return {
            "causal": call.kind.causal,
            "window": call.kind.window,
            "scale": self.scale,
            "logit_cap": self.logit_cap,
            "cu_seqlens": queries.bounds,
            "cu_seqlens_k": keys.bounds,
        }

    def first_blocks(self, k: Tensor, v: Tensor, state_k: Tensor | None, state_v: Tensor | None) -> list[Block]:
        """What is here from the beginning."""
        blocks = [Block(k, v, self.own)]
        if state_k is not None and state_v is not None:
            blocks.append(Block(state_k, state_v, self.earlier, flat=True))
        return blocks

    def own_message(self, k: Tensor, v: Tensor) -> Tensor | None:
        """What goes round of this team's block."""
        teams = self.ring.teams
        part = self.ring.parts[teams.rank]
        if not part:
            return None
        slices = [slice(place(teams.own, start), place(teams.own, end)) for start, end in part]
        return pack([torch.cat([x[:, one] for one in slices], 1) for x in (k, v)])

    def forms(self, owner: int, k: Tensor, v: Tensor, wide: bool = False) -> list[Form]:
        """The forms of a block that goes round, or of its gradients."""
        return block_forms(k, v, count(self.ring.parts[owner]), wide)

    def pass_block(self, hop: int, message: Tensor | None, k: Tensor, v: Tensor) -> Transfer:
        """Starts the hop of that number: the block that is here goes on, the one before comes."""
        ring, sent, wanted = self.ring, [], []
        if message is not None and ring.owner(hop, 1) is not None:
            sent.append((message, ring.rank(ring.teams.rank + 1)))
        owner = ring.owner(hop)
        if owner is not None:
            wanted.append((message_bytes(self.forms(owner, k, v)), ring.rank(ring.teams.rank - 1)))
        return Transfer(self.group, self.mixer, "keys and values", sent, wanted, k.device)

    def pass_gradients(self, hop: int, message: Tensor | None, k: Tensor, v: Tensor) -> Transfer:
        """Starts what follows a hop: the gradients of the block that is here go on with it, or home from the last."""
        ring, sent, wanted = self.ring, [], []
        here = ring.teams.rank
        owner = ring.owner(hop)
        if message is not None and owner is not None:
            sent.append((message, ring.rank(owner if hop == ring.hops[owner] else here + 1)))
        owner = ring.owner(hop + 1)
        if owner is not None:
            wanted.append((message_bytes(self.forms(owner, k, v, True)), ring.rank(here - 1)))
        if hop == ring.hops[here]:
            wanted.append((message_bytes(self.forms(here, k, v, True)), ring.rank(here + hop)))
        return Transfer(self.group, self.mixer, "gradients of keys and values", sent, wanted, k.device)

    def blocks(self, k: Tensor, v: Tensor, first: list[Block]) -> Iterator[tuple[int, list[Block]]]:
        """The number of every hop and what has come with it, while the next is under way; hop 0 is what is here."""
        blocks, message = first, self.own_message(k, v)
        for hop in range(self.ring.last + 1):
            transfer = self.pass_block(hop + 1, message, k, v) if hop < self.ring.last else None
            yield hop, blocks
            blocks, message = [], None
            owner = self.ring.owner(hop + 1)
            if transfer is not None and owner is not None:
                (message,) = transfer.wait()
                found = unpack(message, self.forms(owner, k, v))
                blocks = [Block(found[0], found[1], self.calls(self.ring.parts[owner]))]
            elif transfer is not None:
                transfer.wait()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: list[Block], sinks: Tensor | None) -> list[Tensor]:
        """o and lse."""
        dtype = accumulator(q.dtype)
        o = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=dtype)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
        for _, blocks in self.blocks(k, v, first):
            for block in blocks:
                rows = [_rows(x, block.flat) for x in (q, o, lse)]
                for call in block.calls:
                    self._merge(call, block, *rows)
        if sinks is not None:
            before, lse = lse, torch.logaddexp(lse, sinks.to(dtype))
            o *= (before - lse.masked_fill(lse == -torch.inf, 0.0)).exp_()[..., None]
        return [o.to(q.dtype), lse]

    def _merge(self, call: Call, block: Block, q: Tensor, o: Tensor, lse: Tensor) -> None:
        queries, keys = (Places(one, call.kind.reverse, q.device) for one in (call.queries, call.keys))
        found, sums = attention(
            queries.take(q), keys.take(block.k), keys.take(block.v), **self.options(call, queries, keys)
        )
        before = queries.take(lse)
        after = torch.logaddexp(before, sums)
        shift = after.masked_fill(after == -torch.inf, 0.0)
        kept = queries.take(o) * (before - shift).exp()[..., None]
        queries.put(o, kept.addcmul_(found.to(o.dtype), (sums - shift).exp()[..., None]))
        queries.put(lse, after)

    def differentiate(
        self, q: Tensor, k: Tensor, v: Tensor, first: list[Block], outcome: Sequence[Tensor]
    ) -> list[tuple[Tensor, ...]]:
        """The gradient of q, and those of keys and values of all blocks that were here from the beginning.

        Args:
            q: As for :meth:`attend`, like the next three.
            outcome: Gradients of o and lse, o and lse.
        """
        of_q = torch.zeros_like(q, dtype=accumulator(q.dtype), memory_format=torch.contiguous_format)
        here, ring = self.ring.teams.rank, self.ring
        totals: list[tuple[Tensor, ...]] = []
        home: Tensor | None = None
        transfer: Transfer | None = None
        for hop, blocks in self.blocks(k, v, first):
            sums = []
            for block in blocks:
                sums.append(tuple(torch.zeros_like(x, dtype=of_q.dtype) for x in (block.k, block.v)))
                rows = [_rows(x, block.flat) for x in (of_q, q, *outcome)]
                for call in block.calls:
                    self._add(call, block, sums[-1], *rows)
            if hop == 0:
                totals = sums
                continue
            arrived = None
            if transfer is not None:
                arrived, home = self._sort(hop - 1, transfer.wait(), home)
            message = None
            owner = ring.owner(hop)
            if owner is not None:
                if arrived is not None:
                    for total, part in zip(sums[0], unpack(arrived, self.forms(owner, k, v, True)), strict=True):
                        total.add_(part)
                message = pack(sums[0])
            transfer = self.pass_gradients(hop, message, k, v)
        if transfer is not None:
            _, home = self._sort(ring.last, transfer.wait(), home)
        if home is not None:
            part = ring.parts[here]
            offset = 0
            returned = unpack(home, self.forms(here, k, v, True))
            for start, end in part:
                tokens = slice(place(self.held, start), place(self.held, end))
                for total, value in zip(totals[0], returned, strict=True):
                    total[:, tokens].add_(value[:, offset : offset + end - start])
                offset += end - start
        return [(of_q,), *totals]

    def _sort(self, hop: int, received: list[Tensor], home: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What followed a hop: the gradients of the block that comes next, and of this team's own."""
        remaining = iter(received)
        arrived = next(remaining) if self.ring.owner(hop + 1) is not None else None
        return arrived, next(remaining, home)

    def _add(
        self,
        call: Call,
        block: Block,
        sums: tuple[Tensor, ...],
        of_q: Tensor,
        *given: Tensor,
    ) -> None:
        queries, keys = (Places(one, call.kind.reverse, of_q.device) for one in (call.queries, call.keys))
        options = self.options(call, queries, keys)
        rows, columns = [queries.take(x) for x in given], [keys.take(x) for x in (block.k, block.v)]
        found = _gradients(rows, columns, options)
        for where, total, part in zip((queries, keys, keys), (of_q, *sums), found, strict=True):
            where.put(total, where.take(total) + part)


def _gradients(rows: Sequence[Tensor], columns: Sequence[Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Gradients of q, k and v from some of the keys, where o and lse are of all that the queries see.

    With ``P = exp(s - lse)`` and ``dS = P (dP - rowsum(dO O) + dlse)`` those of every part are exact by themselves
    (FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1). Flex attention and the reference have no backward
    pass apart from their forward pass, which then runs again.

    Args:
        rows: q, the gradients of o and lse, o, lse.
        columns: k and v.
        options: Of the op.
    """
    q, grad_o, grad_lse, o, lse = rows
    if chosen(slot.backend or "", q) in ("gpu", "reference"):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, *columns)]
            part, sums = attention(*leaves, **options)
        weight = (sums - lse.masked_fill(lse == -torch.inf, 0.0)).exp().detach()
        change = (grad_o.to(lse.dtype) * (part.detach() - o).to(lse.dtype)).sum(-1)
        of_part = (weight[..., None] * grad_o).to(part.dtype)
        return torch.autograd.grad((part, sums), leaves, (of_part, weight * (change + grad_lse)))
    bounds, bounds_k = options["cu_seqlens"], options["cu_seqlens_k"]
    scale = q.shape[3] ** -0.5 if options["scale"] is None else float(options["scale"])
    form = options["causal"], options["window"], scale, options["logit_cap"]
    found = torch.ops.seqzoo.attention_backward(
        grad_o, grad_lse, q, *columns, None, None, bounds, bounds_k, o, lse, *form, False, slot.backend or ""
    )
    return found[:3]


def _rows(x: Tensor, flat: bool) -> Tensor:
    """``(B, T, ...)``, flat ``(1, B * T, ...)``; a view, for x is contiguous."""
    return x.view(1, -1, *x.shape[2:]) if flat else x


class Attend(torch.autograd.Function):
    """Attention to several blocks of keys, of which some come and go; the op's own derivative of each."""

    @staticmethod
    def forward(
        ctx: Any,
        job: Job,
        anchor: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state_k: Tensor | None,
        state_v: Tensor | None,
        sinks: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        q = q.contiguous()

        def run() -> list[Tensor]:
            return job.attend(q, k, v, job.first_blocks(k, v, state_k, state_v), sinks)

        o, lse = once_a_forward(run) if job.ring.last else run()
        ctx.save_for_backward(q, k, v, state_k, state_v, sinks, o, lse)
        ctx.job = job
        return o, lse

    @staticmethod
    @once
    def backward(ctx: Any, grad_o: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        *tensors, o, lse = ctx.saved_tensors
        q, k, v, state_k, state_v, sinks = tensors
        blind = lse == -torch.inf
        # a query that sees nothing passes no gradient on
        grad_o = torch.zeros_like(o) if grad_o is None else grad_o.masked_fill(blind[..., None], 0.0).contiguous()
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.masked_fill(blind, 0.0).contiguous()
        first = ctx.job.first_blocks(k, v, state_k, state_v)
        (of_q,), *found = ctx.job.differentiate(q, k, v, first, (grad_o, grad_lse, o, lse))
        of_sinks = None
        if sinks is not None:
            rows = grad_lse - (grad_o.to(lse.dtype) * o.to(lse.dtype)).sum(-1)
            of_sinks = ((sinks.to(lse.dtype) - lse).exp().masked_fill(blind, 0.0) * rows).sum((0, 1))
        gradients = of_q, *(x for pair in found for x in pair), *[None] * (4 - 2 * len(found)), of_sinks
        return (
            None,
            None,
            *(None if x is None else x.to(like.dtype) for x, like in zip(gradients, tensors, strict=True)),
        )
