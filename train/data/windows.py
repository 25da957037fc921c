"""Batches of windows over bytes: for training drawn by number, for validation all of them in order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqzoo.train.baselines import Bytes

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
        data: The training bytes.
        context: Bytes that a window predicts.
        batch_size: Windows of a batch.
        seed: Of the whole sequence of batches.
        rank: Of this process among those that read different data; each draws its own windows.
        start: Number of the first batch.
    """

    def __init__(
        self, data: Bytes, *, context: int, batch_size: int, seed: int = 0, rank: int = 0, start: int = 0
    ) -> None:
        if data.size < context + 1:
            raise ValueError(f"a window of context {context} needs {context + 1} training bytes, there are {data.size}")
        # NumPy gathers these in a seventieth of the time that torch's indexing takes
        self.windows = np.lib.stride_tricks.sliding_window_view(data, context + 1)
        self.batch_size = batch_size
        self.key = (seed, rank)
        self.start = start

    def __iter__(self) -> Iterator[Tensor]:
        return (self.batch(number) for number in itertools.count(self.start))

    def batch(self, number: int) -> Tensor:
        """uint8 ``(batch_size, context + 1)``: inputs are all but the last column, labels all but the first."""
        # raw output of a bit generator, which NumPy keeps the same between versions; its distributions it does not
        raw = np.random.PCG64(np.random.SeedSequence((*self.key, number))).random_raw(self.batch_size)
        starts = (raw % np.uint64(self.windows.shape[0])).astype(np.int64)
        return torch.from_numpy(self.windows[starts])


class ValidationWindows:
    """The validation bytes as a few parallel streams, cut into windows; with the state handed on each byte counts once.

    Every byte but the first of all is a label exactly once, predicted from all bytes of its stream before it. Stream r
    continues where stream r - 1 ends, so only the first bytes of a stream see less than they could.

    Args:
        data: The validation bytes.
        context: Width of a window.
        streams: Rows of a batch.
    """

    def __init__(self, data: Bytes, *, context: int, streams: int) -> None:
        labels = data.size - 1
        if labels < 1:
            raise ValueError(f"validation needs at least 2 bytes, there are {data.size}")
        streams = min(streams, labels)
        self.data = torch.from_numpy(data)
        self.context = context
        self.length = -(-labels // streams)
        self.starts = torch.arange(streams) * self.length

    def __len__(self) -> int:
        return -(-self.length // self.context)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.window(index) for index in range(len(self)))

    def window(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels, int64 ``(streams, at most context)``; labels behind the end are ``IGNORED``."""
        inside = torch.arange(index * self.context, min((index + 1) * self.context, self.length))
        places = self.starts[:, None] + inside
        last = self.data.shape[0] - 1
        ids = self.data[places.clamp(max=last)].long()
        labels = self.data[(places + 1).clamp(max=last)].long()
        return ids, labels.masked_fill(places >= last, IGNORED)
