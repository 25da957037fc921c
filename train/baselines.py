"""What a trained byte model is measured against: general compressors and an order-2 model."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
BYTES = 256
PIECE = 1 << 24


def compressed_bits_per_byte(data: bytes) -> dict[str, float]:
    """Bits per byte of ``data`` compressed whole, headers included, by ``gzip -9``, ``bz2 -9`` and ``xz -9e``."""
    if not data:
        raise ValueError("nothing to compress: the data has 0 bytes")
    sizes = {
        "gzip -9": len(gzip.compress(data, compresslevel=9, mtime=0)),
        "bz2 -9": len(bz2.compress(data, compresslevel=9)),
        "xz -9e": len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8.0 * size / len(data) for name, size in sizes.items()}


class OrderTwoModel:
    """Predicts a byte from the two before it, by counts interpolated with those of the shorter contexts.

    With ``n`` the counts in the training bytes::

        p0(c)      = (n(c) + alpha / 256) / (n() + alpha)
        p1(c | b)  = (n(b c) + alpha p0(c)) / (n(b) + alpha)
        p2(c | ab) = (n(a b c) + alpha p1(c | b)) / (n(a b) + alpha)

    where ``n(b)`` and ``n(a b)`` count the contexts that a byte follows. Every byte has a positive probability.

    Args:
        training: The training bytes, uint8 ``(n,)``.
        alpha: Weight of the shorter context, in counts.
    """

    def __init__(self, training: Bytes, alpha: float = 16.0) -> None:
        if training.size < 3:
            raise ValueError(f"an order-2 model needs at least 3 training bytes, got {training.size}")
        if alpha <= 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        self.alpha = alpha
        self.order0 = np.bincount(training, minlength=BYTES)
        self.order1 = _count(_join(training[:-1], training[1:]), BYTES**2)
        self.order2 = _count_triples(training)

    def bits_per_byte(self, data: Bytes) -> float:
        """Bits per byte of ``data``, of every byte but the first; the second is predicted from the first alone."""
        if data.size < 2:
            raise ValueError(f"needs at least 2 bytes, got {data.size}")
        first = self.order1_probability(data[:1], data[1:2])
        bits = -math.log2(float(first[0]))
        for start in range(0, data.size - 2, PIECE):
            piece = data[start : start + PIECE + 2]
            bits -= float(np.log2(self.probability(piece[:-2], piece[1:-1], piece[2:])).sum())
        return bits / (data.size - 1)

    def probability(self, a: Bytes, b: Bytes, c: Bytes) -> NDArray[np.float64]:
        """p2(c | a b), elementwise."""
        pairs = _join(a, b)
        context = self.order2.reshape(-1, BYTES).sum(1)[pairs]
        shorter = self.order1_probability(b, c)
        return (self.order2[pairs * BYTES + c] + self.alpha * shorter) / (context + self.alpha)

    def order1_probability(self, b: Bytes, c: Bytes) -> NDArray[np.float64]:
        """p1(c | b), elementwise."""
        unigram = (self.order0 + self.alpha / BYTES) / (self.order0.sum() + self.alpha)
        context = self.order1.reshape(BYTES, BYTES).sum(1)[b]
        return (self.order1[_join(b, c)] + self.alpha * unigram[c]) / (context + self.alpha)


def _join(a: Bytes, b: Bytes) -> NDArray[np.int64]:
    return a.astype(np.int64) * BYTES + b


def _count(values: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    return np.bincount(values, minlength=size)


def _count_triples(data: Bytes) -> NDArray[np.int64]:
    counts = np.zeros(BYTES**3, dtype=np.int64)
    # in pieces, since the joined indices are eight times as large as the bytes
    for start in range(0, data.size - 2, PIECE):
        piece = data[start : start + PIECE + 2]
        counts += _count(_join(piece[:-2], piece[1:-1]) * BYTES + piece[2:], BYTES**3)
    return counts
