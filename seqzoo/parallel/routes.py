"""All-to-alls of parts of tensors: keys and values to the ranks that see them, heads to the ranks that compute them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.derivatives import once
from seqzoo.parallel.exchange import Group, anchor_of, filled, form_of, message_bytes, once_a_forward, pack, unpack
from seqzoo.parallel.layout import Layout, Range, common, count, place


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
    return sum(message_bytes([form_of(x) for x in some]) for other, some in enumerate(parts) if other != rank)


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
        ctx.forms, ctx.device = [form_of(x) for x in tensors], tensors[0].device

        def run() -> list[Tensor]:
            found = route.results(tensors)
            for target, value in swap(group, mixer, f"exchange {what}", tensors, route.out, found, route.into):
                target.copy_(value)
            return found

        found = once_a_forward(run)
        ctx.found = [form_of(x) for x in found]
        return tuple(found)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        route, device = ctx.route, ctx.device
        given = filled(gradients, ctx.found, device)
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
