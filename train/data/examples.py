"""Labelled examples, and the batches that classifiers take: for training drawn by number, for judging all in order."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqzoo.train.data.ragged import Ragged

# the keyword arguments of SequenceClassifier.loss: x, labels and, for unequal lengths, lengths
Batch = dict[str, Any]


class Examples(Protocol):
    """Examples of a split.

    Attributes:
        labels: int64 ``(n,)``.
        digest: A fingerprint of everything, as 32 hexadecimal digits.
    """

    @property
    def labels(self) -> NDArray[np.int64]: ...

    @property
    def digest(self) -> str: ...

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The examples of some indices."""
        ...


class Sequences:
    """Sequences of tokens, cut to a length: ``x`` int64 ``(B, T)`` with zeros behind each, and ``lengths``.

    Args:
        data: The sequences.
        longest: Tokens that are kept of each.
    """

    def __init__(self, data: Ragged, longest: int) -> None:
        self.data = data
        self.labels = data.labels
        self.longest = longest

    @property
    def digest(self) -> str:
        return fingerprint(self.data.tokens, self.data.bounds, self.data.labels)

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The sequences of some indices, padded to the longest among them."""
        x, lengths = _padded([self.data], indices, self.longest)
        return {"x": x, "lengths": lengths, "labels": torch.from_numpy(self.labels[indices])}


class Pairs:
    """Pairs of sequences, as :class:`seqzoo.models.DualEncoder` takes them: all first ones, then all second ones.

    Args:
        first: The first of every pair, with the pairs' labels.
        second: The second.
        longest: Tokens that are kept of each.
    """

    def __init__(self, first: Ragged, second: Ragged, longest: int) -> None:
        self.parts = (first, second)
        self.labels = first.labels
        self.longest = longest

    @property
    def digest(self) -> str:
        return fingerprint(*(array for part in self.parts for array in (part.tokens, part.bounds, part.labels)))

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The pairs of some indices, padded to the longest sequence among them."""
        x, lengths = _padded(self.parts, indices, self.longest)
        return {"x": x, "lengths": lengths, "labels": torch.from_numpy(self.labels[indices])}


class Pictures:
    """Grey images row by row, each pixel a token or a number: ``x`` int64 ``(B, T)`` or float32 ``(B, T, 1)``.

    Args:
        shards: uint8 ``(n, rows, columns)`` arrays, all but the last of the same n.
        labels: Of all images.
        digest: The fingerprint.
        tokens: Whether pixels are tokens from 0 to 255; else they are ``(pixel / 255 - mean) / deviation``.
        mean: Of the numbers.
        deviation: Of the numbers.
    """

    def __init__(
        self,
        shards: Sequence[NDArray[np.uint8]],
        labels: NDArray[np.int64],
        digest: str,
        *,
        tokens: bool = False,
        mean: float = 0.0,
        deviation: float = 1.0,
    ) -> None:
        self.shards = shards
        self.labels = labels
        self.digest = digest
        self.tokens = tokens
        self.mean = mean
        self.deviation = deviation

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The images of some indices."""
        shard, row = np.divmod(indices, len(self.shards[0]))
        pixels = np.stack([self.shards[one][other] for one, other in zip(shard.tolist(), row.tolist(), strict=True)])
        flat = torch.from_numpy(pixels.reshape(len(indices), -1))
        x = flat.long() if self.tokens else ((flat.float() / 255 - self.mean) / self.deviation)[..., None]
        return {"x": x, "labels": torch.from_numpy(self.labels[indices])}


class TrainingBatches:
    """Endless batches; every example comes once an epoch, and the batch of a number is always the same.

    A batch depends on the seed, the rank and its own number alone, so a run that continues at any number sees what an
    uninterrupted one would have seen, and there is no state to save. Ranks take the examples of a step in turn.

    Args:
        examples: The training examples.
        batch_size: Examples of a batch, of this process.
        seed: Of the order.
        rank: Of this process.
        world_size: How many read different examples.
        start: Number of the first batch.
    """

    def __init__(
        self, examples: Examples, *, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.start = start
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(number) for number in itertools.count(self.start))

    def batch(self, number: int) -> Batch:
        """The examples of a step."""
        return self.examples.batch(self.indices(number))

    def indices(self, number: int) -> NDArray[np.int64]:
        """Which examples a step has."""
        first = (number * self.world_size + self.rank) * self.batch_size
        size = len(self.examples.labels)
        epochs, places = np.divmod(np.arange(first, first + self.batch_size), size)
        orders = {epoch: self._order(epoch) for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)}
        self._orders = orders
        return np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch in self._orders:
            return self._orders[epoch]
        # raw output of a bit generator, which NumPy keeps the same between versions; its shuffling it does not
        raw = np.random.PCG64(np.random.SeedSequence((self.seed, epoch))).random_raw(len(self.examples.labels))
        return raw.argsort(kind="stable")


class EvaluationBatches:
    """All examples once, in order, the last batch smaller where they do not divide; ranks take batches in turn.

    Args:
        examples: The examples.
        batch_size: Of a batch, at most.
        rank: Of this process.
        world_size: How many read different examples.
    """

    def __init__(self, examples: Examples, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.examples = examples
        size = len(examples.labels)
        self.starts = range(rank * batch_size, size, world_size * batch_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Batch]:
        size = len(self.examples.labels)
        return (
            self.examples.batch(np.arange(start, min(start + self.batch_size, size), dtype=np.int64))
            for start in self.starts
        )


def fingerprint(*arrays: NDArray[Any]) -> str:
    """Of arrays, with their shapes and dtypes, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def split_by_content(sequences: Sequence[bytes], fraction: float, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Splits examples into those for training and those for validation, by a hash of what each holds.

    The share is exact but for copies of one example, which all come to the same side.

    Args:
        sequences: What the examples hold.
        fraction: Share of validation.
        seed: Of the choice.

    Returns:
        The indices of both, ascending.
    """
    key = str(seed).encode()
    hashes = np.array(
        [int.from_bytes(hashlib.blake2b(one, digest_size=8, key=key).digest(), "big") for one in sequences],
        dtype=np.uint64,
    )
    wanted = round(fraction * len(hashes))
    if wanted == 0:
        return np.arange(len(hashes)), np.zeros(0, dtype=np.int64)
    chosen = hashes <= np.sort(hashes)[wanted - 1]
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _padded(parts: Sequence[Ragged], indices: NDArray[np.int64], longest: int) -> tuple[Tensor, list[int]]:
    """Rows of all parts one after the other, zeros behind each; the lengths stay on the host, where they are read."""
    begins = np.concatenate([part.bounds[indices] for part in parts])
    lengths = np.minimum(np.concatenate([part.bounds[indices + 1] for part in parts]) - begins, longest)
    x = np.zeros((len(begins), max(int(lengths.max(initial=0)), 1)), dtype=np.int64)
    for row, (begin, length) in enumerate(zip(begins.tolist(), lengths.tolist(), strict=True)):
        x[row, :length] = parts[row // len(indices)].tokens[begin : begin + length]
    return torch.from_numpy(x), lengths.tolist()
