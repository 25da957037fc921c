"""Which rank holds which tokens of a sequence, or of packed sequences, and what follows from that."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from seqzoo.packing import Packing, check_values


@dataclass(frozen=True)
class Plan:
    """The shares of ranks in one sequence (or a dense batch of them) or in packed sequences: integers on the host.

    The tokens lie on the ranks in order, any number on each, none included. Build one with :meth:`of` or
    :meth:`balanced`. Of every sequence one rank is the holder, the one with its last token; an empty sequence belongs
    to the first rank whose tokens end where it lies, or behind.

    Attributes:
        counts: Tokens of every rank.
        rank: This one.
        bounds: Boundaries of the packed sequences over all ranks, from 0 to the total, or None for a dense batch.
    """

    counts: tuple[int, ...]
    rank: int
    bounds: tuple[int, ...] | None = None

    @classmethod
    def of(cls, counts: Iterable[int], rank: int, cu_seqlens: Tensor | Packing | Sequence[int] | None = None) -> Plan:
        """A plan from the tokens of every rank.

        Args:
            counts: Tokens of every rank, not negative.
            rank: This rank, from 0 on.
            cu_seqlens: Boundaries of the packed sequences over all ranks; one on a GPU is brought to the host.

        Raises:
            TypeError: If a count or the rank is no integer.
            ValueError: If there are no ranks, a count is negative, ``rank`` is none of them, or the boundaries do not
                run from 0 to the sum of the counts without descending.
        """
        shares = tuple(operator.index(count) for count in counts)
        if not shares:
            raise ValueError("a plan needs the tokens of at least one rank, got no counts")
        if min(shares) < 0:
            raise ValueError(f"a rank cannot hold a negative number of tokens, got counts {list(shares)}")
        if not 0 <= operator.index(rank) < len(shares):
            raise ValueError(f"rank must lie between 0 and {len(shares) - 1} for {len(shares)} counts, got {rank}")
        bounds = None
        if cu_seqlens is not None:
            bounds = tuple(cu_seqlens.bounds() if isinstance(cu_seqlens, Packing) else map(int, cu_seqlens))
            if len(bounds) < 2:
                raise ValueError(f"cu_seqlens must have at least 2 entries, got {list(bounds)}")
            check_values(torch.tensor(bounds), sum(shares))
        return cls(shares, operator.index(rank), bounds)

    @classmethod
    def balanced(
        cls, total: int, size: int, rank: int, cu_seqlens: Tensor | Packing | Sequence[int] | None = None
    ) -> Plan:
        """A plan of equal shares: rank r of ``size`` begins at token ``r * total // size``.

        Raises:
            ValueError: If ``size`` is below 1 or ``total`` negative, or as :meth:`of` does.
        """
        if size < 1:
            raise ValueError(f"size, the number of ranks, must be at least 1, got {size}")
        if total < 0:
            raise ValueError(f"total, the number of tokens, must not be negative, got {total}")
        cuts = [index * total // size for index in range(size + 1)]
        return cls.of((end - start for start, end in pairwise(cuts)), rank, cu_seqlens)

    # -- tokens --

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.counts)

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Where the ranks' tokens begin, and the total."""
        return (0, *accumulate(self.counts))

    @property
    def total(self) -> int:
        """Tokens of all ranks."""
        return self.cuts[-1]

    @property
    def start(self) -> int:
        """This rank's first token."""
        return self.cuts[self.rank]

    @property
    def end(self) -> int:
        """The token behind this rank's last."""
        return self.cuts[self.rank + 1]

    @property
    def length(self) -> int:
        """Tokens of this rank."""
        return self.counts[self.rank]

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's share of a tensor that has all tokens in dimension ``dim``; a view.

        Raises:
            ValueError: If that dimension has another size than the plan's total.
        """
        if x.shape[dim] != self.total:
            raise ValueError(
                f"the plan is for {self.total} tokens, dimension {dim} of the tensor has {x.shape[dim]}: "
                f"{tuple(x.shape)}"
            )
        return x.narrow(dim, self.start, self.length)

    def unshard(self, shards: Sequence[Tensor], dim: int = 1) -> Tensor:
        """What :meth:`shard` took apart, from the shares of all ranks in order.

        Raises:
            ValueError: If there is not one share a rank, or one has another number of tokens than the plan says.
        """
        found = tuple(shard.shape[dim] for shard in shards)
        if found != self.counts:
            raise ValueError(f"the ranks' shares must have {list(self.counts)} tokens, got {list(found)}")
        return torch.cat(list(shards), dim)

    # -- sequences --

    @cached_property
    def extent(self) -> tuple[int, ...]:
        """The boundaries; those of a dense batch are 0 and the total."""
        return (0, self.total) if self.bounds is None else self.bounds

    @property
    def n_sequences(self) -> int:
        """Packed sequences over all ranks, empty ones included; 1 for a dense batch."""
        return len(self.extent) - 1

    def holder(self, sequence: int) -> int:
        """The rank that has a sequence's last token, and with it its final state."""
        return bisect_left(self.cuts, self.extent[sequence + 1], lo=1) - 1

    def held(self, rank: int) -> range:
        """The sequences whose holder a rank is."""
        ends = self.extent[1:]
        # ends at the first token belong to the first rank
        first = 0 if rank == 0 else bisect_left(ends, self.cuts[rank] + 1)
        return range(first, max(first, bisect_left(ends, self.cuts[rank + 1] + 1)))

    @cached_property
    def sequences(self) -> range:
        """The sequences that this rank runs: those that it holds, and the one that goes on behind its last token."""
        held = self.held(self.rank)
        return range(held.start, held.stop + self.continues_after)

    @cached_property
    def continues_before(self) -> bool:
        """Whether this rank has tokens and the first continues a sequence of an earlier rank."""
        return self.length > 0 and self._inside(self.start)

    @cached_property
    def continues_after(self) -> bool:
        """Whether this rank has tokens and the last one's sequence goes on on a later rank."""
        return self.length > 0 and self._inside(self.end)

    @property
    def crosses(self) -> bool:
        """Whether any sequence goes over any cut; if not, no rank needs another's state."""
        return any(map(self._inside, self.cuts))

    def _inside(self, place: int) -> bool:
        """Whether a sequence has tokens on both sides of a place."""
        if not 0 < place < self.total:
            return False
        return self.extent[bisect_left(self.extent, place)] != place

    @cached_property
    def previous(self) -> int | None:
        """The rank with the token before this rank's first, where both are of one sequence."""
        if not self.continues_before:
            return None
        return next(rank for rank in reversed(range(self.rank)) if self.counts[rank])

    @cached_property
    def following(self) -> int | None:
        """The rank with the token behind this rank's last, where both are of one sequence."""
        if not self.continues_after:
            return None
        return next(rank for rank in range(self.rank + 1, self.size) if self.counts[rank])

    # -- other ranks --

    @cached_property
    def views(self) -> tuple[Plan, ...]:
        """The same plan as every rank sees it."""
        return tuple(replace(self, rank=rank) for rank in range(self.size))

    @property
    def passes(self) -> bool:
        """Whether what enters this rank goes through it: it has no tokens, or all are inside one sequence."""
        return self.length == 0 or (self.continues_before and self.continues_after and len(self.sequences) == 1)

    def shares(self, sequence: int) -> list[int]:
        """The ranks that have tokens of a sequence, in order; of an empty one the holder."""
        start, end = self.extent[sequence], self.extent[sequence + 1]
        found = [rank for rank, (a, b) in enumerate(pairwise(self.cuts)) if max(a, start) < min(b, end)]
        return found or [self.holder(sequence)]

    def mirrored(self) -> Plan:
        """The plan of the same tokens in the opposite order, in which the last rank is the first."""
        bounds = None if self.bounds is None else tuple(self.total - place for place in reversed(self.bounds))
        return Plan(self.counts[::-1], self.size - 1 - self.rank, bounds)

    # -- this rank's part of its sequences --

    @property
    def offset(self) -> int:
        """The position of this rank's first token in its sequence."""
        return self.start - self.extent[self.sequences.start] if self.continues_before else 0

    @cached_property
    def lengths(self) -> list[int]:
        """Of each of :attr:`sequences` the tokens on this rank."""
        clamped = [min(max(place, self.start), self.end) for place in self.extent]
        return [clamped[index + 1] - clamped[index] for index in self.sequences]

    def packing(self, device: torch.device | str | None = None) -> Packing | None:
        """The packing of this rank's tokens, None for a dense batch; an empty sequence where it has no sequence."""
        return None if self.bounds is None else Packing.from_lengths(self.lengths or [0], device=device)
