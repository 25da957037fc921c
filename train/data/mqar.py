"""Multi-query associative recall: pairs of keys and values, then some of the keys again, whose values are asked for.

"Zoology: Measuring and Improving Recall in Efficient Language Models", https://arxiv.org/abs/2312.04927, section 3:
what a state of a few numbers a channel cannot hold and a matrix of outer products can.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from seqzoo.modules.options import check_number
from seqzoo.train.data.draws import check_batch, distinct
from seqzoo.train.data.windows import IGNORED


def mqar(
    seed: int, index: int, *, batch_size: int, length: int, n_pairs: int, vocab_size: int, power: float = 0.01
) -> tuple[Tensor, Tensor]:
    """A batch of the task, a pure function of its arguments.

    Ids are 0 for what fills the gaps, 1 to ``vocab_size // 2 - 1`` for keys and the rest for values. A sequence begins
    with its pairs, key and value in turn, and asks for each key once more, at places of which early ones are likelier.

    Args:
        seed: Of the whole data set.
        index: Which batch.
        batch_size: Sequences.
        length: Tokens, an even number.
        n_pairs: Pairs in a sequence; keys and values are drawn without repetition.
        vocab_size: Ids.
        power: The i-th slot of two tokens behind the pairs is drawn with a weight of ``i ** (power - 1)``.

    Returns:
        ids: int64 ``(batch_size, length)``.
        labels: Alike: the value where its key is asked for, -100 elsewhere.

    Raises:
        ValueError: If the pairs do not fit into the length or the ids, or a number is out of range.
    """
    random = check_batch(seed, index, batch_size=batch_size, n_pairs=n_pairs)
    check_number("power", power)
    if length % 2 or length < 4 * n_pairs:
        raise ValueError(f"length must be even and at least 4 * n_pairs = {4 * n_pairs}, got {length}")
    keys, values = vocab_size // 2 - 1, vocab_size - vocab_size // 2
    if min(keys, values) < n_pairs:
        raise ValueError(f"vocab_size must be at least 2 * n_pairs + 2 = {2 * n_pairs + 2}, got {vocab_size}")
    key = torch.from_numpy(1 + distinct(random, batch_size, keys, n_pairs))
    value = torch.from_numpy(vocab_size // 2 + distinct(random, batch_size, values, n_pairs))
    slots = length // 2 - n_pairs
    weights = np.arange(1, slots + 1) ** (power - 1.0)
    # the least of exponential variables with these rates: drawn without replacement, each with its weight
    places = torch.from_numpy((random.exponential(size=(batch_size, slots)) / weights).argsort(1)[:, :n_pairs])
    ids = torch.zeros(batch_size, length, dtype=torch.int64)
    ids[:, : 2 * n_pairs] = torch.stack((key, value), -1).flatten(1)
    asked = 2 * n_pairs + 2 * places
    ids.scatter_(1, asked, key)
    return ids, torch.full_like(ids, IGNORED).scatter_(1, asked, value)
