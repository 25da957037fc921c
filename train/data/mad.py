"""The tasks of "Mechanistic Design and Scaling of Hybrid Architectures", https://arxiv.org/abs/2403.17844, section 4.

In-context, fuzzy and noisy recall, compression and memorisation; the sixth is :func:`selective_copying`. The laws are
the paper's, not its files: the published sets cannot be drawn again.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from seqzoo.train.data.draws import check_batch
from seqzoo.train.data.windows import IGNORED


def in_context_recall(
    seed: int,
    index: int,
    *,
    batch_size: int,
    length: int = 128,
    vocab_size: int = 16,
    noise: float = 0.0,
    n_noise: int = 0,
) -> tuple[Tensor, Tensor]:
    """A batch of recall: keys, each followed by its value, which every sequence chooses anew; a pure function.

    With ``noise`` a slot of a key and its value holds two ids of noise instead, with that probability: the noisy form.

    Args:
        seed: Of the whole data set.
        index: Which batch.
        batch_size: Sequences.
        length: Tokens, an even number.
        vocab_size: Ids of keys (the first half) and values (the second).
        noise: Probability of noise.
        n_noise: Ids of noise, behind those of the values.

    Returns:
        ids: int64 ``(batch_size, length)``.
        labels: Alike: the value where a key stands that stood before, -100 elsewhere.

    Raises:
        ValueError: If a number is out of range.
    """
    random = check_batch(seed, index, batch_size=batch_size, length=length)
    _check_vocabulary(length, vocab_size)
    if not 0.0 <= noise < 1.0 or (noise > 0 and n_noise < 1):
        raise ValueError(f"noise must lie between 0 and 1 and needs ids, n_noise, got {noise} and {n_noise}")
    n_keys, slots = vocab_size // 2, length // 2
    values = n_keys + random.integers(0, n_keys, (batch_size, n_keys))
    keys = random.integers(0, n_keys, (batch_size, slots))
    loud = random.random((batch_size, slots)) < noise
    answers = np.take_along_axis(values, keys, 1)
    known = _seen_before(np.where(loud, -1, keys))
    ids = np.stack((keys, answers), -1)
    if noise > 0:
        ids = np.where(loud[..., None], vocab_size + random.integers(0, n_noise, ids.shape), ids)
    labels = np.full((batch_size, slots, 2), IGNORED)
    labels[..., 0] = np.where(known & ~loud, answers, IGNORED)
    return torch.from_numpy(ids.reshape(batch_size, length)), torch.from_numpy(labels.reshape(batch_size, length))


def fuzzy_recall(
    seed: int,
    index: int,
    *,
    batch_size: int,
    length: int = 128,
    vocab_size: int = 16,
    longest: int = 3,
    n_keys: int = 7,
) -> tuple[Tensor, Tensor]:
    """As :func:`in_context_recall`, but keys and values are words of 1 to ``longest`` ids.

    Keys differ within a sequence; none begins another. Where the last word does not fit, padding (the last id) follows.

    Args:
        seed: Of the whole data set.
        index: Which batch.
        batch_size: Sequences.
        length: Tokens.
        vocab_size: Ids: the first half but one for keys, the second for values, the last for padding.
        longest: Ids of the longest word.
        n_keys: Keys of a sequence.

    Returns:
        ids: int64 ``(batch_size, length)``.
        labels: Alike: behind a key that stood before, each id of its value, -100 elsewhere.

    Raises:
        ValueError: If a number is out of range.
    """
    random = check_batch(seed, index, batch_size=batch_size, length=length, longest=longest, n_keys=n_keys)
    _check_vocabulary(2, vocab_size)
    half = (vocab_size - 1) // 2
    if half < n_keys:
        raise ValueError(f"vocab_size must be at least 2 * n_keys + 1 = {2 * n_keys + 1}, got {vocab_size}")
    padding = vocab_size - 1
    ids = np.full((batch_size, length + 2 * longest), padding)
    labels = np.full_like(ids, IGNORED)
    for row in range(batch_size):
        # different first ids: no key begins another
        heads = random.permutation(half)[:n_keys]
        keys = [[head, *random.integers(0, half, random.integers(0, longest))] for head in heads]
        values = [list(half + random.integers(0, half, random.integers(1, longest + 1))) for _ in heads]
        place, seen = 0, set()
        while place < length:
            chosen = int(random.integers(n_keys))
            word = keys[chosen] + values[chosen]
            ids[row, place : place + len(word)] = word
            if chosen in seen:
                begin = place + len(keys[chosen]) - 1
                labels[row, begin : begin + len(values[chosen])] = values[chosen]
            seen.add(chosen)
            if place + len(word) > length:
                ids[row, place:], labels[row, place:] = padding, IGNORED
            place += len(word)
    return torch.from_numpy(ids[:, :length].copy()), torch.from_numpy(labels[:, :length].copy())


def compression(
    seed: int, index: int, *, batch_size: int, length: int = 32, vocab_size: int = 16
) -> tuple[Tensor, Tensor]:
    """A batch of random sequences, each ended by the last id, at which a model has to know the whole sequence.

    What decodes it is the model's business: :class:`Decompressor` reads the output at that token and a position.

    Args:
        seed: Of the whole data set.
        index: Which batch.
        batch_size: Sequences.
        length: Tokens, the last one included.
        vocab_size: Ids, the last one included.

    Returns:
        ids: int64 ``(batch_size, length)``.
        targets: int64 ``(batch_size, length - 1)``, the tokens before the last.

    Raises:
        ValueError: If a number is out of range.
    """
    random = check_batch(seed, index, batch_size=batch_size, length=length - 1, vocab_size=vocab_size - 1)
    ids = random.integers(0, vocab_size - 1, (batch_size, length))
    ids[:, -1] = vocab_size - 1
    found = torch.from_numpy(ids)
    return found, found[:, :-1].clone()


class Decompressor(torch.nn.Module):
    """What the paper puts behind the output at the last token: a two-layer network that reads it beside a position.

    Args:
        d_model: Width of the output.
        length: Positions.
        vocab_size: Ids.
    """

    def __init__(self, d_model: int, length: int, vocab_size: int) -> None:
        super().__init__()
        self.positions = torch.nn.Embedding(length, d_model)
        self.network = torch.nn.Sequential(
            torch.nn.Linear(2 * d_model, 2 * d_model), torch.nn.GELU(), torch.nn.Linear(2 * d_model, vocab_size)
        )

    def forward(self, last: Tensor) -> Tensor:
        """``(B, D)`` to logits ``(B, length, vocab_size)``."""
        places = self.positions.weight.expand(last.shape[0], -1, -1)
        return self.network(torch.cat((last[:, None].expand_as(places), places), -1))


def memorisation(
    seed: int, index: int, *, batch_size: int, length: int = 32, vocab_size: int = 256
) -> tuple[Tensor, Tensor]:
    """A batch of keys, each followed by a blank at which its value is asked for: that of one fixed table for all.

    Args:
        seed: Of the whole data set, the table included.
        index: Which batch.
        batch_size: Sequences.
        length: Tokens, an even number.
        vocab_size: Ids: keys, then as many values, then the blank.

    Returns:
        ids: int64 ``(batch_size, length)``.
        labels: Alike: the values at the blanks, -100 elsewhere.

    Raises:
        ValueError: If a number is out of range.
    """
    random = check_batch(seed, index, batch_size=batch_size, length=length)
    _check_vocabulary(length, vocab_size)
    known = (vocab_size - 1) // 2
    # a source of its own: no batch has this number
    table = known + np.random.default_rng([seed, 2**63]).integers(0, known, known)
    keys = random.integers(0, known, (batch_size, length // 2))
    ids = np.stack((keys, np.full_like(keys, vocab_size - 1)), -1)
    labels = np.stack((np.full_like(keys, IGNORED), table[keys]), -1)
    return torch.from_numpy(ids.reshape(batch_size, length)), torch.from_numpy(labels.reshape(batch_size, length))


def _seen_before(keys: np.ndarray) -> np.ndarray:
    """Where a row has the same number earlier; negative ones never."""
    same = (keys[:, :, None] == keys[:, None, :]) & (keys >= 0)[:, :, None]
    return np.tril(same, -1).any(-1)


def _check_vocabulary(length: int, vocab_size: int) -> None:
    if length % 2:
        raise ValueError(f"length must be even, got {length}")
    if vocab_size < 4:
        raise ValueError(f"vocab_size must be at least 4, got {vocab_size}")
