"""Selective copying: remember some tokens among noise at random places, then say them in order.

"Mamba: Linear-Time Sequence Modeling with Selective State Spaces", https://arxiv.org/abs/2312.00752, section 4.1.1: a
model whose dynamics do not depend on the input cannot tell the tokens from the noise between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.train.data.draws import check_batch, distinct
from seqzoo.train.data.windows import IGNORED

NOISE = 0


def selective_copying(
    seed: int, index: int, *, batch_size: int, length: int, n_tokens: int = 4, n_symbols: int = 8
) -> tuple[Tensor, Tensor]:
    """A batch of the task, a pure function of its arguments.

    Ids are 0 for noise, 1 to ``n_symbols`` for the symbols, and one more for the marker that asks for the next.

    Args:
        seed: Of the whole data set.
        index: Which batch.
        batch_size: Sequences.
        length: Tokens of noise and symbols; as many markers as symbols follow.
        n_tokens: Symbols that each sequence holds, drawn with repetition, at places drawn without.
        n_symbols: Different symbols.

    Returns:
        ids: int64 ``(batch_size, length + n_tokens)``.
        labels: Alike: the symbols in order at the markers, -100 elsewhere.

    Raises:
        ValueError: If the symbols do not fit into the length, or a number is not positive.
    """
    random = check_batch(seed, index, batch_size=batch_size, n_tokens=n_tokens, n_symbols=n_symbols)
    if n_tokens > length:
        raise ValueError(f"length must be at least n_tokens = {n_tokens}, got {length}")
    symbols = torch.from_numpy(random.integers(1, n_symbols + 1, (batch_size, n_tokens)))
    places = torch.from_numpy(distinct(random, batch_size, length, n_tokens)).sort(1).values
    ids = torch.full((batch_size, length + n_tokens), NOISE)
    ids[:, length:] = n_symbols + 1
    ids.scatter_(1, places, symbols)
    labels = torch.full_like(ids, IGNORED)
    labels[:, length:] = symbols
    return ids, labels
