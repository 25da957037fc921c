"""Packing documents into batches: against best-fit one by one, and the sampler's order, ranks and resumption."""

from __future__ import annotations

import numpy as np
import pytest

from seqzoo.train.data import PackedBatchSampler, pack_lengths


def one_by_one(lengths: np.ndarray, capacity: int) -> list[int]:
    """Free space of the packs of best-fit-decreasing, by its definition."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free.remove(min(fitting))
        free.append((min(fitting) if fitting else capacity) - length)
    return sorted(free)


@pytest.mark.parametrize("seed", range(40))
def test_packs_are_those_of_best_fit_decreasing(seed: int):
    random = np.random.default_rng(seed)
    capacity = int(random.integers(1, 40))
    lengths = random.integers(1, capacity + 1, random.integers(0, 80))
    packs = pack_lengths(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(lengths.size))
    assert sorted(capacity - int(lengths[pack].sum()) for pack in packs) == one_by_one(lengths, capacity)


@pytest.mark.parametrize("law", ["log-normal", "wiki-like"])
def test_a_hundred_thousand_lengths_fill_their_packs(law: str):
    random = np.random.default_rng(0)
    drawn = random.lognormal(5.5, 1.2, 100_000) if law == "log-normal" else 20 + 200 * random.pareto(1.3, 100_000)
    lengths = drawn.clip(1, 4096).astype(np.int64)
    packs = pack_lengths(lengths, 4096)
    assert max(int(lengths[pack].sum()) for pack in packs) <= 4096
    assert lengths.sum() / (4096 * len(packs)) >= 0.995


def lengths_of(count: int = 300) -> np.ndarray:
    return np.random.default_rng(3).integers(1, 90, count)


def test_every_document_once_an_epoch_in_another_order():
    sampler = PackedBatchSampler(lengths_of(), tokens=100)
    epochs = [list(sampler) for _ in range(2)]
    for batches in epochs:
        assert sorted(index for batch in batches for index in batch) == list(range(300))
        assert all(lengths_of()[batch].sum() <= 100 for batch in batches)
    assert epochs[0] != epochs[1]
    assert list(PackedBatchSampler(lengths_of(), tokens=100)) == epochs[0]
    assert list(PackedBatchSampler(lengths_of(), tokens=100, seed=1)) != epochs[0]
    again = PackedBatchSampler(lengths_of(), tokens=100)
    again.set_epoch(1)
    assert list(again) == epochs[1]


def test_ranks_share_the_packs():
    whole = PackedBatchSampler(lengths_of(), tokens=100)
    ranks = [PackedBatchSampler(lengths_of(), tokens=100, rank=rank, world_size=3) for rank in range(3)]
    batches = [list(sampler) for sampler in ranks]
    assert {len(part) for part in batches} == {len(whole) // 3}
    together = [batch for step in zip(*batches, strict=True) for batch in step]
    assert together == whole.packs()[: len(together)]


@pytest.mark.parametrize("at", [0, 1, 17])
def test_a_sampler_goes_on_where_it_was_saved(at: int):
    sampler = PackedBatchSampler(lengths_of(), tokens=100)
    list(sampler)
    batches = iter(sampler)
    for _ in range(at):
        next(batches)
    state = sampler.state_dict()
    other = PackedBatchSampler(lengths_of(), tokens=100)
    other.load_state_dict(state)
    assert list(other) == list(batches)
    assert other.state_dict() == sampler.state_dict() | {"epoch": 2, "place": 0}


def test_long_documents():
    lengths = [5, 250, 99, 101]
    assert sorted(map(sorted, PackedBatchSampler(lengths, tokens=100))) == [[0], [1], [2], [3]]
    assert sorted(map(sorted, PackedBatchSampler(lengths, tokens=100, long="drop"))) == [[0], [2]]
    with pytest.raises(ValueError, match="2 documents are longer than a batch of 100 tokens, the first, 1, has 250"):
        PackedBatchSampler(lengths, tokens=100, long="error")


def test_efficiency_counts_what_would_be_padding():
    sampler = PackedBatchSampler([60, 60, 40], tokens=100)
    assert sampler.efficiency() == pytest.approx(160 / 200)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pack_lengths([3, 0], 5), "a length must be from 1 to 5, got 0 at index 1"),
        (lambda: pack_lengths([6], 5), "a length must be from 1 to 5, got 6 at index 0"),
        (lambda: pack_lengths([1], 0), "capacity must be a positive integer, got 0"),
        (lambda: PackedBatchSampler([], tokens=5), "there is no document to pack"),
        (lambda: PackedBatchSampler([1], tokens=5, long="cut"), "long must be one of truncate, error, drop, got 'cut'"),
        (lambda: PackedBatchSampler([1], tokens=5, rank=2, world_size=2), "rank must be from 0 to 1, got 2"),
        (
            lambda: PackedBatchSampler([1], tokens=5).load_state_dict({"epoch": 0, "place": 0, "seed": 1}),
            "of a sampler with seed 1, this one has 0",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
