"""Batches of whole documents, filled up to a number of tokens by best-fit packing of their lengths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from seqzoo.modules.options import check_count

# what becomes of a document longer than a pack: its first tokens are kept, it is an error, or it is left out
LONG = ("truncate", "error", "drop")


def pack_lengths(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Packs items into as few packs as best-fit-decreasing needs: each, longest first, to the fullest pack it fits.

    The packing runs on the histogram of lengths ("Efficient Sequence Packing without Cross-contamination",
    https://arxiv.org/abs/2107.02027, section 3.1), so its time grows with the number of different lengths, not of
    items: equal items and equally filled packs are placed together.

    Args:
        lengths: Of the items, from 1 to ``capacity``; items of one length are taken in the order in which they come.
        capacity: Of a pack.

    Returns:
        For each pack the indices of its items, longest first.

    Raises:
        ValueError: If a length is below 1 or above the capacity.
    """
    check_count("capacity", capacity)
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.ndim != 1:
        raise ValueError(f"lengths must be a list of integers, got shape {lengths.shape}")
    outside = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if outside.size:
        raise ValueError(f"a length must be from 1 to {capacity}, got {lengths[outside[0]]} at index {outside[0]}")
    sizes, counts = np.unique(lengths, return_counts=True)
    packs = _pack_histogram(dict(zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True)), capacity)
    # equal items lie behind one another, and each pack takes the next of them
    order = np.argsort(lengths, kind="stable")
    first = dict(zip(sizes.tolist(), np.searchsorted(lengths[order], sizes).tolist(), strict=True))
    order = order.tolist()
    packed = []
    for number, parts in packs:
        for _ in range(number):
            pack = []
            for size, items in parts:
                pack += order[first[size] : first[size] + items]
                first[size] += items
            packed.append(pack)
    return packed


def _pack_histogram(counts: dict[int, int], capacity: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Packs so many items of each size, given in descending order.

    Returns:
        Kinds of packs: how many there are, and what each holds, as sizes and numbers of items.
    """
    # by free space: how many packs have it and hold what, as a chain of (what they held before, size, items)
    space: dict[int, list[tuple[int, Any]]] = defaultdict(list)
    # bit s says whether a pack with s free is there, so that the least that suffices is one operation away
    free = 0
    for size, left in counts.items():
        while left:
            fitting = free >> size
            if fitting:
                least = size + (fitting & -fitting).bit_length() - 1
                packs, held = space[least].pop()
                if not space[least]:
                    free &= ~(1 << least)
            else:
                least, held = capacity, None
                packs = -(-left // (capacity // size))
            each = least // size
            full = min(packs, left // each)
            rest = 0 if full == packs else left - full * each
            filled = int(rest > 0)
            for number, items in ((full, each), (filled, rest), (packs - full - filled, 0)):
                if number:
                    room = least - items * size
                    space[room].append((number, (held, size, items) if items else held))
                    free |= 1 << room
            left -= full * each + rest
    return [(number, _unchained(chain)) for chains in space.values() for number, chain in chains]


def _unchained(chain: Any) -> list[tuple[int, int]]:
    parts = []
    while chain is not None:
        chain, size, items = chain
        parts.append((size, items))
    return parts[::-1]


class PackedBatchSampler(Sampler[list[int]]):
    """Indices of documents that together fill a batch of at most ``tokens`` tokens, for one row and ``cu_seqlens``.

    Every epoch shuffles the documents and packs them anew, the same on every machine; ranks take packs in turn. All
    ranks have equally many batches: the last packs are left out where they do not suffice for all.

    Args:
        lengths: Tokens of the documents.
        tokens: Tokens of a batch, at most.
        long: What becomes of documents that are longer: ``"truncate"``, they count as ``tokens`` and whoever collates
            them cuts them; ``"error"``; or ``"drop"``.
        seed: Of the order.
        rank: Of this process among those that read different data.
        world_size: How many of them there are.

    Raises:
        ValueError: If a number is out of range, there is no document, or a document is too long where that is an error.

    Example:
        >>> from seqzoo.train.data import PackedBatchSampler
        >>> sampler = PackedBatchSampler([5, 3, 3, 2, 2, 1], tokens=8)
        >>> sorted(sorted(batch) for batch in sampler), sampler.efficiency()
        ([[0, 1], [2, 3, 4, 5]], 1.0)
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        tokens: int,
        long: str = "truncate",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_count("tokens", tokens)
        if long not in LONG:
            raise ValueError(f"long must be one of {', '.join(LONG)}, got {long!r}")
        if not 0 <= rank < check_count("world_size", world_size):
            raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}")
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.size == 0:
            raise ValueError("there is no document to pack")
        above = np.flatnonzero(lengths > tokens)
        if above.size and long == "error":
            raise ValueError(
                f"{above.size} documents are longer than a batch of {tokens} tokens, the first, {above[0]}, has "
                f"{lengths[above[0]]}; raise tokens, or choose long='truncate' or long='drop'"
            )
        self.kept = np.flatnonzero(lengths <= tokens) if long == "drop" else np.arange(lengths.size)
        self.lengths, self.tokens = np.minimum(lengths, tokens), tokens
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch, self.place = 0, 0
        self._packs: tuple[int, list[list[int]]] | None = None

    def packs(self) -> list[list[int]]:
        """All batches of this epoch, of all ranks, in the order in which they are taken."""
        if self._packs is None or self._packs[0] != self.epoch:
            random = np.random.default_rng([self.seed, self.epoch])
            order = random.permutation(self.kept)
            packed = pack_lengths(self.lengths[order], self.tokens)
            # a list of lists of unequal length stays one
            found = [order[pack].tolist() for pack in packed]
            self._packs = self.epoch, [found[index] for index in random.permutation(len(found))]
        return self._packs[1]

    def efficiency(self) -> float:
        """The share of this epoch's tokens that are no padding, were batches filled up."""
        packs = self.packs()
        return sum(int(self.lengths[pack].sum()) for pack in packs) / max(len(packs) * self.tokens, 1)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, as distributed training calls it."""
        if epoch != self.epoch:
            self.epoch, self.place = epoch, 0

    def __len__(self) -> int:
        """Batches of an epoch, on every rank."""
        return len(self.packs()) // self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from where the sampler stands to the end of the epoch; the next iteration begins the next epoch."""
        packs, count = self.packs(), len(self)
        while self.place < count:
            pack = packs[self.place * self.world_size + self.rank]
            # before the batch is handed out: a state saved while it is worked on goes on behind it
            self.place += 1
            yield pack
        self.epoch, self.place = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the sampler stands."""
        return {"epoch": self.epoch, "place": self.place, "seed": self.seed, "world_size": self.world_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there.

        Raises:
            ValueError: If the state is of another seed or number of ranks, whose batches are others.
        """
        for name in ("seed", "world_size"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the state is of a sampler with {name} {state[name]}, this one has {getattr(self, name)}"
                )
        self.epoch, self.place = state["epoch"], state["place"]
