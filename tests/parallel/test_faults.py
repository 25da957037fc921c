"""A rank that dies or stalls ends in an error that names mixer, rank and group, on every other rank, in time."""

from __future__ import annotations

import time

import pytest

TIMEOUT = 6


@pytest.mark.parametrize(
    ("deed", "when"),
    [
        ("killed", "forward"),
        ("stalled", "backward"),
        pytest.param("killed", "backward", marks=pytest.mark.slow),
        pytest.param("stalled", "forward", marks=pytest.mark.slow),
    ],
)
def test_the_others_raise(make_pool, deed: str, when: str):
    ranks = make_pool(3, TIMEOUT)
    started = time.monotonic()
    ranks.start("fault", 3, [{"deed": deed, "when": when}] * 3)
    failures = ranks.collect([0, 2], 3 * TIMEOUT)
    # a rank that waits for one that waits has two timeouts behind it
    assert time.monotonic() - started < 2 * TIMEOUT + 10
    for rank, failure in zip((0, 2), failures, strict=True):
        assert failure.name == "SequenceParallelError", failure
        assert f"MinGRU on rank {rank} of 3 of the group 'sequence_parallel' could not" in failure.words
