"""Which rank has which tokens, where they need not lie together: integers on the host, the same on every rank."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from seqzoo.packing import Packing
from seqzoo.parallel.plan import Plan

# tokens from the first to the one before the second
Range = tuple[int, int]


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
