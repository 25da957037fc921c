"""Induction heads: what followed a token the first time follows it again.

"In-context Learning and Induction Heads", https://arxiv.org/abs/2209.11895, as "Mamba: Linear-Time Sequence Modeling
with Selective State Spaces", https://arxiv.org/abs/2312.00752, section 4.1.2, asks for it: at any length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.train.data.draws import check_batch
from seqzoo.train.data.windows import IGNORED


def induction_heads(
    seed: int, index: int, *, batch_size: int, length: int, vocab_size: int = 16
) -> tuple[Tensor, Tensor]:
    """A batch of the task, a pure function of its arguments.

    The last id is the trigger. It occurs once among the others, at a random place, and as the last token, where what
    followed it is asked for.

    Args:
        seed: Of the whole data set.
        index: Which batch.
        batch_size: Sequences.
        length: Tokens, at least 3.
        vocab_size: Ids, the trigger included, at least 2.

    Returns:
        ids: int64 ``(batch_size, length)``.
        labels: Alike: at the last token the answer, -100 elsewhere.

    Raises:
        ValueError: If a number is out of range.
    """
    random = check_batch(seed, index, batch_size=batch_size, length=length - 2, vocab_size=vocab_size - 1)
    trigger = vocab_size - 1
    ids = torch.from_numpy(random.integers(0, trigger, (batch_size, length)))
    place = torch.from_numpy(random.integers(0, length - 2, (batch_size, 1)))
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1:] = ids.gather(1, place + 1)
    ids.scatter_(1, place, trigger)
    ids[:, -1] = trigger
    return ids, labels
