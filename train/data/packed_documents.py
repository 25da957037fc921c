"""Documents of their own lengths, packed into batches of one row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqzoo.train.data.packed_batches import LONG, PackedBatchSampler
from seqzoo.train.data.tokenised import Ids
from seqzoo.train.data.windows import IGNORED

# what becomes of a document longer than a batch: beside what the sampler does, its state goes from batch to batch
OPTIONS = ("carry", *LONG)


class PackedBatch(NamedTuple):
    """Documents, or parts of them, behind one another.

    Attributes:
        ids: int64 ``(1, T)``.
        labels: Alike: each token's successor in its document, -100 at the last of a document.
        cu_seqlens: int32, the boundaries.
        documents: Which document each sequence is of.
        continues: Of each, whether it goes on from a batch before.
        goes_on: Of each, whether a batch to come goes on with it.
        capacity: Tokens that a full batch has.
    """

    ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    documents: list[int]
    continues: list[bool]
    goes_on: list[bool]
    capacity: int


class PackedDocuments:
    """Endless batches of packed documents; the batch of a number is always the same, so there is no state to save.

    A document that is longer than a batch is, with ``long="carry"``, cut into full batches and a rest, which follow
    one another; the rest is packed with other documents.

    Args:
        data: The documents behind one another.
        lengths: Tokens of each, at least 2.
        tokens: Of a batch, at most.
        long: What becomes of longer documents: ``"carry"``, or as :class:`PackedBatchSampler` says.
        seed: Of the order.
        rank: Of this process among those that read different data.
        world_size: How many of them there are.
        start: Number of the first batch.
        begins: Where each document begins; None where they lie behind one another from 0 on.
        complement: Of every token that of the other strand of DNA; in every epoch half of the documents are then read
            backwards there.
    """

    def __init__(
        self,
        data: Ids,
        lengths: np.ndarray,
        *,
        tokens: int,
        long: str = "carry",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        begins: np.ndarray | None = None,
        complement: NDArray[Any] | None = None,
    ) -> None:
        self.data, self.lengths, self.tokens, self.carries = data, lengths, tokens, long == "carry"
        self.begins = np.concatenate([[0], np.cumsum(lengths)]) if begins is None else begins
        self.complement, self.seed = complement, seed
        # of a document that is cut the sampler packs the rest
        rests = (lengths - 1) % tokens + 1 if self.carries else lengths
        self.sampler = {"tokens": tokens, "long": "error" if self.carries else long, "seed": seed}
        self.sampler |= {"rank": rank, "world_size": world_size}
        self.rests, self.start = rests, start
        if not self.carries and long == "drop" and rests.min() > tokens:
            raise ValueError(
                f"all {lengths.size} documents are longer than a batch of {tokens} tokens, the shortest has "
                f"{rests.min()}; make tokens greater, or choose long='truncate' or long='carry'"
            )
        if len(PackedBatchSampler(rests, **self.sampler)) == 0:
            raise ValueError(
                f"{lengths.size} documents fill fewer batches of {tokens} tokens than {world_size} groups of processes "
                "need; make tokens smaller"
            )

    def __iter__(self) -> Iterator[PackedBatch]:
        return (self.collate(*found) for found in itertools.islice(self._numbered(), self.start, None))

    def parts(self) -> Iterator[list[tuple[int, int, int]]]:
        """What every batch holds: documents, with the first token and the token behind the last of each."""
        return (parts for parts, _ in self._numbered())

    def _numbered(self) -> Iterator[tuple[list[tuple[int, int, int]], int]]:
        """The parts of every batch, and the number of the epoch."""
        sampler = PackedBatchSampler(self.rests, **self.sampler)
        for epoch in itertools.count():
            for pack in sampler:
                last = []
                for document in pack:
                    length = int(self.lengths[document])
                    place = length - int(self.rests[document]) if self.carries else 0
                    yield from (([(document, at, at + self.tokens)], epoch) for at in range(0, place, self.tokens))
                    last.append((document, place, min(length, place + self.tokens)))
                yield last, epoch

    def collate(self, parts: list[tuple[int, int, int]], epoch: int = 0) -> PackedBatch:
        """A batch of what :meth:`parts` names."""
        ids, labels = [], []
        for document, start, stop in parts:
            # with the successor of the last token, where there is one
            read = self._read(document, start, min(stop + 1, int(self.lengths[document])), epoch)
            after = read[1:]
            ids.append(read[: stop - start])
            labels.append(np.concatenate([after, np.full(stop - start - after.size, IGNORED)]))
        bounds = np.cumsum([0, *(stop - start for _, start, stop in parts)])
        return PackedBatch(
            torch.from_numpy(np.concatenate(ids))[None],
            torch.from_numpy(np.concatenate(labels))[None],
            torch.from_numpy(bounds.astype(np.int32)),
            [document for document, _, _ in parts],
            [start > 0 for _, start, _ in parts],
            [self.carries and stop < self.lengths[document] for document, _, stop in parts],
            self.tokens,
        )

    def _read(self, document: int, start: int, stop: int, epoch: int) -> NDArray[np.int64]:
        """The tokens from ``start`` to below ``stop`` of a document, as it is read in this epoch."""
        begin, length = int(self.begins[document]), int(self.lengths[document])
        if self.complement is None or not self._turned(document, epoch):
            return self.data[begin + start : begin + stop].astype(np.int64)
        return self.complement[self.data[begin + length - stop : begin + length - start]][::-1].astype(np.int64)

    def _turned(self, document: int, epoch: int) -> bool:
        raw = np.random.PCG64(np.random.SeedSequence((self.seed, epoch, document))).random_raw()
        return bool(raw >> 63)
