"""Softmax attention over sequences that lie on several ranks.

A rank has queries, keys and values of its own tokens. Keys come to the queries (``"allgather"``, ``"ring"``), or every
rank gets all tokens of some of the heads (``"ulysses"``), or both (``"usp"``). Which token is where, and who sees what,
follows from a :class:`Layout` on the host, the same on every rank, so nothing but tensors is exchanged.

What a rank computes are calls of the op on parts of its queries and keys, merged by the logarithms of their sums. The
op lets queries and keys end together, which fits keys that end with the queries. For the others it needs no mask but
two that it has: with a window W a query at i sees of keys before all queries those from ``i - W + 1`` on, and in
reversed time that is the causal mask of queries and keys that end together, of keys that begin ``W - 1`` before the
first query; of keys behind all queries it is the causal mask of those that end ``W - 1`` behind the last.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from seqzoo.kernels.attention import attention, op
from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.derivatives import once
from seqzoo.kernels.dispatch import chosen, slot
from seqzoo.mixer import State
from seqzoo.modules.key_values import Cache, turn
from seqzoo.packing import Packing
from seqzoo.parallel.exchange import (
    Form,
    Group,
    _filled,
    _form,
    anchor_of,
    message_bytes,
    once_a_forward,
    pack,
    unpack,
)
from seqzoo.parallel.plan import Plan

Method = Literal["allgather", "ulysses", "ring", "usp"]
# tokens from the first to the one before the second
Range = tuple[int, int]


# -- which tokens are where --


@dataclass(frozen=True)
class Layout:
    """Which tokens every rank has, any ranges of them: integers on the host.

    Attributes:
        fragments: Of every rank the ranges of its tokens, which ascend and do not touch, in the order of its tensors.
        rank: This one.
        bounds: Boundaries of the packed sequences over all ranks, or None for a dense batch.
    """

    fragments: tuple[tuple[Range, ...], ...]
    rank: int
    bounds: tuple[int, ...] | None = None

    @classmethod
    def of(cls, plan: Plan | Layout) -> Layout:
        """That of a plan: one range a rank."""
        if isinstance(plan, Layout):
            return plan
        return cls(tuple(merged([cut]) for cut in pairwise(plan.cuts)), plan.rank, plan.bounds)

    @property
    def own(self) -> tuple[Range, ...]:
        """This rank's tokens."""
        return self.fragments[self.rank]

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.fragments)

    @property
    def total(self) -> int:
        """Tokens of all ranks."""
        return sum(map(count, self.fragments))

    @property
    def extent(self) -> tuple[int, ...]:
        """The boundaries; those of a dense batch are 0 and the total."""
        return (0, self.total) if self.bounds is None else self.bounds

    def teams(self, width: int) -> Layout:
        """The same tokens on as many ranks fewer, of which each has those of ``width`` successive ones."""
        parts = [self.fragments[at : at + width] for at in range(0, self.size, width)]
        return Layout(tuple(merged(sum(part, ())) for part in parts), self.rank // width, self.bounds)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's share of a tensor that has all tokens in dimension ``dim``.

        Raises:
            ValueError: If that dimension has another size than there are tokens.
        """
        if x.shape[dim] != self.total:
            raise ValueError(
                f"the layout is for {self.total} tokens, dimension {dim} of the tensor has {x.shape[dim]}: "
                f"{tuple(x.shape)}"
            )
        return torch.cat([x.narrow(dim, start, end - start) for start, end in self.own or ((0, 0),)], dim)

    def unshard(self, shards: Sequence[Tensor], dim: int = 1) -> Tensor:
        """What :meth:`shard` took apart, from the shares of all ranks in order.

        Raises:
            ValueError: If there is not one share a rank, or one has another number of tokens.
        """
        found, wanted = [shard.shape[dim] for shard in shards], [count(ranges) for ranges in self.fragments]
        if found != wanted:
            raise ValueError(f"the ranks' shares must have {wanted} tokens, got {found}")
        parts = [
            (start, shard.narrow(dim, place(ranges, start), end - start))
            for shard, ranges in zip(shards, self.fragments, strict=True)
            for start, end in ranges
        ]
        return torch.cat([part for _, part in sorted(parts, key=lambda one: one[0])] or [shards[0]], dim)

    def seen(self, rank: int, causal: bool, window: int | None) -> tuple[Range, ...]:
        """The tokens that a rank's queries see, its own included."""
        extent, found = self.extent, []
        for start, end in self.fragments[rank]:
            # of the sequences that have the first and the last of these tokens
            first, last = extent[bisect_right(extent, start) - 1], extent[bisect_left(extent, end)]
            if window is not None:
                first, last = max(first, start - window + 1), min(last, end - 1 + window)
            found.append((first, end if causal else last))
        return merged(found)


def zigzag(total: int, size: int, rank: int, cu_seqlens: Tensor | Packing | Sequence[int] | None = None) -> Layout:
    """The layout that gives ranks equal parts of a causal sequence's work: rank r has chunks r and ``2 P - 1 - r``.

    Of ``2 P`` equal chunks: an early one, which sees little, and a late one. Contiguous shares leave the first ranks
    waiting: mean over greatest number of pairs of a query and a key is 0.67 for 2 ranks, 0.57 for 4 and 0.53 for 8;
    here it is 1.00 (dense, 4096 tokens). With windows shorter than a chunk, and for sequences far shorter than
    a rank's tokens, contiguous shares are as even and cheaper. For methods ``"allgather"`` and ``"ring"``;
    head-parallel ones are even by themselves. Layers with recurrent states need a contiguous :class:`Plan`.

    Raises:
        ValueError: As :meth:`Plan.balanced` does.
    """
    whole = Plan.balanced(total, size, rank, cu_seqlens)
    cuts = Plan.balanced(total, 2 * size, 0).cuts
    chunks = list(pairwise(cuts))
    return Layout(tuple(merged([chunks[one], chunks[-1 - one]]) for one in range(size)), rank, whole.bounds)


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The union of ranges, as ranges that ascend and do not touch."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif start < end:
            found.append((start, end))
    return tuple(found)


def common(one: Iterable[Range], other: Sequence[Range]) -> tuple[Range, ...]:
    """What lies in both, in order."""
    pairs = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return tuple(sorted(pair for pair in pairs if pair[0] < pair[1]))


def count(ranges: Iterable[Range]) -> int:
    """Tokens in ranges."""
    return sum(end - start for start, end in ranges)


def place(ranges: Iterable[Range], token: int) -> int:
    """How many tokens of the ranges are before a token."""
    return sum(min(end, token) - start for start, end in ranges if start < token)


# -- what a rank computes --


class Span(NamedTuple):
    """Queries and keys of one sequence: place of the first in a tensor, how many, position in the sequence."""

    query: int
    n_queries: int
    query_position: int
    key: int
    n_keys: int
    key_position: int

    def cut(self, queries: Range, keys: Range) -> Span | None:
        """Those at positions in two ranges, None where nothing is left."""
        first, end = max(self.query_position, queries[0]), min(self.query_position + self.n_queries, queries[1])
        first_key, end_key = max(self.key_position, keys[0]), min(self.key_position + self.n_keys, keys[1])
        if first >= end or first_key >= end_key:
            return None
        query, key = self.query + first - self.query_position, self.key + first_key - self.key_position
        return Span(query, end - first, first, key, end_key - first_key, first_key)


class Kind(NamedTuple):
    """How the op is called: two of its options, and whether time is reversed."""

    causal: bool
    window: int | None
    reverse: bool = False


@dataclass
class Call:
    """One call of the op: ranges of queries and of keys, those of one sequence each, none of them twice."""

    kind: Kind
    queries: list[Range]
    keys: list[Range]


def segments(extent: Sequence[int], own: Iterable[Range]) -> Iterator[tuple[int, int, int]]:
    """The sequences that have some of the tokens: number, the first of those tokens, the one behind the last."""
    for start, end in own:
        index = bisect_right(extent, start) - 1
        while index + 1 < len(extent) and extent[index] < end:
            first, last = max(start, extent[index]), min(end, extent[index + 1])
            if first < last:
                yield index, first, last
            index += 1


def spans(extent: Sequence[int], own: Sequence[Range], held: Sequence[Range]) -> Iterator[Span]:
    """The pairs of own queries and held keys that are of one sequence.

    Args:
        extent: Boundaries of the sequences.
        own: The queries' tokens, in the order in which they lie.
        held: The keys' tokens.
    """
    for index, first, last in segments(extent, own):
        begin, end = extent[index : index + 2]
        for a, b in common(held, [(begin, end)]):
            yield Span(place(own, first), last - first, first - begin, place(held, a), b - a, a - begin)


def pieces(span: Span, causal: bool, window: int | None) -> Iterator[tuple[Kind, Span]]:
    """A span in parts that the op can compute, each query with the keys that it sees."""
    everything = -(2**62), 2**62
    a, c = span.query_position, span.key_position
    b, d = a + span.n_queries, c + span.n_keys
    if causal:
        d = min(d, b)
    parts: list[tuple[Kind, Range, Range]] = []
    if not causal and window is None:
        parts = [(Kind(False, None), everything, (c, d))]
    elif d > a and c < b:
        # keys that end with the queries, and for some that see ahead those behind
        parts = [(Kind(causal, window), everything, (c, min(b, d)))]
        if d > b:
            yield from pieces(span._replace(key=span.key + b - c, n_keys=d - b, key_position=b), False, window)
    elif window is None:
        parts = [(Kind(False, None), everything, (c, d))]
    elif d <= a:
        edge = max(a, c + window)
        parts = [
            (Kind(False, None), (a, edge), (c, d)),
            (Kind(True, None, True), (edge, d - 1 + window), (edge - window + 1, d)),
        ]
    else:
        edge = min(b, d - window)
        parts = [
            (Kind(False, None), (edge, b), (c, d)),
            (Kind(True, None), (c - window + 1, edge), (c, edge - 1 + window)),
        ]
    for kind, queries, keys in parts:
        part = span.cut(queries, keys)
        if part is not None:
            yield kind, part


def calls(found: Iterable[Span], causal: bool, window: int | None, packed: bool) -> list[Call]:
    """The calls that compute spans; where they cannot be packed, one for every piece."""
    made: dict[Kind, list[Call]] = {}
    for span in found:
        for kind, part in pieces(span, causal, window):
            alike = made.setdefault(kind, [])
            fits = (call for call in alike if call.queries[-1][1] <= part.query and call.keys[-1][1] <= part.key)
            call = next(fits, None) if packed else None
            if call is None:
                call = Call(kind, [], [])
                alike.append(call)
            call.queries.append((part.query, part.query + part.n_queries))
            call.keys.append((part.key, part.key + part.n_keys))
    return [call for alike in made.values() for call in alike]


class Places:
    """Where the tokens of a call are in dimension 1 of tensors, and the boundaries of its sequences."""

    def __init__(self, ranges: Sequence[Range], reverse: bool, device: torch.device) -> None:
        self.bounds = None
        if len(ranges) > 1:
            lengths = (end - start for start, end in ranges)
            self.bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
        whole = merged(ranges)
        if len(whole) == 1 and not reverse:
            self.index: slice | Tensor = slice(*whole[0])
        else:
            parts = [torch.arange(start, end) for start, end in ranges]
            parts = [part.flip(0) for part in parts] if reverse else parts
            self.index = torch.cat(parts).to(device, non_blocking=True)

    def take(self, x: Tensor) -> Tensor:
        """The tokens, a view where it can be."""
        return x[:, self.index] if isinstance(self.index, slice) else x.index_select(1, self.index)

    def put(self, target: Tensor, values: Tensor) -> None:
        """Writes them."""
        target[:, self.index] = values.to(target.dtype)


# -- what ranks exchange --


class Move(NamedTuple):
    """A part of one of several tensors ``(B, T, H, ...)``."""

    tensor: int
    tokens: slice
    heads: slice = slice(None)


@dataclass(frozen=True)
class Route:
    """Which parts of tensors go to which rank, and what becomes of those that come.

    Attributes:
        shapes: Tokens and heads of every result, None for as many heads as the tensor has.
        out: Of every rank what goes there.
        into: Of every rank where in the results it is that comes from there, in the order in which it is sent.
    """

    shapes: tuple[tuple[int, int | None], ...]
    out: tuple[tuple[Move, ...], ...]
    into: tuple[tuple[Move, ...], ...]

    def results(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Room for the results."""
        return [
            x.new_empty((x.shape[0], tokens, x.shape[2] if heads is None else heads, *x.shape[3:]))
            for x, (tokens, heads) in zip(tensors, self.shapes, strict=True)
        ]


def parts_of(tensors: Sequence[Tensor], moves: Sequence[Sequence[Move]]) -> list[list[Tensor]]:
    """Of every rank the parts of tensors that go to it or come from it; views."""
    return [[tensors[one.tensor][:, one.tokens, one.heads] for one in some] for some in moves]


def bytes_of(parts: Sequence[Sequence[Tensor]], rank: int) -> int:
    """Bytes of the parts that go to other ranks or come from them."""
    return sum(message_bytes([_form(x) for x in some]) for other, some in enumerate(parts) if other != rank)


def swap(
    group: Group,
    mixer: str,
    deed: str,
    sources: Sequence[Tensor],
    out: Sequence[Sequence[Move]],
    targets: Sequence[Tensor],
    into: Sequence[Sequence[Move]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """One all-to-all of the ranks: places in the targets, and what came for them."""
    sent, places = parts_of(sources, out), parts_of(targets, into)
    forms = [
        [(tuple(x.shape), sources[one.tensor].dtype) for one, x in zip(moves, some, strict=True)]
        for moves, some in zip(into, places, strict=True)
    ]
    nothing = sources[0].new_empty(0, dtype=torch.uint8)
    messages = [pack(some) if some and other != group.rank else nothing for other, some in enumerate(sent)]
    sizes = [0 if other == group.rank else message_bytes(form) for other, form in enumerate(forms)]
    received = nothing.new_empty(sum(sizes))
    with group.guard(mixer, deed):
        dist.all_to_all_single(
            received, torch.cat(messages), sizes, [len(message) for message in messages], group=group.handle
        )
    for other, message in enumerate(received.split(sizes)):
        values = sent[other] if other == group.rank else unpack(message, forms[other]) if forms[other] else []
        yield from zip(places[other], values, strict=True)


class _Routed(torch.autograd.Function):
    """What a route makes of tensors; in backward every part's gradient goes back, and those of one part add up."""

    @staticmethod
    def forward(
        ctx: Any, route: Route, group: Group, mixer: str, what: str, anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.route, ctx.group, ctx.mixer, ctx.what = route, group, mixer, what
        ctx.forms, ctx.device = [_form(x) for x in tensors], tensors[0].device

        def run() -> list[Tensor]:
            found = route.results(tensors)
            for target, value in swap(group, mixer, f"exchange {what}", tensors, route.out, found, route.into):
                target.copy_(value)
            return found

        found = once_a_forward(run)
        ctx.found = [_form(x) for x in found]
        return tuple(found)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        route, device = ctx.route, ctx.device
        given = _filled(gradients, ctx.found, device)
        sums = [torch.zeros(shape, dtype=accumulator(dtype), device=device) for shape, dtype in ctx.forms]
        deed = f"exchange the gradients of {ctx.what}"
        for target, value in swap(ctx.group, ctx.mixer, deed, given, route.into, sums, route.out):
            target.add_(value)
        return *[None] * 5, *(x.to(dtype) for x, (_, dtype) in zip(sums, ctx.forms, strict=True))


def routed(route: Route, group: Group, mixer: str, what: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What a route makes of tensors, on every rank of the group; one collective call, in backward another."""
    return _Routed.apply(route, group, mixer, what, anchor_of(tensors[0]), *tensors)


def gathering(layout: Layout, wanted: Sequence[tuple[Range, ...]], first: int, number: int) -> Route:
    """The route of tensors to the ranks that want their tokens.

    Args:
        layout: Where the tokens are.
        wanted: Of every rank the tokens that it is to have.
        first: How many tensors are left as they are, before those.
        number: Of tensors that are gathered.
    """
    rank, own = layout.rank, layout.own
    here = tuple(Move(index, slice(None)) for index in range(first))
    kept = [here if other == rank else () for other in range(layout.size)]

    def moves(ranges: tuple[Range, ...], inside: tuple[Range, ...]) -> tuple[Move, ...]:
        return tuple(
            Move(first + index, slice(place(inside, start), place(inside, end)))
            for index in range(number)
            for start, end in ranges
        )

    return Route(
        ((count(own), None),) * first + ((count(wanted[rank]), None),) * number,
        tuple(kept[other] + moves(common(own, wanted[other]), own) for other in range(layout.size)),
        tuple(
            kept[other] + moves(common(layout.fragments[other], wanted[rank]), wanted[rank])
            for other in range(layout.size)
        ),
    )


@dataclass(frozen=True)
class Share:
    """The heads that one of the ranks of a team computes.

    Attributes:
        heads: Of the queries.
        groups: Of keys and values.
        members: How many of the heads read each of the groups.
    """

    heads: slice
    groups: slice
    members: tuple[int, ...]

    @classmethod
    def of(cls, index: int, width: int, n_heads: int, n_groups: int) -> Share:
        """That of one of ``width`` ranks, which divides the heads."""
        first, end, each = n_heads // width * index, n_heads // width * (index + 1), n_heads // n_groups
        groups = range(first // each, (end - 1) // each + 1)
        members = tuple(min(end, (one + 1) * each) - max(first, one * each) for one in groups)
        return cls(slice(first, end), slice(groups.start, groups.stop), members)

    def spread(self, x: Tensor) -> Tensor:
        """``(B, T, groups, ...)`` for the op, in which all groups have equally many heads."""
        if len(set(self.members)) <= 1:
            return x
        return torch.cat([x[:, :, at : at + 1].expand(-1, -1, n, -1) for at, n in enumerate(self.members)], 2)


def to_heads(layout: Layout, width: int, n_heads: int, n_groups: int) -> Route:
    """The route of q, k and v from the ranks' tokens to heads of all tokens of a team."""
    team = layout.teams(width)
    peers = range(team.rank * width, (team.rank + 1) * width)
    shares = [Share.of(index, width, n_heads, n_groups) for index in range(width)]
    mine, tokens = shares[layout.rank - peers.start], count(team.own)
    n_mine = [part.stop - part.start for part in (mine.heads, mine.groups, mine.groups)]

    def out(other: int) -> tuple[Move, ...]:
        share = shares[other - peers.start]
        return tuple(
            Move(index, slice(place(layout.own, start), place(layout.own, end)), heads)
            for index, heads in enumerate((share.heads, share.groups, share.groups))
            for start, end in layout.own
        )

    def into(other: int) -> tuple[Move, ...]:
        return tuple(
            Move(index, slice(place(team.own, start), place(team.own, end)))
            for index in range(3)
            for start, end in layout.fragments[other]
        )

    ranks = range(layout.size)
    return Route(
        tuple((tokens, heads) for heads in n_mine),
        tuple(out(other) if other in peers else () for other in ranks),
        tuple(into(other) if other in peers else () for other in ranks),
    )


def to_tokens(layout: Layout, there: Route, n_heads: int) -> Route:
    """The route of o and lse back from the heads of a team to the ranks' tokens; ``there`` brought q."""

    def back(moves: tuple[tuple[Move, ...], ...]) -> tuple[tuple[Move, ...], ...]:
        return tuple(
            tuple(one._replace(tensor=index) for index in range(2) for one in some if one.tensor == 0) for some in moves
        )

    return Route(((count(layout.own), n_heads),) * 2, back(there.into), back(there.out))


# -- blocks that go round --


@dataclass(frozen=True)
class Ring:
    """How far the blocks of keys and values of every team go round: from each team to the next.

    Attributes:
        teams: Which tokens they have, and which of them this rank is in.
        width: Ranks of a team. Each exchanges with those that have its place in theirs.
        place: This rank's.
        parts: Of every block the tokens that others see.
        hops: Of every block how many teams it comes to.
    """

    teams: Layout
    width: int
    place: int
    parts: tuple[tuple[Range, ...], ...]
    hops: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout, width: int, causal: bool, window: int | None) -> Ring:
        """The ring of the teams of ``width`` ranks."""
        teams = layout.teams(width)
        size = teams.size
        seen = [teams.seen(one, causal, window) for one in range(size)]
        parts, hops = [], []
        for owner, block in enumerate(teams.fragments):
            reached = [common(block, seen[(owner + hop) % size]) for hop in range(1, size)]
            parts.append(merged(sum(reached, ())))
            hops.append(max((hop for hop, part in enumerate(reached, 1) if part), default=0))
        return cls(teams, width, layout.rank % width, tuple(parts), tuple(hops))

    @property
    def last(self) -> int:
        """Hops of the block that goes farthest."""
        return max(self.hops)

    def owner(self, hop: int, team: int = 0) -> int | None:
        """Whose block has come to this rank's team, or one so many behind it, after so many hops; None for no one's."""
        owner = (self.teams.rank + team - hop) % self.teams.size
        return owner if hop <= self.hops[owner] else None

    def rank(self, team: int) -> int:
        """The rank with this one's place in a team."""
        return team % self.teams.size * self.width + self.place


class Transfer:
    """Messages from and to single ranks, under way from the start on; all ranks start theirs in the same order."""

    def __init__(
        self,
        group: Group,
        mixer: str,
        what: str,
        sent: Sequence[tuple[Tensor, int]],
        wanted: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> None:
        self.group, self.words, self.sent = group, (mixer, f"pass {what} on"), sent
        self.received = [torch.empty(size, dtype=torch.uint8, device=device) for size, _ in wanted]
        incoming = [(x, source) for x, (_, source) in zip(self.received, wanted, strict=True)]
        operations = [
            dist.P2POp(deed, x, group=group.handle, group_peer=peer)
            for deed, pairs in ((dist.isend, sent), (dist.irecv, incoming))
            for x, peer in pairs
        ]
        with group.guard(*self.words):
            self.requests = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        """What has come."""
        with self.group.guard(*self.words):
            for request in self.requests:
                request.wait()
        return self.received


# -- attention to blocks --


def block_forms(k: Tensor, v: Tensor, tokens: int, wide: bool = False) -> list[Form]:
    """The forms of keys and values of so many tokens, or of their gradients."""
    return [((x.shape[0], tokens, *x.shape[2:]), accumulator(x.dtype) if wide else x.dtype) for x in (k, v)]


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


class _Attend(torch.autograd.Function):
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


# -- what layers call --


@dataclass(frozen=True)
class Course:
    """What a call exchanges, and what it computes in between: all that follows from integers.

    Attributes:
        there: The route of q, k and v to heads, None where a rank computes all heads of its tokens.
        back: That of o and lse from there.
        share: The heads that this rank computes.
        gather: The route of keys and values to those who see them, None where none is needed.
        ring: How blocks go round.
        held: The tokens of keys and values that are here before any block comes.
        calls: Those for them.
    """

    there: Route | None
    back: Route | None
    share: Share
    gather: Route | None
    ring: Ring
    held: tuple[Range, ...]
    calls: list[Call]


@functools.lru_cache(maxsize=64)
def course(
    layout: Layout, gathers: bool, width: int, n_heads: int, n_groups: int, causal: bool, window: int | None
) -> Course:
    """That of a call; layers of one shape under one layout share it.

    Args:
        layout: Where the tokens are.
        gathers: Whether keys and values are gathered, else they go round.
        width: Ranks that share the heads.
        n_heads: Of the queries.
        n_groups: Of keys and values.
        causal: As of :func:`parallel_attention`, like the next.
        window: Keys that a query sees at most.
    """
    there = back = gather = None
    if width > 1:
        there = to_heads(layout, width, n_heads, n_groups)
        back = to_tokens(layout, there, n_heads)
    ring = Ring.of(layout, width, causal, window)
    held = ring.teams.own
    if gathers and ring.last:
        seen = [layout.seen(rank, causal, window) for rank in range(layout.size)]
        gather, held = gathering(layout, seen, 0, 2), seen[layout.rank]
        ring = Ring(ring.teams, 1, 0, ((),) * layout.size, (0,) * layout.size)
    found = calls(spans(layout.extent, ring.teams.own, held), causal, window, layout.bounds is not None)
    return Course(there, back, Share.of(layout.rank % width, width, n_heads, n_groups), gather, ring, held, found)


def head_ranks_of(method: str, head_ranks: int | None, size: int, n_heads: int) -> int:
    """How many ranks share the heads.

    Raises:
        ValueError: If the method is unknown, or so many ranks cannot share so many heads.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if method != "usp":
        if head_ranks is not None:
            raise ValueError(f"head_ranks is for method 'usp', got {head_ranks!r} with {method!r}")
        if method != "ulysses":
            return 1
        head_ranks = size
    elif head_ranks is None:
        return math.gcd(size, n_heads)
    fitting = [width for width in range(1, size + 1) if size % width == 0 and n_heads % width == 0]
    if head_ranks not in fitting:
        raise ValueError(
            f"{head_ranks} of {size} ranks cannot share {n_heads} heads evenly: that number must divide both. Use "
            f"method='usp' with head_ranks one of {fitting}, or method 'allgather' or 'ring', which take any heads"
        )
    return head_ranks


def parallel_attention(
    group: Group,
    plan: Plan | Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None = None,
    *,
    method: Method = "allgather",
    head_ranks: int | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    logit_cap: float | None = None,
    mixer: str = "attention",
) -> tuple[Tensor, Tensor]:
    """This rank's part of :func:`seqzoo.ops.attention` over sequences that lie on all ranks of a group.

    Every rank calls it with the same options, also one without tokens, and runs backward from a loss that depends on o.

    * ``"allgather"``: every rank is sent those keys and values that its queries see, and no others (LASP-2H,
      https://arxiv.org/abs/2502.07563, section 3.3): one all-to-all, and one in backward. They are kept for it.
    * ``"ulysses"``: every rank gets all tokens of H / P heads (https://arxiv.org/abs/2309.14509, section 3.1): one
      all-to-all to there, one back, and the same in backward. Keys are repeated where there are fewer groups than
      ranks.
    * ``"ring"``: blocks of keys and values go from rank to rank while those that are there are attended to
      (https://arxiv.org/abs/2310.01889, section 3), as far as someone sees them; two are held at a time. In backward
      they go again, and their gradients with them, in float32 at least, and home from the last. The op's tiles compute
      it, on a GPU its forward pass once more.
    * ``"usp"``: teams of ``head_ranks`` successive ranks share heads, and blocks go round between teams
      (https://arxiv.org/abs/2405.07719, section 3.3).

    Nothing is sent where no query sees a key of another rank, but for heads. Under activation checkpointing with
    :func:`keep_exchanges` the keys that were gathered, the heads that came, and o and lse of a ring are kept.

    Args:
        group: The ranks.
        plan: Which of them has which tokens; of a dense batch all rows alike.
        q: ``(B, T, H, K)``, this rank's tokens: float64, float32, bfloat16 or float16.
        k: ``(B, T, G, K)``, of q's dtype; G divides H.
        v: ``(B, T, G, V)``, of q's dtype.
        state: Keys and values of the tokens before all of these, equal on every rank, one row a sequence: a cache
            ``{"k", "v", "length"}``, with a window its ring; see :mod:`seqzoo.modules.key_values`. Its gradient is each
            rank's share. Its lengths are read on the host.
        method: How keys and queries come together.
        head_ranks: For ``"usp"`` how many ranks share the heads; None means as many as can.
        causal: Whether queries see no later key.
        window: Keys that a causal query sees at most, its own included; others see as many to the other side.
        scale: Factor of the scores; ``K ** -0.5`` when omitted.
        sinks: ``(H,)``, equal on every rank: what joins each query's sums once; its gradient is each rank's share.
        logit_cap: Greatest magnitude of a score.
        mixer: Name of what calls, for errors.

    Returns:
        o: ``(B, T, H, V)``, of q's dtype.
        lse: ``(B, T, H)``, float32, float64 for float64 inputs. Both are differentiable.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If plan, shapes, options or the state do not fit, before anything is sent.
        SequenceParallelError: If another rank does not answer.
    """
    layout = Layout.of(plan)
    _check(group, layout, q, k, v, state, causal, window, scale, sinks, logit_cap)
    width = head_ranks_of(method, head_ranks, layout.size, q.shape[2])
    way = course(layout, method == "allgather", width, q.shape[2], k.shape[2], causal, window)
    if way.there is not None and way.back is not None:
        q, k, v = routed(way.there, group, mixer, "heads of queries, keys and values", q, k, v)
        k, v = way.share.spread(k), way.share.spread(v)
        sinks = None if sinks is None else sinks[way.share.heads]
    if way.gather is not None:
        k, v = routed(way.gather, group, mixer, "keys and values", k, v)
    earlier, state_k, state_v = [], None, None
    if state is not None:
        rows, places, lengths = _held(state, window)
        state_k, state_v = (way.share.spread(x[:, :, way.share.groups]) for x in rows)
        found = list(_state_spans(way.ring.teams, q.shape[0], places, lengths))
        earlier = calls(found, causal, window, True)
    job = Job(group, mixer, way.ring, way.held, way.calls, earlier, causal, window, scale, logit_cap)
    single = len(way.calls) == 1 and way.calls[0].queries and not way.ring.last and state is None
    if single:
        (call,) = way.calls
        queries, keys = (Places(one, call.kind.reverse, q.device) for one in (call.queries, call.keys))
        o, lse = attention(q, keys.take(k), keys.take(v), sinks=sinks, **job.options(call, queries, keys))
    else:
        o, lse = _Attend.apply(job, anchor_of(q), q, k, v, state_k, state_v, sinks)
    if way.there is not None and way.back is not None:
        o, lse = routed(way.back, group, mixer, "outputs", o, lse)
    return o, lse


def _check(
    group: Group,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    sinks: Tensor | None,
    logit_cap: float | None,
) -> None:
    """Raises unless the arguments belong together."""
    op._check(q, k, v, window, scale, sinks, logit_cap, None, None, None)
    _check_tokens(group, layout, q=q, k=k, v=v)
    if state is None:
        return
    if not causal:
        raise ValueError("a state holds the tokens before all others, which only causal queries can go on from")
    _check_state(layout, k, v, state, window)


def _check_tokens(group: Group, layout: Layout, **tensors: Tensor) -> None:
    if (layout.size, layout.rank) != (group.size, group.rank):
        raise ValueError(
            f"the plan is that of rank {layout.rank} of {layout.size}, this is rank {group.rank} of {group.size} of "
            f"the group {group.name!r}"
        )
    for name, x in tensors.items():
        if x.shape[1] != count(layout.own):
            raise ValueError(f"the plan gives rank {layout.rank} {count(layout.own)} tokens, {name} has {x.shape[1]}")
        if layout.bounds is not None and x.shape[0] != 1:
            raise ValueError(f"packed sequences lie in a batch of 1, got a batch of {x.shape[0]} of {name}")


def _check_state(layout: Layout, k: Tensor, v: Tensor, state: State, window: int | None) -> None:
    rows = k.shape[0] if layout.bounds is None else len(layout.extent) - 1
    for name, like in (("k", k), ("v", v)):
        value = state[name]
        room = value.shape[1] if window is None and value.dim() > 1 else window
        wanted = (rows, room, *like.shape[2:])
        if tuple(value.shape) != wanted or value.dtype != like.dtype:
            raise ValueError(
                f"state[{name!r}] must have shape {wanted} and {like.dtype} for {rows} sequences"
                f"{'' if window is None else f' and a window of {window}'}, got {tuple(value.shape)} and {value.dtype}"
            )
    length = state["length"]
    if tuple(length.shape) != (rows,) or length.dtype != torch.int64:
        raise ValueError(
            f"state['length'] must have shape {(rows,)} and torch.int64, got {tuple(length.shape)} and {length.dtype}"
        )


def _held(state: State, window: int | None) -> tuple[tuple[Tensor, Tensor], list[int], list[int]]:
    """Keys and values of a state, ``(1, S * places, G, ...)``; of every row the place of the first, and how many."""
    lengths = state["length"].tolist()
    n_rows, room = state["k"].shape[:2]
    k, v = (state[name].flatten(0, 1) for name in ("k", "v"))
    firsts = [row * room for row in range(n_rows)]
    if window is not None:
        # from the oldest to the newest, which comes last
        rows = torch.arange(n_rows, device=k.device)[:, None] * room
        order = (rows + (state["length"][:, None] + torch.arange(room, device=k.device)) % room).flatten()
        k, v = k.index_select(0, order), v.index_select(0, order)
        lengths = [min(length, room) for length in lengths]
        firsts = [first + room - length for first, length in zip(firsts, lengths, strict=True)]
    return (k[None], v[None]), firsts, lengths


def _state_spans(layout: Layout, batch: int, firsts: Sequence[int], lengths: Sequence[int]) -> Iterator[Span]:
    """A rank's queries, all rows of a batch as one, and the keys before their sequences, at negative positions."""
    total, extent = count(layout.own), layout.extent
    for row in range(batch):
        for index, first, last in segments(extent, layout.own):
            one = row if layout.bounds is None else index
            query = row * total + place(layout.own, first)
            yield Span(query, last - first, first - extent[index], firsts[one], lengths[one], -lengths[one])


def parallel_state(
    group: Group,
    plan: Plan | Layout,
    o: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None = None,
    *,
    window: int | None = None,
    mixer: str = "attention",
) -> tuple[Tensor, State]:
    """The state after all tokens, of whole sequences, on every rank: one all-to-all, and one in backward.

    Of a cache every rank is sent all keys and values, of a ring the last ``window`` of every sequence. The gradients of
    all ranks' states come back to the keys' ranks, on the way of o: on every rank the loss must depend on it.

    Args:
        group: The ranks.
        plan: Which of them has which tokens.
        o: What :func:`parallel_attention` returned, ``(B, T, H, V)``.
        k: ``(B, T, G, K)``, this rank's tokens.
        v: ``(B, T, G, V)``, of k's dtype.
        state: The state before the first token, equal on every rank, or None for an empty one. Without gradients a
            cache is written in place.
        window: That of a ring; None for a cache.
        mixer: Name of what calls, for errors.

    Returns:
        o and the state ``{"k", "v", "length"}``.

    Raises:
        ValueError: If plan, shapes or the state do not fit, before anything is sent.
        SequenceParallelError: If another rank does not answer.
    """
    layout = Layout.of(plan)
    _check_tokens(group, layout, o=o, k=k, v=v)
    if state is not None:
        _check_state(layout, k, v, state, window)
    sequences = list(pairwise(layout.extent))
    kept = [(start if window is None else max(start, end - window), end) for start, end in sequences]
    if layout.size > 1:
        route = gathering(layout, (merged(kept),) * layout.size, 1, 2)
        o, k, v = routed(route, group, mixer, "keys and values of the final state", o, k, v)
    else:
        k, v = (torch.cat([x[:, start:end] for start, end in kept], 1) for x in (k, v))
    packing = None
    if layout.bounds is not None:
        packing = Packing.from_lengths([count([one]) for one in kept], device=k.device)
    rows = k.shape[0] if packing is None else packing.n_sequences
    if state is None:
        empty = {name: x.new_zeros(rows, window or 0, *x.shape[2:]) for name, x in (("k", k), ("v", v))}
        state = {**empty, "length": torch.zeros(rows, dtype=torch.int64, device=k.device)}
    if window is None:
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (o, k, v, state["k"], state["v"]))
        return o, Cache({"k": state["k"], "v": state["v"]}, state["length"], recorded).add(k, v, packing)
    passed = [first - start for (start, _), (first, _) in zip(sequences, kept, strict=True)]
    passed = torch.tensor(passed).to(k.device, non_blocking=True)
    # the tokens that were not sent are counted, and what is sent fills the ring where there are any
    return o, turn({**state, "length": state["length"] + passed}, k, v, packing)


class Payload(NamedTuple):
    """Bytes that a rank sends to others and receives from them."""

    sent_forward: int
    received_forward: int
    sent_backward: int
    received_backward: int


def attention_payload(
    plan: Plan | Layout,
    method: Method,
    *,
    n_heads: int,
    n_groups: int,
    key_size: int,
    value_size: int,
    dtype: torch.dtype,
    batch_size: int = 1,
    head_ranks: int | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Payload:
    """The bytes of a call of :func:`parallel_attention` and of its backward pass, for the plan's rank.

    With w bytes an element (and 4, at least, of float32), ``c = B G (K + V)`` and messages that are filled up to 16
    bytes for each tensor in them:

    * ``"allgather"``: it receives ``c w`` for every other rank's token that its queries see, and sends the gradients
      back; it sends as much for its own to every rank that sees them. For a causal sequence in P equal shares of L
      tokens rank r receives ``r L c w`` and sends ``(P - 1 - r) L c w``.
    * ``"ulysses"``: of L tokens it sends ``(P - 1) / P`` of ``B L (H K + G (K + V)) w``, G at least P, there and of
      ``B L H (V w + 4)`` back; in backward what it received.
    * ``"ring"``: at each hop of a block, of which others see n tokens, ``n c w``; in backward ``n c (w + 4)``, for
      gradients set out after the first hop and go home after the last.
    * ``"usp"``: both, for its team's tokens and its share of the heads.

    Args:
        plan: Which rank has which tokens.
        method: As of :func:`parallel_attention`, like ``head_ranks``, ``causal`` and ``window``.
        n_heads: Of queries, H.
        n_groups: Of keys and values, G.
        key_size: K.
        value_size: V.
        dtype: Of q, k and v.
        batch_size: Rows, B.

    Raises:
        ValueError: As :func:`parallel_attention` does for the method.
    """
    layout = Layout.of(plan)
    width = head_ranks_of(method, head_ranks, layout.size, n_heads)
    way = course(layout, method == "allgather", width, n_heads, n_groups, causal, window)
    tokens = batch_size, count(layout.own)
    sizes = (n_heads, key_size), (n_groups, key_size), (n_groups, value_size)
    q, k, v = (torch.empty(*tokens, *size, dtype=dtype, device="meta") for size in sizes)
    total = Payload(0, 0, 0, 0)
    if way.there is not None and way.back is not None:
        total = _plus(total, _routed_bytes(way.there, layout.rank, q, k, v))
        q, k, v = way.there.results((q, k, v))
        k, v = way.share.spread(k), way.share.spread(v)
        o = torch.empty(*q.shape[:3], value_size, dtype=dtype, device="meta")
        lse = torch.empty(q.shape[:3], dtype=accumulator(dtype), device="meta")
        total = _plus(total, _routed_bytes(way.back, layout.rank, o, lse))
    if way.gather is not None:
        total = _plus(total, _routed_bytes(way.gather, layout.rank, k, v))
    return _plus(total, _ring_bytes(way.ring, k, v))


def _plus(one: Payload, other: Payload) -> Payload:
    return Payload(*map(sum, zip(one, other, strict=True)))


def _routed_bytes(route: Route, rank: int, *tensors: Tensor) -> Payload:
    sent = bytes_of(parts_of(tensors, route.out), rank)
    received = bytes_of(parts_of(route.results(tensors), route.into), rank)
    return Payload(sent, received, received, sent)


def _ring_bytes(ring: Ring, k: Tensor, v: Tensor) -> Payload:
    """Blocks both ways; gradients leave with every hop that a block has made, and come with every further one, home."""
    sent = received = of_sent = of_received = 0
    for hop in range(1, ring.last + 1):
        arrives, leaves = ring.owner(hop), ring.owner(hop, 1)
        if arrives is not None:
            received += message_bytes(block_forms(k, v, count(ring.parts[arrives])))
            of_sent += message_bytes(block_forms(k, v, count(ring.parts[arrives]), wide=True))
            if hop > 1:
                of_received += message_bytes(block_forms(k, v, count(ring.parts[arrives]), wide=True))
        if leaves is not None:
            sent += message_bytes(block_forms(k, v, count(ring.parts[leaves])))
    if ring.hops[ring.teams.rank]:
        of_received += message_bytes(block_forms(k, v, count(ring.parts[ring.teams.rank]), wide=True))
    return Payload(sent, received, sent + of_sent, received + of_received)
