"""State tracking: words over a group, whose running product is asked for at every token.

"The Illusion of State in State-Space Models", https://arxiv.org/abs/2404.08819: what a model of any length has to know
of a group grows with the group's structure. A sum modulo 2, parity, already needs a state that can change its sign
(https://arxiv.org/abs/2411.12537); permutations of five need more than diagonal dynamics of any depth that is fixed.
"""

from __future__ import annotations

import functools
import itertools
import math
import re

import numpy as np
import torch
from torch import Tensor

from seqzoo.train.data.draws import check_batch

_FACTOR = re.compile(r"([ZSA])([1-9][0-9]*)")
# elements, so that a table of all products stays small
LARGEST = 1000


@functools.cache
def product_table(group: str) -> np.ndarray:
    """The products of all pairs of elements, int64 ``(n, n)``; element 0 is the identity.

    Args:
        group: ``"Z60"``, integers modulo 60; ``"S5"``, permutations of 5, and ``"A5"``, the even ones, both in
            lexicographic order; or a direct product, ``"A4xZ5"``. A product of permutations applies the left one first.

    Raises:
        ValueError: If there is no such group, or it has more than 1000 elements.
    """
    parts = group.split("x")
    matches = [_FACTOR.fullmatch(part) for part in parts]
    if not all(matches):
        raise ValueError(f"a group is Zn, Sn or An, or several joined by x, as A4xZ5, got {group!r}")
    table = np.zeros((1, 1), dtype=np.int64)
    for match in matches:
        assert match is not None  # noqa: S101 for the type checker, all() has looked
        kind, size = match[1], int(match[2])
        count = size if kind == "Z" else math.factorial(min(size, 10)) // (2 if kind == "A" and size > 1 else 1)
        if count * len(table) > LARGEST:
            raise ValueError(f"the group {group} has more than {LARGEST} elements")
        right = _cyclic(size) if kind == "Z" else _permutations(size, even=kind == "A")
        n = len(right)
        table = (table[:, None, :, None] * n + right[None, :, None, :]).reshape(len(table) * n, -1)
    return table


def _cyclic(size: int) -> np.ndarray:
    numbers = np.arange(size)
    return (numbers[:, None] + numbers) % size


def _permutations(size: int, even: bool) -> np.ndarray:
    elements = [one for one in itertools.permutations(range(size)) if not even or _sign(one) == 1]
    index = {one: place for place, one in enumerate(elements)}
    return np.array([[index[tuple(b[i] for i in a)] for b in elements] for a in elements])


def _sign(permutation: tuple[int, ...]) -> int:
    swaps = sum(a > b for a, b in itertools.combinations(permutation, 2))
    return -1 if swaps % 2 else 1


def group_words(seed: int, index: int, *, batch_size: int, length: int, group: str = "S3") -> tuple[Tensor, Tensor]:
    """A batch of words over a group, a pure function of its arguments.

    ``group="Z2"`` is parity, ``"Z5"`` the sum modulo 5.

    Args:
        seed: Of the whole data set.
        index: Which batch.
        batch_size: Sequences.
        length: Tokens.
        group: As of :func:`product_table`, whose elements are the ids; drawn uniformly.

    Returns:
        ids: int64 ``(batch_size, length)``.
        labels: Alike: the product of all elements so far, from left to right.

    Raises:
        ValueError: If a number is out of range, or there is no such group.
    """
    random = check_batch(seed, index, batch_size=batch_size, length=length)
    table = product_table(group)
    ids = random.integers(0, len(table), (batch_size, length))
    return _running(table, ids)


def cycle_navigation(seed: int, index: int, *, batch_size: int, length: int, size: int = 5) -> tuple[Tensor, Tensor]:
    """A batch of walks on a cycle: ids 0, 1 and 2 stay, step forward, step back; labels are the place after each.

    "Neural Networks and the Chomsky Hierarchy", https://arxiv.org/abs/2207.02098. Arguments and results as
    :func:`group_words`, ``size`` the places.
    """
    random = check_batch(seed, index, batch_size=batch_size, length=length, size=size)
    ids = random.integers(0, 3, (batch_size, length))
    steps = np.array([0, 1, -1])[ids]
    return torch.from_numpy(ids), torch.from_numpy(steps.cumsum(1) % size)


def _running(table: np.ndarray, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    labels = np.empty_like(ids)
    state = np.zeros(len(ids), dtype=np.int64)
    for place in range(ids.shape[1]):
        state = labels[:, place] = table[state, ids[:, place]]
    return torch.from_numpy(ids), torch.from_numpy(labels)
