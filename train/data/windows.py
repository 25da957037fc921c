"""Batches of windows over tokens: for training drawn by number, for validation all of them in order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqzoo.train.data.tokenised import Ids

IGNORED = -100


def tokens_of(batch: Any) -> int:
    """How many tokens a training batch, of windows or packed, has the model read."""
    return batch[:, 1:].numel() if isinstance(batch, Tensor) else batch.ids.numel()


def replica(trainer: Any) -> tuple[int, int]:
    """Which of the groups of processes that read different data this process belongs to, and how many there are."""
    divided = None if trainer is None else trainer.distributed_sampler_kwargs
    return (0, 1) if divided is None else (divided["rank"], divided["num_replicas"])


class TrainingWindows:
    """Endless batches of windows at random places; the batch of a number is always the same.

    A batch depends on the seed, the rank and its own number alone, so a run that continues at any number sees what an
    uninterrupted one would have seen, and there is no state to save.

    Args:
        data: The training tokens.
        context: Tokens that a window predicts.
        batch_size: Windows of a batch.
        seed: Of the whole sequence of batches.
        rank: Of this process among those that read different data; each draws its own windows.
        start: Number of the first batch.
        complement: Of every token that of the other strand of DNA; half of the windows are then read backwards there.
    """

    def __init__(
        self,
        data: Ids,
        *,
        context: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        start: int = 0,
        complement: NDArray[Any] | None = None,
    ) -> None:
        if data.size < context + 1:
            raise ValueError(
                f"a window of context {context} needs {context + 1} training tokens, there are {data.size}"
            )
        self.data = data
        self.width = context + 1
        self.batch_size = batch_size
        self.key = (seed, rank)
        self.start = start
        self.complement = complement

    def __iter__(self) -> Iterator[Tensor]:
        return (self.batch(number) for number in itertools.count(self.start))

    def batch(self, number: int) -> Tensor:
        """``(batch_size, context + 1)``: inputs are all but the last column, labels all but the first.

        They are uint8 where that holds all tokens, else int64.
        """
        # raw output of a bit generator, which NumPy keeps the same between versions; its distributions it does not
        random = np.random.PCG64(np.random.SeedSequence((*self.key, number)))
        raw = random.random_raw(self.batch_size)
        starts = (raw % np.uint64(self.data.size - self.width + 1)).astype(np.int64).tolist()
        rows = np.stack([self.data[start : start + self.width] for start in starts])
        if self.complement is not None:
            turn(rows, self.complement, random)
        return as_batch(rows)


def turn(rows: NDArray[Any], complement: NDArray[Any], random: np.random.PCG64) -> None:
    """Replaces about half of the rows, at random, by what stands on the other strand, read backwards."""
    turned = random.random_raw(len(rows)) >> np.uint64(63) == 1
    rows[turned] = complement[rows[turned]][:, ::-1]


def as_batch(rows: NDArray[Any]) -> Tensor:
    """Rows of tokens as a tensor, uint8 where they are, else int64."""
    return torch.from_numpy(rows if rows.dtype == np.uint8 else rows.astype(np.int64))


class ValidationWindows:
    """All tokens as a few parallel streams, cut into windows; with the state handed on each counts once.

    Every token but the first of all is a label exactly once, predicted from all tokens of its stream before it. Stream
    r continues where stream r - 1 ends, so only the first tokens of a stream see less than they could.

    Args:
        data: The validation tokens.
        context: Width of a window.
        streams: Rows of a batch.
    """

    def __init__(self, data: Ids, *, context: int, streams: int) -> None:
        labels = data.size - 1
        if labels < 1:
            raise ValueError(f"validation needs at least 2 tokens, there are {data.size}")
        streams = min(streams, labels)
        self.data = data
        self.context = context
        self.length = -(-labels // streams)
        self.starts = [row * self.length for row in range(streams)]

    def __len__(self) -> int:
        return -(-self.length // self.context)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.window(index) for index in range(len(self)))

    def window(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels, int64 ``(streams, at most context)``; labels behind the end are ``IGNORED``."""
        first, last = index * self.context, min((index + 1) * self.context, self.length)
        ids = np.zeros((len(self.starts), last - first), dtype=np.int64)
        labels = np.full_like(ids, IGNORED)
        for row, start in enumerate(self.starts):
            read = self.data[start + first : start + last + 1]
            width = max(read.size - 1, 0)
            ids[row, :width], labels[row, :width] = read[:width], read[1:]
        return torch.from_numpy(ids), torch.from_numpy(labels)
