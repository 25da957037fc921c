"""The files of a folder as documents of their own lengths, packed into batches of one row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seqzoo.mixer import nearest
from seqzoo.modules.options import check_count
from seqzoo.train.baselines import Bytes
from seqzoo.train.data.folder_bytes import FolderBytes
from seqzoo.train.data.packed_batches import LONG, PackedBatchSampler
from seqzoo.train.data.windows import IGNORED, replica

# what becomes of a document longer than a batch: beside what the sampler does, its state goes from batch to batch
OPTIONS = ("carry", *LONG)


class PackedBatch(NamedTuple):
    """Documents, or parts of them, behind one another.

    Attributes:
        ids: int64 ``(1, T)``.
        labels: Alike: each token's successor in its document, -100 at the last of a document.
        cu_seqlens: int32, the boundaries.
        documents: Which document each sequence is of.
        continues: Of each, whether it goes on from the batch before.
        goes_on: Of each, whether the next batch goes on with it.
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
        lengths: Bytes of each, at least 2.
        tokens: Of a batch, at most.
        long: What becomes of longer documents: ``"carry"``, or as :class:`PackedBatchSampler` says.
        seed: Of the order.
        rank: Of this process among those that read different data.
        world_size: How many of them there are.
        start: Number of the first batch.
    """

    def __init__(
        self,
        data: Bytes,
        lengths: np.ndarray,
        *,
        tokens: int,
        long: str = "carry",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.data, self.lengths, self.tokens, self.carries = data, lengths, tokens, long == "carry"
        self.begins = np.concatenate([[0], np.cumsum(lengths)])
        # of a document that is cut the sampler packs the rest
        rests = (lengths - 1) % tokens + 1 if self.carries else lengths
        self.sampler = {"tokens": tokens, "long": "error" if self.carries else long, "seed": seed}
        self.sampler |= {"rank": rank, "world_size": world_size}
        self.rests, self.start = rests, start
        if len(PackedBatchSampler(rests, **self.sampler)) == 0:
            raise ValueError(
                f"{lengths.size} documents fill fewer batches of {tokens} tokens than {world_size} groups of processes "
                "need; make tokens smaller"
            )

    def __iter__(self) -> Iterator[PackedBatch]:
        return (self.collate(parts) for parts in itertools.islice(self.parts(), self.start, None))

    def parts(self) -> Iterator[list[tuple[int, int, int]]]:
        """What every batch holds: documents, with the first byte and the byte behind the last of each."""
        sampler = PackedBatchSampler(self.rests, **self.sampler)
        while True:
            for pack in sampler:
                last = []
                for document in pack:
                    length = int(self.lengths[document])
                    place = length - int(self.rests[document]) if self.carries else 0
                    yield from ([(document, at, at + self.tokens)] for at in range(0, place, self.tokens))
                    last.append((document, place, min(length, place + self.tokens)))
                yield last

    def collate(self, parts: list[tuple[int, int, int]]) -> PackedBatch:
        """A batch of what :meth:`parts` names."""
        ids, labels = [], []
        for document, start, stop in parts:
            begin, end = self.begins[document], self.begins[document + 1]
            ids.append(self.data[begin + start : begin + stop].astype(np.int64))
            after = self.data[begin + start + 1 : min(begin + stop + 1, end)].astype(np.int64)
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


class FolderDocuments(FolderBytes):
    """Next-byte prediction on the files of a folder, each a document of its own, packed into batches of one row.

    Validation reads its files as :class:`FolderBytes` does, in windows with the state handed on.

    Args:
        folder: Where the files are; "{stdlib}" is the source of the running Python's standard library.
        files: Patterns of the names (or relative paths) of files that are read.
        exclude: Patterns of the names of files and folders that are left out.
        validation_fraction: Share of the files that is held out, chosen by a hash of the path.
        tokens: Bytes of a training batch, at most, in every process, or group of processes that share sequences.
        long: What becomes of a file longer than that: "carry" cuts it into batches that follow one another, from each
            of which the next takes the state, without gradients; "truncate" keeps its beginning, "drop" leaves it out,
            "error" refuses it.
        context: Bytes of a window in validation.
        validation_streams: Streams in which the validation bytes are read, side by side.
        seed: Seed of the order of the documents; the command sets it from its own.
    """

    def __init__(
        self,
        folder: str = "{stdlib}",
        files: list[str] = ["*.py"],  # noqa: B006 the command line shows this default, and nothing changes it
        exclude: list[str] = ["site-packages", "dist-packages", "test", "tests", "__pycache__"],  # noqa: B006
        validation_fraction: float = 0.05,
        tokens: int = 4096,
        long: str = "carry",
        context: int = 512,
        validation_streams: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(folder, files, exclude, validation_fraction, context, 1, validation_streams, seed)
        if check_count("tokens", tokens) < 2:
            raise ValueError(f"tokens must be at least 2, one to read and one to predict, got {tokens}")
        if long not in OPTIONS:
            raise ValueError(f"there is no long={long!r}; {nearest(long, OPTIONS)}")
        self.tokens, self.long = tokens, long

    @property
    def longest(self) -> tuple[str, int]:
        """As the base class's."""
        lengths = self._documents()[1]
        read = int(lengths.max()) if self.long == "carry" else min(int(lengths.max()), self.tokens)
        return max(("data.context", self.context), ("the longest document", read), key=lambda pair: pair[1])

    def setup(self, stage: str | None = None) -> None:
        """Reads the files, once.

        Raises:
            ValueError: As the base class, or if no file has two bytes, or one is too long where that is an error.
        """
        super().setup(stage)
        self._batches(0, 1, 0)

    def train_dataloader(self) -> PackedDocuments:
        """Batches from the step on at which the trainer stands."""
        trainer = self.trainer
        start = 0 if trainer is None else trainer.global_step * trainer.accumulate_grad_batches
        return self._batches(*replica(trainer), start)

    def _batches(self, rank: int, world_size: int, start: int) -> PackedDocuments:
        data, lengths = self._documents()
        return PackedDocuments(
            data,
            lengths,
            tokens=self.tokens,
            long=self.long,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            start=start,
        )

    def _documents(self) -> tuple[Bytes, np.ndarray]:
        """The training bytes without files that have nothing to predict, and the lengths of the others."""
        if self.training_bytes is None:
            raise RuntimeError("the data is read by setup(), which was not called")
        lengths = np.array(self.training_lengths)
        if not (lengths > 1).any():
            raise ValueError(f"the data folder {self.folder!r} has no training file of at least 2 bytes")
        return self.training_bytes[np.repeat(lengths > 1, lengths)], lengths[lengths > 1]
