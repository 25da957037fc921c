"""Texts as tokens: written once, in shards on the disk, and mapped from there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqzoo.models.tokenizer import ByteTokenizer, Tokenizer
from seqzoo.train.data.shards import Shards
from seqzoo.train.data.texts import PART, Part, Source

SIDES = ("training", "validation")
# bytes of which a tokenizer gets the texts in one call, to use all cores
BLOCK = 4 * PART


class Joined:
    """Arrays behind one another, read from where they lie when a range is asked for.

    Args:
        parts: Arrays ``(n,)`` of one dtype.
    """

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        self.parts = list(parts)
        self.bounds = np.cumsum([0, *(part.size for part in self.parts)])
        self.size = int(self.bounds[-1])
        self.dtype = self.parts[0].dtype

    def __getitem__(self, place: slice) -> NDArray[Any]:
        """The numbers from ``place.start`` to below ``place.stop``, without a copy where one array holds them all."""
        start, stop, _ = place.indices(self.size)
        first = int(np.searchsorted(self.bounds, start, side="right")) - 1
        pieces = []
        while start < stop:
            end = min(stop, int(self.bounds[first + 1]))
            begin = int(self.bounds[first])
            pieces.append(self.parts[first][start - begin : end - begin])
            start, first = end, first + 1
        if not pieces:
            return np.zeros(0, dtype=self.dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def first(self, count: int) -> Joined:
        """The first numbers, not copied."""
        begins = self.bounds[:-1].tolist()
        return Joined([part[: max(count - begin, 0)] for part, begin in zip(self.parts, begins, strict=True)])


Ids = NDArray[Any] | Joined


@dataclass(frozen=True)
class Tokens:
    """Documents behind one another.

    Attributes:
        ids: uint8, uint16 or uint32 ``(n,)``.
        bounds: int64 ``(documents + 1,)``, from 0 to n.
        bytes: Of the texts that they stand for.
        digest: A fingerprint.
    """

    ids: Ids
    bounds: NDArray[np.int64]
    bytes: int
    digest: str

    @property
    def bytes_per_token(self) -> float:
        """Of the texts."""
        return self.bytes / max(self.ids.size, 1)

    def cut(self, tokens: int) -> Tokens:
        """The first tokens; bytes as the mean of all."""
        if tokens >= self.ids.size:
            return self
        ids = self.ids.first(tokens) if isinstance(self.ids, Joined) else self.ids[:tokens]
        bounds = np.append(self.bounds[self.bounds < tokens], tokens)
        size = round(self.bytes * tokens / self.ids.size)
        return Tokens(ids, bounds, size, f"{self.digest}-{tokens}")


def dtype_of(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest dtype that holds the tokens of a vocabulary."""
    return np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32


def is_held(key: bytes, fraction: float) -> bool:
    """Whether what has this key is held out, by a hash: other documents that come or go do not move it."""
    if fraction == 0.0:
        return False
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64 < fraction


def encoded(parts: Iterable[Part], tokenizer: Tokenizer) -> Iterator[tuple[Part, NDArray[Any]]]:
    """Parts with their tokens, behind the last part of a document the token between texts, where there is one.

    Raises:
        ValueError: If a text is no UTF-8 where the tokenizer does not read bytes; names file and place.
    """
    dtype, block, size = dtype_of(tokenizer.vocab_size), [], 0
    for part in parts:
        block.append(part)
        size += len(part.text)
        if size >= BLOCK:
            yield from _encoded(block, tokenizer, dtype)
            block, size = [], 0
    yield from _encoded(block, tokenizer, dtype)


def _encoded(parts: Sequence[Part], tokenizer: Tokenizer, dtype: Any) -> Iterator[tuple[Part, NDArray[Any]]]:
    if isinstance(tokenizer, ByteTokenizer):
        yield from ((part, np.frombuffer(part.text, dtype=np.uint8)) for part in parts)
        return
    texts = [as_text(part) for part in parts]
    for part, ids in zip(parts, tokenizer.encode_many(texts), strict=True):
        array = np.asarray(ids, dtype=dtype)
        yield part, np.append(array, dtype(tokenizer.end)) if part.ends and tokenizer.end is not None else array


