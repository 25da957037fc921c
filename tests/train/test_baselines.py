"""The baselines against their definitions."""

from __future__ import annotations

import gzip
import itertools
import math
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest

from seqzoo.train import baselines
from seqzoo.train.baselines import OrderTwoModel, compressed_bits_per_byte


def as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def brute_force(training: bytes, data: bytes, alpha: float) -> float:
    """The formulas of the docstring, byte by byte."""
    one = Counter(training)
    two = Counter(itertools.pairwise(training))
    three = Counter(zip(training, training[1:], training[2:], strict=False))
    before_one = Counter(training[:-1])
    before_two = Counter(itertools.pairwise(training[:-1]))

    def p0(c):
        return (one[c] + alpha / 256) / (len(training) + alpha)

    def p1(b, c):
        return (two[b, c] + alpha * p0(c)) / (before_one[b] + alpha)

    def p2(a, b, c):
        return (three[a, b, c] + alpha * p1(b, c)) / (before_two[a, b] + alpha)

    bits = -math.log2(p1(data[0], data[1]))
    for a, b, c in zip(data, data[1:], data[2:], strict=False):
        bits -= math.log2(p2(a, b, c))
    return bits / (len(data) - 1)


@pytest.mark.parametrize("alpha", [0.5, 16.0])
@pytest.mark.parametrize("data", [b"abracadabra, abracadabra!", b"\x00\xff\x00unseen", b"zz"])
def test_order_two_is_the_brute_force(alpha, data, monkeypatch):
    training = b"the cat sat on the mat; abracadabra said the cat." * 3
    monkeypatch.setattr(baselines, "PIECE", 7)
    model = OrderTwoModel(as_array(training), alpha)
    assert model.bits_per_byte(as_array(data)) == pytest.approx(brute_force(training, data, alpha), rel=1e-12)


def test_order_two_probabilities_sum_to_one():
    model = OrderTwoModel(as_array(b"some training text, some more"))
    every = np.arange(256, dtype=np.uint8)
    for a, b in (b"so", b"\x00\x01", b"te"):
        total = model.probability(np.full(256, a, np.uint8), np.full(256, b, np.uint8), every).sum()
        assert total == pytest.approx(1.0, rel=1e-12)


def test_order_two_learns():
    text = as_array(b"abcabcabd" * 2000)
    assert OrderTwoModel(text).bits_per_byte(text) < 0.5
    noise, other = np.random.default_rng(0).integers(0, 256, (2, 20000), dtype=np.uint8)
    # nothing to learn, so counts can only mislead
    assert 8.0 < OrderTwoModel(noise).bits_per_byte(other) < 10.0


def test_order_two_refuses():
    with pytest.raises(ValueError, match="at least 3 training bytes, got 2"):
        OrderTwoModel(as_array(b"ab"))
    with pytest.raises(ValueError, match="alpha must be positive"):
        OrderTwoModel(as_array(b"abc"), 0.0)
    with pytest.raises(ValueError, match="at least 2 bytes, got 1"):
        OrderTwoModel(as_array(b"abc")).bits_per_byte(as_array(b"a"))


def test_compressors_on_known_bytes():
    data = b"0123456789" * 1000
    found = compressed_bits_per_byte(data)
    assert found["gzip -9"] == 8 * len(gzip.compress(data, 9, mtime=0)) / len(data)
    assert all(0 < value < 0.2 for value in found.values())
    noise = np.random.default_rng(0).bytes(20000)
    assert all(8.0 < value < 8.3 for value in compressed_bits_per_byte(noise).values())
    with pytest.raises(ValueError, match="0 bytes"):
        compressed_bits_per_byte(b"")


@pytest.mark.parametrize(("name", "command"), [("gzip -9", "gzip -9n"), ("bz2 -9", "bzip2 -9"), ("xz -9e", "xz -9e")])
def test_compressors_are_the_commands(name, command):
    program, option = command.split()
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    data = b"".join(b"def function_%d(x):\n    return x + %d\n" % (n, n * n) for n in range(3000))
    size = len(subprocess.run([program, option, "-c"], input=data, capture_output=True, check=True).stdout)
    # other versions of the libraries may choose other matches
    assert compressed_bits_per_byte(data)[name] == pytest.approx(8 * size / len(data), rel=0.01)
