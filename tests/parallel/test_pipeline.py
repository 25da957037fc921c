"""Stages under the schedules of torch.distributed.pipelining give the loss and the gradients of one process."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.parallel import PipelineLoss, split_stages

ranks = runpy.run_path(str(Path(__file__).with_name("recipe_ranks.py")))
TOLERANCE = 1e-10


@functools.cache
def expected(tied: bool) -> tuple[float, dict[str, np.ndarray]]:
    model = ranks["pipeline_model"](tie_embeddings=tied)
    ids, labels = ranks["pipeline_batch"]()
    loss = model.loss(ids, labels)
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
def test_schedules(recipe_pool, name: str, tied: bool):
    check(recipe_pool.call("pipeline", 2, schedule=name, tie_embeddings=tied), tied)


@pytest.mark.parametrize("name", ["1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
def test_schedules_recompute_blocks(recipe_pool, name: str):
    check(recipe_pool.call("pipeline", 2, schedule=name, tie_embeddings=True, checkpoint_blocks=True), True)


def check(found: list[dict[str, Any]], tied: bool) -> None:
    loss, gradients = expected(tied)
    losses = [one["loss"] for one in found if one["loss"] is not None]
    assert losses == [pytest.approx(loss, rel=TOLERANCE)]
    missing = set(gradients)
    for one in found:
        for name, value in one["gradients"].items():
            exact = gradients[name]
            assert np.abs(value - exact).max() <= TOLERANCE * (np.abs(exact).max() or 1.0), name
            missing.discard(name)
    assert not missing


def test_a_stage_is_a_part_of_the_model():
    model = ranks["pipeline_model"](tie_embeddings=False)
    stages = split_stages(model, 3)
    whole = model.state_dict()
    together = [name for stage in stages for name in stage.state_dict()]
    assert sorted(together) == sorted(whole)
    for stage in stages:
        for name, value in stage.state_dict().items():
            assert value.data_ptr() == whole[name].data_ptr()
    ids, _ = ranks["pipeline_batch"]()
    hidden, auxiliary = stages[0](ids)
    for stage in stages[1:]:
        hidden, auxiliary = stage(hidden, auxiliary)
    assert torch.equal(hidden @ stages[-1].output_weight().T, model(ids)[0])


def test_refusals():
    def model(**options: Any) -> LanguageModel:
        return LanguageModel(
            ModelConfig(**{"vocab_size": 5, "d_model": 16, "n_layers": 4, "pattern": "min_gru", **options})
        )

    with pytest.raises(TypeError, match="split_stages takes a LanguageModel, got Backbone"):
        split_stages(model().backbone, 2)
    with pytest.raises(ValueError, match="n_stages must be at most the number of blocks, 4, got 5"):
        split_stages(model(), 5)
    with pytest.raises(ValueError, match="n_stages must be a positive integer, got 0"):
        split_stages(model(), 0)
    with pytest.raises(ValueError, match="norm='batch' would take the statistics of one micro-batch"):
        split_stages(model(norm="batch"), 2)
    shared = model(pattern=["min_gru", {"name": "min_lstm", "shared": "one"}])
    with pytest.raises(ValueError, match="shared block of depths 1 and 3 would lie in the stages 0 and 1"):
        split_stages(shared, 2)
    assert len(split_stages(shared, 1)) == 1
    parallel = model()
    parallel.backbone.blocks[2].mixer.forward = lambda: None
    with pytest.raises(ValueError, match="MinGRU is sequence-parallel"):
        split_stages(parallel, 2)
    stages = split_stages(model(), 2)
    with pytest.raises(RuntimeError, match="the last stage alone has the output layer"):
        stages[0].output_weight()
    loss = PipelineLoss(stages[-1], 2)
    with pytest.raises(
        RuntimeError, match=r"3 labels of a micro-batch count, of 0 of the batch; call expect\(labels\)"
    ):
        loss((torch.zeros(1, 3, 16), torch.zeros(1)), torch.zeros(1, 3, dtype=torch.int64))
