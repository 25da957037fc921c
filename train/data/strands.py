"""The other strand of DNA, in tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from seqzoo.models.tokenizer import NUCLEOTIDES, UNKNOWN, ByteTokenizer, PieceTokenizer, Tokenizer

PAIRS = str.maketrans("ACGTacgt", "TGCAtgca")


def complements(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Of every token the one that stands in its place on the other strand, where everything is read backwards.

    A sequence is then ``table[ids][::-1]``.

    Args:
        tokenizer: Of bytes, nucleotides or k-mers.

    Returns:
        int64 ``(vocab_size,)``.

    Raises:
        ValueError: If a token is no sequence of nucleotides, or lacks its complement.
    """
    table = np.arange(tokenizer.vocab_size)
    if isinstance(tokenizer, ByteTokenizer):
        for letter, other in PAIRS.items():
            table[letter] = other
        return table
    if not isinstance(tokenizer, PieceTokenizer):
        raise ValueError(f"a {type(tokenizer).__name__} has no tokens of nucleotides; take nucleotides or k-mers")
    known = tokenizer.inner.get_vocab()
    for token, index in known.items():
        if token == UNKNOWN or index == tokenizer.end:
            continue
        other = token[::-1].translate(PAIRS)
        if set(token) - set(NUCLEOTIDES) or other not in known:
            raise ValueError(
                f"reverse_complement needs tokens of {NUCLEOTIDES} and their complements, the tokenizer has {token!r}; "
                "take nucleotides, or 6-mers"
            )
        table[index] = known[other]
    return table
