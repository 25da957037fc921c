"""What a rank computes of attention: calls of the op on parts of its queries and of the keys that are there.

The op lets queries and keys end together, which fits keys that end with the queries. For the others it needs no mask
but two that it has: with a window W a query at i sees of keys before all queries those from ``i - W + 1`` on, and in
reversed time that is the causal mask of queries and keys that end together, of keys that begin ``W - 1`` before the
first query; of keys behind all queries it is the causal mask of those that end ``W - 1`` behind the last.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from seqzoo.parallel.layout import Range, common, merged, place


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
