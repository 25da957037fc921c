"""A rank that dies, stalls or has other tokens ends in a named error on every other rank, in time."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest

TIMEOUT = 6
SIZE = 4
# of a mixer every way in which its states or keys come to the ranks
WAYS: dict[str, list[dict[str, Any]]] = {
    "min_gru": [{"exchange": one} for one in ("chain", "allgather", "hillis_steele", "pipelined")],
    "attention": [{"attention": one} for one in ("allgather", "ulysses", "ring")]
    + [{"attention": "usp", "head_ranks": 2}],
}
# the deeds and the two kinds of exchange once each
FAST = [("min_gru", "killed", "forward"), ("min_gru", "stalled", "backward"), ("attention", "short", "forward")]


@pytest.mark.parametrize(
    ("mixer", "deed", "when"),
    [
        pytest.param(mixer, deed, when, marks=[] if (mixer, deed, when) in FAST else [pytest.mark.slow])
        for mixer in WAYS
        for deed, when in itertools.product(("killed", "stalled", "short"), ("forward", "backward"))
        # a shard is too short from the beginning
        if (deed, when) != ("short", "backward")
    ],
)
def test_the_others_raise(make_pool, mixer: str, deed: str, when: str):
    # what takes the time is waiting, which all ways do at once
    pools = [make_pool(SIZE, TIMEOUT) for _ in WAYS[mixer]]
    started = time.monotonic()
    for ranks, way in zip(pools, WAYS[mixer], strict=True):
        ranks.start("fault", SIZE, [{"deed": deed, "when": when, "mixer": mixer, "way": way}] * SIZE)
    name = {"min_gru": "MinGRU", "attention": "Attention"}[mixer]
    for ranks, way in zip(pools, WAYS[mixer], strict=True):
        failures = ranks.collect([0, 2, 3], 4 * TIMEOUT)
        # a rank that waits for one that waits has two timeouts behind it
        assert time.monotonic() - started < 2 * TIMEOUT + 10, way
        for rank, failure in zip((0, 2, 3), failures, strict=True):
            assert failure.name == "SequenceParallelError", (way, failure)
            words = f"{name} on rank {rank} of {SIZE} of the group 'sequence_parallel' could not"
            assert words in failure.words, (way, failure)
        if deed == "short":
            (failure,) = ranks.collect([1])
            assert failure.name == "ValueError", (way, failure)
            assert "the plan gives rank 1 3 tokens, the input has 2" in failure.words


def test_under_checks_all_ranks_notice_another_plan(pool):
    assert pool.call("disagreement", 3) == [None] * 3
