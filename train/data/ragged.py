"""Labelled sequences of unequal lengths, behind one another in one array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ragged:
    """Labelled sequences.

    Attributes:
        tokens: uint8 ``(total,)``, the sequences behind one another.
        bounds: int64 ``(n + 1,)``, where each begins, from 0 to the total.
        labels: int64 ``(n,)``.
    """

    tokens: NDArray[np.uint8]
    bounds: NDArray[np.int64]
    labels: NDArray[np.int64]

    @classmethod
    def join(cls, sequences: Sequence[NDArray[np.uint8]], labels: Any) -> Ragged:
        """Puts sequences behind one another."""
        bounds = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(one) for one in sequences], out=bounds[1:])
        tokens = np.concatenate(sequences) if sequences else np.zeros(0, dtype=np.uint8)
        return cls(tokens, bounds, np.asarray(labels, dtype=np.int64))

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> Ragged:
        """The sequences of some indices, in their order."""
        bounds = self.bounds.tolist()
        return Ragged.join([self.tokens[bounds[one] : bounds[one + 1]] for one in indices], self.labels[indices])
