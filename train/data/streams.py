"""Data sets that are read as they come: what is kept of them on the disk, and training on what is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqzoo.models.tokenizer import Tokenizer
from seqzoo.train.data.packed_documents import PackedBatch
from seqzoo.train.data.shards import Shards
from seqzoo.train.data.texts import PART, Part, row_part
from seqzoo.train.data.tokenised import Gathered, Tokens, described, encoded, is_held, mapped
from seqzoo.train.data.windows import IGNORED, as_batch, turn

# training tokens of a shard of a stream
SHARD = 1 << 24

Position = dict[str, Any]


class Stream:
    """The rows of a ``datasets.IterableDataset`` as documents, from any place on.

    Args:
        open: Opens it at its begin.
        identity: Plain data that tell it from other streams.
        name: What it is, for messages.
        column: Which column is the text.
        joined: Whether all rows are parts of one document.
        fraction: Share of the documents that is held out, by a hash of their text.
        held: Whether those are what is read, or the others.
    """

    def __init__(
        self,
        open: Callable[[], Any],
        identity: Mapping[str, Any],
        *,
        name: str,
        column: str,
        joined: bool = False,
        fraction: float = 0.0,
        held: bool = False,
    ) -> None:
        self.open, self.name, self.column, self.joined = open, name, column, joined
        self.fraction, self.held = fraction, held
        self.identity = {**identity, "column": column, "joined": joined, "fraction": fraction, "held": held}
        self.data: Any = None

    def documents(self, state: Mapping[str, Any] | None = None) -> Iterator[Part]:
        """The documents behind a place that :meth:`state` told; None is the begin."""
        self.data = self.open()
        if state is not None:
            self.data.load_state_dict(state)
        begins = state is None
        for row in self.data:
            if self.column not in row:
                known = ", ".join(row)
                raise ValueError(f"{self.name} has no column {self.column!r}, it has {known}; name --data.column")
            part = row_part(row[self.column], f"{self.name}, a row that begins {row[self.column]!r:.40}", self.column)
            if is_held(part.key, self.fraction) != self.held:
                continue
            yield part._replace(begins=begins, ends=False) if self.joined else part
            begins = False

    def state(self) -> dict[str, Any]:
        """The place behind the document that was given last, as plain data."""
        return self.data.state_dict()


def stored(stream: Stream, tokenizer: Tokenizer, cache: Path, most: int, verify: bool = True) -> Tokens:
    """The first tokens of a stream, from the cache folder, where they are written if they are not there.

    A shard keeps the place at which the next goes on, so that what was interrupted reads nothing twice.

    Args:
        stream: The documents.
        tokenizer: What makes tokens of them.
        cache: Where folders of shards lie.
        most: Tokens, at most.
        verify: Whether the checksums of shards that are there are compared.
    """
    of = described({**stream.identity, "shard": SHARD, "most": most}, tokenizer, 0.0)

    def make(number: int) -> Mapping[str, NDArray[Any]]:
        state = json.loads(shards.load(number - 1)["state"].tobytes()) if number else {"place": None}
        gathered = Gathered(tokenizer, 0.0)
        if state is not None:
            documents = stream.documents(state["place"])
            wanted = min(SHARD, most - number * SHARD)
            while gathered.size < wanted and (some := _some(documents, PART)):
                gathered.add(some)
            state = {"place": stream.state()} if gathered.size >= wanted else None
        return gathered.arrays() | {"state": np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)}

    shards = Shards.named(cache, "tokens", of, -(-most // SHARD), make, verify=verify)
    return mapped(shards, ["training"])["training"].cut(most)


def _some(documents: Iterator[Part], size: int) -> list[Part]:
    """The next documents, of together at least so many bytes, where there are as many."""
    found, read = [], 0
    for part in documents:
        found.append(part)
        read += len(part.text)
        if read >= size:
            break
    return found


class _Document(NamedTuple):
    """A document of which a batch may have read the begin.

    Attributes:
        number: In the order of the stream.
        at: First token that was not read.
        ids: All of its tokens.
    """

    number: int
    at: int
    ids: NDArray[Any]


class StreamedBatches:
    """Endless batches of a stream in its own order: consecutive windows, or packed documents.

    Groups of processes take batches in turn; each of them reads the whole stream. A place in the stream is kept with
    what was read of it and not used, so that a run goes on with the batch that would have come.

    Args:
        stream: The documents.
        tokenizer: What makes tokens of them.
        context: Tokens that a window predicts.
        batch_size: Windows of a batch.
        tokens: Of a batch of packed documents; None makes windows.
        long: What becomes of a longer document: ``"carry"``, ``"truncate"``, ``"drop"`` or ``"error"``.
        seed: Of the choice of strands.
        complement: Of every token that of the other strand of DNA, where half of the windows are read there.
        rank: Of this process among those that read different data.
        world_size: How many of them there are.
        position: Where to begin; None is the begin.
        remembered: Places that :meth:`position` knows: a trainer reads a batch ahead, and a checkpoint between steps is
            of the last one, behind which it may have read as many batches as it accumulates.

    Raises:
        ValueError: If documents would go on in batches of another process, or strands be chosen for packed documents.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: Tokenizer,
        *,
        context: int,
        batch_size: int,
        tokens: int | None = None,
        long: str = "carry",
        seed: int = 0,
        complement: NDArray[Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
        position: Position | None = None,
        remembered: int = 4,
    ) -> None:
        if tokens is not None and long == "carry" and world_size > 1:
            raise ValueError(
                f"{world_size} groups of processes take the batches of a stream in turn, and a document would go on in "
                "another group's; choose data.long truncate, drop or error, or data.max_tokens"
            )
        if tokens is not None and complement is not None:
            raise ValueError(
                "of packed documents of a stream no strand is chosen; train on windows, or give max_tokens"
            )
        self.stream, self.tokenizer = stream, tokenizer
        self.context, self.batch_size, self.tokens, self.long = context, batch_size, tokens, long
        self.seed, self.complement = seed, complement
        self.rank, self.world_size = rank, world_size
        self.remembered = remembered
        begin: Position = {"number": 0, "place": None, "documents": 0, "ids": torch.zeros(0, dtype=torch.int64)}
        self.begin = {**begin, "waiting": []} if position is None else position
        self.positions = {self.begin["number"]: self.begin}

    def position(self, number: int) -> Position:
        """Where the stream stood before the batch of a number; only the last few are known."""
        return self.positions[number]

    def __iter__(self) -> Iterator[Tensor | PackedBatch]:
        begin = self.begin
        number = begin["number"]
        self.place, self.count = begin["place"], begin["documents"]
        self.ids: NDArray[Any] = begin["ids"].numpy()
        self.waiting = [_Document(document, at, ids.numpy()) for document, at, ids in begin["waiting"]]
        self.documents = self.stream.documents(self.place)
        # whether anything was read of the stream that batches can hold, since it was last at its begin
        self.useful = True
        while True:
            batches = [
                self._window(number * self.world_size + rank) if self.tokens is None else self._pack(self.tokens)
                for rank in range(self.world_size)
            ]
            number += 1
            self.positions[number] = {
                "number": number,
                "place": self.place,
                "documents": self.count,
                "ids": torch.from_numpy(self.ids.astype(np.int64)),
                "waiting": [(one.number, one.at, torch.from_numpy(one.ids.astype(np.int64))) for one in self.waiting],
            }
            self.positions.pop(number - self.remembered, None)
            yield batches[self.rank]

    def _more(self) -> list[NDArray[Any]]:
        """The tokens of some documents, of the begin again behind the end.

        Raises:
            ValueError: If the stream has nothing that a batch can hold.
        """
        some = _some(self.documents, PART >> 2)
        if not some:
            if not self.useful:
                why = (
                    "" if self.long != "drop" or self.tokens is None else f", or longer than data.tokens {self.tokens}"
                )
                raise ValueError(f"{self.stream.name} has nothing to train on: every document is too short{why}")
            self.useful = False
            self.documents = self.stream.documents()
            some = _some(self.documents, PART >> 2)
        if not some:
            raise ValueError(f"{self.stream.name} is empty: there is nothing to train on")
        self.place = self.stream.state()
        found = [ids for _, ids in encoded(some, self.tokenizer)]
        self.useful = self.useful or (self.tokens is None and any(ids.size for ids in found))
        return found

    def _window(self, number: int) -> Tensor:
        used = self.batch_size * self.context
        pieces, size = [self.ids], self.ids.size
        while size < used + 1:
            pieces += self._more()
            size = sum(piece.size for piece in pieces)
        ids = np.concatenate(pieces).astype(np.int64)
        rows = np.stack([ids[start : start + self.context + 1] for start in range(0, used, self.context)])
        self.ids = ids[used:]
        if self.complement is not None:
            turn(rows, self.complement, np.random.PCG64(np.random.SeedSequence((self.seed, number))))
        return as_batch(rows)

    def _pack(self, tokens: int) -> PackedBatch:
        parts: list[tuple[_Document, int]] = []
        room = tokens
        while room:
            if not self.waiting:
                self._wait(tokens)
                continue
            document = self.waiting[0]
            left = document.ids.size - document.at
            if left > room and self.long != "carry":
                break
            taken = min(left, room)
            parts.append((document, taken))
            room -= taken
            self.waiting[:1] = [document._replace(at=document.at + taken)] if taken < left else []
        ids, labels = [], []
        for document, taken in parts:
            after = document.ids[document.at + 1 : document.at + taken + 1].astype(np.int64)
            ids.append(document.ids[document.at : document.at + taken].astype(np.int64))
            labels.append(np.concatenate([after, np.full(taken - after.size, IGNORED)]))
        return PackedBatch(
            torch.from_numpy(np.concatenate(ids))[None],
            torch.from_numpy(np.concatenate(labels))[None],
            torch.from_numpy(np.cumsum([0, *(taken for _, taken in parts)]).astype(np.int32)),
            [document.number for document, _ in parts],
            [document.at > 0 for document, _ in parts],
            [document.at + taken < document.ids.size for document, taken in parts],
            tokens,
        )

    def _wait(self, tokens: int) -> None:
        """Queues more documents, cut or left out where they are too long."""
        for ids in self._more():
            self.count += 1
            if ids.size > tokens and self.long == "error":
                raise ValueError(
                    f"{self.stream.name}: document {self.count - 1} has {ids.size} tokens, a batch {tokens}; raise "
                    "data.tokens, or choose data.long carry, truncate or drop"
                )
            if ids.size > 1 and not (ids.size > tokens and self.long == "drop"):
                kept = ids if self.long == "carry" else ids[:tokens]
                self.waiting.append(_Document(self.count - 1, 0, kept))
                self.useful = True