def as_text(part: Part) -> str:
    """A part's text.

    Raises:
        ValueError: If it is no UTF-8; names file and place.
    """
    try:
        return part.text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{part.where}: no UTF-8, byte {error.start} of {len(part.text)}: {error.reason}; convert it, or take "
            "tokenizer bytes"
        ) from error


class Gathered:
    """Documents that become a shard.

    Args:
        tokenizer: What makes tokens of them.
        fraction: Share of the documents that is held out, by a hash of their keys.
    """

    def __init__(self, tokenizer: Tokenizer, fraction: float) -> None:
        self.tokenizer, self.fraction = tokenizer, fraction
        self.sides = SIDES[: 2 if fraction else 1]
        self.ids: dict[str, list[NDArray[Any]]] = {side: [] for side in self.sides}
        self.starts: dict[str, list[int]] = {side: [] for side in self.sides}
        self.counts = dict.fromkeys(self.sides, 0)
        self.bytes = dict.fromkeys(self.sides, 0)

    @property
    def size(self) -> int:
        """Training tokens so far."""
        return self.counts["training"]

    def add(self, parts: Iterable[Part]) -> Gathered:
        """Adds documents, or parts of them, in order."""
        for part, ids in encoded(parts, self.tokenizer):
            side = SIDES[is_held(part.key, self.fraction)]
            if part.begins:
                self.starts[side].append(self.counts[side])
            self.ids[side].append(ids)
            self.counts[side] += ids.size
            self.bytes[side] += len(part.text)
        return self

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Of every side the tokens, where documents begin among them, and the bytes of their texts."""
        found: dict[str, NDArray[Any]] = {}
        empty = np.zeros(0, dtype=dtype_of(self.tokenizer.vocab_size))
        for side in self.sides:
            found[side] = np.concatenate([empty, *self.ids[side]])
            found[f"{side}_starts"] = np.array(self.starts[side], dtype=np.int64)
            found[f"{side}_bytes"] = np.array([self.bytes[side]], dtype=np.int64)
        return found


def tokenised(
    source: Source, tokenizer: Tokenizer, cache: Path, fraction: float = 0.0, verify: bool = True
) -> dict[str, Tokens]:
    """The documents of a source as tokens, from the cache folder, where they are written if they are not there.

    Every piece of the source is a shard, which is whole or not there, so that what was interrupted goes on. They lie
    in a folder of their own for every content of the source, tokenizer and fraction.

    Args:
        source: The texts.
        tokenizer: What makes tokens of them.
        cache: Where folders of shards lie.
        fraction: Share of the documents that is held out, by a hash of their keys.
        verify: Whether the checksums of shards that are there are compared.

    Returns:
        ``"training"``, and ``"validation"`` where a fraction is held out.
    """

    def make(piece: int) -> Mapping[str, NDArray[Any]]:
        return Gathered(tokenizer, fraction).add(source.parts(piece)).arrays()

    of = described(source.identity(), tokenizer, fraction)
    shards = Shards.named(cache, "tokens", of, source.pieces, make, verify=verify)
    return mapped(shards, SIDES[: 2 if fraction else 1])


def described(identity: Any, tokenizer: Tokenizer, fraction: float) -> dict[str, Any]:
    """What decides which tokens there are, as plain data."""
    of = {"task": "tokens", "source": identity, "fraction": fraction}
    return {**of, "tokenizer": tokenizer.digest(), "end": tokenizer.end}


def mapped(shards: Shards, sides: Sequence[str]) -> dict[str, Tokens]:
    """Makes what the shards lack, and maps them."""
    shards.complete()
    loaded = [shards.load(number) for number in range(shards.count)]
    digest = shards.digest(0, shards.count)
    found = {}
    for side in sides:
        ids = Joined([one[side] for one in loaded])
        begins = [one[f"{side}_starts"] + begin for one, begin in zip(loaded, ids.bounds, strict=False)]
        size = sum(int(one[f"{side}_bytes"][0]) for one in loaded)
        found[side] = Tokens(ids, np.concatenate([*begins, [ids.size]]), size, f"{digest}-{side}")
    return found
