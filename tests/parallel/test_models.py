"""Language models: losses, gradients, positions and states over segments, recomputation, decoding."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from seqzoo.parallel import next_tokens

ranks = runpy.run_path(str(Path(__file__).with_name("ranks.py")))
# of two segments
COUNTS = {2: [(8, 5), (0, 9)], 3: [(5, 0, 8), (1, 6, 2)], 4: [(3, 2, 1, 7), (4, 0, 2, 3)]}


def close(found: np.ndarray, exact: np.ndarray) -> bool:
    return found.shape == exact.shape and bool(np.abs(found - exact).max() <= 1e-10 * (np.abs(exact).max() or 1.0))


EXCHANGES = [
    "chain",
    "allgather",
    *(pytest.param(one, marks=pytest.mark.slow) for one in ("hillis_steele", "pipelined")),
]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_training_through_two_segments(pool, size: int, packed: bool, recompute: bool, exchange: str):
    exact = ranks["train"](None, 0, COUNTS[size], packed, False)
    given = {"counts": COUNTS[size], "packed": packed, "recompute": recompute, "exchange": exchange}
    for found in pool.call("training", size, **given):
        assert found.keys() == exact.keys()
        for name, value in exact.items():
            assert close(found[name], value), name


def test_parameters_that_fsdp_shards(pool):
    model = ranks["language_model"]()
    for replica in range(2):
        ids, labels, _ = ranks["tokens"](replica, (13,), False)
        model.loss(ids, labels).backward()
    for found in pool.call("sharded_parameters", 4):
        for name, parameter in model.named_parameters():
            assert close(found[f"gradient of {name}"], parameter.grad.numpy()), name


def test_logits_and_decoding_without_gradients(pool):
    model = ranks["language_model"]()
    counts = (3, 0, 4)
    ids, _, _ = ranks["tokens"](0, (7,), False)
    with torch.no_grad():
        y, state = model(ids, return_state=True)
        after, _ = model.step(ids[:, 0], state)
    found = pool.call("logits", 3, counts=counts)
    assert close(np.concatenate([one["y"] for one in found], 1), y.numpy())
    for one in found:
        assert close(one["final step"], after.numpy())


def test_labels_are_the_next_tokens():
    ids = torch.arange(10, 16)[None]
    assert next_tokens(ids).tolist() == [[11, 12, 13, 14, 15, -100]]
    bounds = torch.tensor([0, 0, 2, 2, 6], dtype=torch.int32)
    assert next_tokens(ids, bounds).tolist() == [[11, -100, 13, 14, 15, -100]]
    with pytest.raises(TypeError, match="ids must be int64 or int32"):
        next_tokens(ids.double())
