"""Data and sequence parallel together: two optimiser steps on four ranks are those of one process."""

from __future__ import annotations

import functools
import importlib.util
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
ranks = runpy.run_path(str(HERE / "recipe_ranks.py"))
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def recipe_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Four ranks that answer the cases of recipe_ranks.py."""
    spec = importlib.util.spec_from_file_location("recipe_pool", HERE / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.RANKS = str(HERE / "recipe_ranks.py")
    pool = module.Pool(4, tmp_path_factory.mktemp("recipe") / "store", 60)
    yield pool
    pool.stop()


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
    losses, weights = expected(4 // sequence_parallel, packed)
    found = recipe_pool.call(
        "recipe",
        4,
        sequence_parallel=sequence_parallel,
        packed=packed,
        parameters=parameters,
        checkpoint_blocks=recompute,
    )
    for one in found:
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
@pytest.mark.parametrize("parameters", ["sharded", "replicated"])
def test_compiled(recipe_pool, parameters: str):
    losses = recipe_pool.call("compiled", 4, parameters=parameters)
    for compiled, eager in losses:
        assert compiled == pytest.approx(eager, rel=TOLERANCE)


def test_refusals(recipe_pool):
    assert recipe_pool.call("recipe_refusals", 4) == [None] * 4
