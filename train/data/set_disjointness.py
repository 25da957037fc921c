"""Set disjointness: the one token that two sets of unlike sizes share.

"Just read twice: closing the recall gap for recurrent language models", https://arxiv.org/abs/2407.05483, section 3:
who reads from left to right has to keep the first set, which costs more where that is the longer one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from seqzoo.train.data.draws import check_batch, distinct
from seqzoo.train.data.windows import IGNORED

# the ids that mark the begin of the first set, of the second, and the question
FIRST, SECOND, QUESTION = 1, 2, 3
MARKERS = 4


def set_disjointness(
    seed: int, index: int, *, batch_size: int, n_first: int = 16, n_second: int = 64, vocab_size: int = 2048
) -> tuple[Tensor, Tensor]:
    """A batch of the task, a pure function of its arguments.

    Ids are 1, 2 and 3 for the markers and 4 on for tokens: ``1, first set, 2, second set, 3``. The sets are drawn from
    halves of the vocabulary that are dealt out anew for each sequence; then one token of the first is put in place of
    one of the second.

    Args:
        seed: Of the whole data set.
        index: Which batch.
        batch_size: Sequences.
        n_first: Tokens of the first set.
        n_second: Tokens of the second.
        vocab_size: Ids, markers included.

    Returns:
        ids: int64 ``(batch_size, n_first + n_second + 3)``.
        labels: Alike: at the last token the shared one, -100 elsewhere.

    Raises:
        ValueError: If a number is not positive, or half of the tokens are fewer than a set.
    """
    random = check_batch(seed, index, batch_size=batch_size, n_first=n_first, n_second=n_second)
    half = (vocab_size - MARKERS) // 2
    if max(n_first, n_second) > half:
        least = MARKERS + 2 * max(n_first, n_second)
        raise ValueError(f"vocab_size must be at least {least} for sets of {n_first} and {n_second}, got {vocab_size}")
    dealt = MARKERS + distinct(random, batch_size, 2 * half, 2 * half)
    first, second = dealt[:, :n_first], dealt[:, half : half + n_second]
    rows = np.arange(batch_size)
    shared = first[rows, random.integers(0, n_first, batch_size)]
    second[rows, random.integers(0, n_second, batch_size)] = shared
    mark = np.ones((batch_size, 1), dtype=np.int64)
    ids = np.concatenate((FIRST * mark, first, SECOND * mark, second, QUESTION * mark), 1)
    labels = np.full_like(ids, IGNORED)
    labels[:, -1] = shared
    return torch.from_numpy(ids), torch.from_numpy(labels)
