"""Random numbers that depend on a seed and a batch's number alone."""

from __future__ import annotations

import numpy as np


def check_batch(seed: int, index: int, **counts: int) -> np.random.Generator:
    """The source of a batch's random numbers.

    Args:
        seed: Of the whole data set.
        index: Which batch.
        counts: Numbers that must be positive integers, by the name of their argument.

    Raises:
        ValueError: If the index is negative, or a count below 1.
    """
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    return np.random.default_rng([seed, index])


def distinct(random: np.random.Generator, rows: int, known: int, drawn: int) -> np.ndarray:
    """int64 ``(rows, drawn)``: numbers below ``known``, in each row none twice."""
    return random.random((rows, known)).argsort(1)[:, :drawn]
