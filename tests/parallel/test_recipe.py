"""Data and sequence parallel together: two optimiser steps on four ranks are those of one process."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ranks = runpy.run_path(str(Path(__file__).with_name("recipe_ranks.py")))
TOLERANCE = 1e-10


@functools.cache
def expected(replicas: int, packed: bool) -> Any:
    return ranks["one_process"](replicas, packed)


def distance(found: np.ndarray, exact: np.ndarray) -> float:
    assert found.shape == exact.shape
    return float(np.abs(found - exact).max() / (np.abs(exact).max() or 1.0))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("sequence_parallel", "parameters", "recompute"),
    [(2, "sharded", False), (2, "sharded", True), (2, "replicated", False), (2, "replicated", True)]
    + [pytest.param(size, "sharded", False, marks=pytest.mark.slow) for size in (1, 4)],
)
def test_two_steps(recipe_pool, sequence_parallel: int, parameters: str, recompute: bool, packed: bool):
    check(recipe_pool, sequence_parallel, parameters, recompute, packed)


# every exchange and every way to run attention
WAYS = [
    {"exchange": "allgather", "attention": "ring"},
    {"exchange": "hillis_steele", "attention": "ulysses"},
    {"exchange": "pipelined", "attention": "usp", "head_ranks": 1},
    {"exchange": "allgather", "attention": "allgather"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way['exchange']}-{way['attention']}")
@pytest.mark.parametrize(
    ("parameters", "recompute", "packed"),
    [("sharded", False, True), ("sharded", True, False), ("replicated", False, True)],
    ids=["sharded", "recomputed", "replicated"],
)
def test_two_steps_by(recipe_pool, parameters: str, recompute: bool, packed: bool, way: dict[str, Any]):
    check(recipe_pool, 2, parameters, recompute, packed, **way)


def check(pool: Any, sequence_parallel: int, parameters: str, recompute: bool, packed: bool, **way: Any) -> None:
    """Compares losses and weights of all ranks with those of one process."""
    losses, weights = expected(4 // sequence_parallel, packed)
    given = {"sequence_parallel": sequence_parallel, "packed": packed, "parameters": parameters}
    for one in (found := pool.call("recipe", 4, **given, way=way, checkpoint_blocks=recompute)):
        assert one["losses"] == pytest.approx(losses, rel=TOLERANCE)
        assert one["weights"].keys() == weights.keys()
        for name, value in weights.items():
            assert distance(one["weights"][name], value.numpy()) <= TOLERANCE, name
        assert distance(one["step"], found[0]["step"]) <= TOLERANCE
        assert one["forwards"] == (4 if recompute else 2), "of the first block in two steps"
    if parameters == "sharded":
        whole = sum(parameter.numel() for parameter in ranks["language_model"]().parameters())
        assert sum(one["held"] for one in found) == whole
        assert max(one["held"] for one in found) < 0.5 * whole


@pytest.mark.parametrize("parameters", ["sharded", "replicated"])
def test_gradients_of_two_passes_add_up(recipe_pool, parameters: str):
    model = ranks["language_model"]()
    for step in range(2):
        batches = [ranks["sample"](step, replica, False) for replica in range(2)]
        counts = [int((labels != -100).sum()) for _, labels, _ in batches]
        for (ids, labels, _), count in zip(batches, counts, strict=True):
            (model.loss(ids, labels) * count / sum(counts)).backward()
    for found in recipe_pool.call("accumulation", 4, parameters=parameters):
        for name, parameter in model.named_parameters():
            assert distance(found[name], parameter.grad.numpy()) <= TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parameters", "way"), [("sharded", {}), ("replicated", {}), *(("sharded", way) for way in WAYS)], ids=str
)
def test_compiled(recipe_pool, parameters: str, way: dict[str, Any]):
    losses = recipe_pool.call("compiled", 4, parameters=parameters, way=way)
    for compiled, eager in losses:
        assert compiled == pytest.approx(eager, rel=TOLERANCE)


def test_refusals(recipe_pool):
    assert recipe_pool.call("recipe_refusals", 4) == [None] * 4
