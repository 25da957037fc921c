"""Plans against a loop over tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqzoo import Packing
from seqzoo.parallel import Plan
from seqzoo.testing import boundaries


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int] | None]:
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 5]), min_size=1, max_size=6))
    total = sum(counts)
    if draw(st.booleans()):
        return counts, None
    inner = sorted(draw(st.lists(st.integers(0, total), max_size=5)))
    return counts, [0, *inner, total]


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_a_plan_says_what_a_loop_over_tokens_says(layout: tuple[list[int], list[int] | None]):
    counts, bounds = layout
    extent = bounds or [0, sum(counts)]
    spans = list(itertools.pairwise(extent))
    rank_of = [rank for rank, count in enumerate(counts) for _ in range(count)]
    sequence_of = [next(i for i, (a, b) in enumerate(spans) if a <= t < b) for t in range(len(rank_of))]

    def continues(token: int) -> bool:
        return 0 < token < len(rank_of) and sequence_of[token - 1] == sequence_of[token]

    plans = [Plan.of(counts, rank, bounds) for rank in range(len(counts))]
    crossing = [t for t in range(1, len(rank_of)) if continues(t) and rank_of[t - 1] != rank_of[t]]
    seen: list[int] = []
    for rank, plan in enumerate(plans):
        mine = [t for t, owner in enumerate(rank_of) if owner == rank]
        assert (plan.length, plan.total, plan.size) == (len(mine), len(rank_of), len(counts))
        assert list(range(plan.start, plan.end)) == mine
        assert plan.crosses == bool(crossing)
        before = bool(mine) and continues(mine[0])
        after = bool(mine) and continues(mine[-1] + 1)
        assert (plan.continues_before, plan.continues_after) == (before, after)
        assert plan.previous == (rank_of[mine[0] - 1] if before else None)
        assert plan.following == (rank_of[mine[-1] + 1] if after else None)
        assert plan.offset == (mine[0] - spans[sequence_of[mine[0]]][0] if before else 0)
        assert {sequence_of[t] for t in mine} <= set(plan.sequences)
        assert plan.lengths == [sum(sequence_of[t] == one for t in mine) for one in plan.sequences]
        packing = plan.packing()
        assert (packing is None) == (bounds is None)
        if packing is not None:
            assert packing.lengths.tolist() == (plan.lengths or [0])
            places = packing.positions + (packing.sequence_index == 0) * plan.offset
            assert places.tolist() == [t - spans[sequence_of[t]][0] for t in mine]
        held = list(plan.held(rank))
        assert held == [one for one in range(len(spans)) if plan.holder(one) == rank]
        assert list(plan.sequences) == held + ([sequence_of[mine[-1]]] if after else [])
        seen += held
    # every sequence has one holder, which has its last token
    assert seen == list(range(len(spans)))
    for one, (start, end) in enumerate(spans):
        if end > start:
            assert plans[0].holder(one) == rank_of[end - 1]
    x = torch.arange(2 * len(rank_of)).view(2, -1)
    shards = [plan.shard(x) for plan in plans]
    assert torch.equal(plans[0].unshard(shards), x)


def test_balanced_shares_differ_by_one_at_most():
    for total in (0, 1, 7, 8):
        for size in (1, 3, 8):
            counts = Plan.balanced(total, size, 0).counts
            assert sum(counts) == total
            assert max(counts) - min(counts) <= 1


def test_boundaries_come_as_tensors_packings_and_integers():
    bounds = boundaries((2, 0, 3))
    plans = [Plan.of((1, 4), 1, given) for given in (bounds, [0, 2, 2, 5], Packing.from_lengths([2, 0, 3]))]
    assert plans[0] == plans[1] == plans[2]
    assert hash(plans[0]) == hash(plans[1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Plan.of([], 0), "at least one rank"),
        (lambda: Plan.of([3, -1], 0), "negative number of tokens"),
        (lambda: Plan.of([3, 1], 2), "rank must lie between 0 and 1 for 2 counts, got 2"),
        (lambda: Plan.of([3, 1], 0, [0, 3]), "end at the number of tokens, 4, got 3"),
        (lambda: Plan.of([3, 1], 0, [0, 3, 2, 4]), "must not descend"),
        (lambda: Plan.of([3, 1], 0, [1, 4]), "must start at 0"),
        (lambda: Plan.of([3, 1], 0, [0]), "at least 2 entries"),
        (lambda: Plan.balanced(3, 0, 0), "at least 1, got 0"),
        (lambda: Plan.balanced(-3, 2, 0), "must not be negative, got -3"),
        (lambda: Plan.of([3, 1], 0).shard(torch.zeros(1, 5)), "the plan is for 4 tokens, dimension 1"),
        (lambda: Plan.of([3, 1], 0).unshard([torch.zeros(1, 2)] * 2), r"must have \[3, 1\] tokens, got \[2, 2\]"),
    ],
)
def test_what_does_not_tile_is_an_error(call, words: str):
    with pytest.raises(ValueError, match=words):
        call()
