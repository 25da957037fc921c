"""What reading data costs beside the training step that it feeds, and how fast generated data are made.

The limit beside a loader is the forward and backward pass of the shipped configuration's model on the same batch, so
that its ratio is the share of time that training loses where one process does both in turn.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("lightning")

from seqzoo.train.configuration import combine
from seqzoo.train.data import listops, pathfinder
from seqzoo.train.data.packed_batches import PackedBatchSampler
from seqzoo.train.data.windows import tokens_of
from seqzoo.train.options import TrainingCLI

# shares of a step, at most
LOADING, PACKING = 0.03, 0.01
# that are read in one call, so that few calls tell what each costs
BATCHES = 20
# the two made here are of one shard or little more, which does not change what a batch costs
LOADERS = {
    "bytes of the standard library": (["task/stdlib"], []),
    "packed documents of the standard library": (["task/documents"], []),
    "ListOps, lite": (["task/listops-lite", "model/s4d"], ["--data.training_examples", "5000"]),
    "Pathfinder, lite": (
        ["task/pathfinder-generated-lite", "model/s4d"],
        ["--data.training_examples", "2000", "--data.validation_examples", "20", "--data.test_examples", "20"],
    ),
}


def build(name: str) -> TrainingCLI:
    configurations, overrides = LOADERS[name]
    cli = TrainingCLI(combine(configurations), overrides)
    cli.datamodule.setup()
    return cli


def step(cli: TrainingCLI):
    """What makes a training step without its update, on one batch."""
    model, batch = cli.model.model, next(iter(cli.datamodule.train_dataloader()))

    def call() -> None:
        if isinstance(batch, dict):
            loss = model.loss(**batch)
        elif hasattr(batch, "cu_seqlens"):
            loss = model.loss(batch.ids, batch.labels, cu_seqlens=batch.cu_seqlens)
        else:
            loss = model.loss(batch[:, :-1].long(), batch[:, 1:].long())
        loss.backward()

    return call


def share(benchmark) -> float:
    """The median over that of the limit beside it."""
    if benchmark.stats is None:
        pytest.skip("benchmarks are switched off")
    return benchmark.stats.stats.median / benchmark.extra_info["limit"]


@pytest.mark.parametrize("name", LOADERS)
def test_loading(measure, benchmark, device, name):
    if device.type != "cpu":
        pytest.skip("data are read on the CPU")
    cli = build(name)
    batches = iter(cli.datamodule.train_dataloader())
    batch = next(batches)
    tokens = sum(batch.get("lengths", [batch["x"].shape[1]] * len(batch["x"]))) if isinstance(batch, dict) else None
    group = f"{name}, {BATCHES} batches of {tokens or tokens_of(batch):,} tokens, beside one training step"

    def several() -> list:
        return [next(batches) for _ in range(BATCHES)]

    # the fewest rounds: a step stands before each
    measure(lambda: several, group=group, name="loading", role="seqzoo", limit=lambda: step(cli), seconds=0)
    assert share(benchmark) / BATCHES < LOADING


def test_packing_sampler(measure, benchmark, device):
    if device.type != "cpu":
        pytest.skip("data are read on the CPU")
    cli = build("packed documents of the standard library")
    lengths = [length for length in np.diff(cli.datamodule.side("training").bounds).tolist() if length > 1]
    tokens = cli.datamodule.tokens
    # of documents that are carried on the rest behind whole batches is packed
    rests = [(length - 1) % tokens + 1 for length in lengths]
    sampler = PackedBatchSampler(rests, tokens=tokens)
    count = len(sampler)
    epochs = itertools.count(1)

    def epoch() -> int:
        sampler.set_epoch(next(epochs))
        return sum(1 for _ in sampler)

    group = f"packing sampler, an epoch of {len(rests):,} documents in {count} batches, beside one training step"
    measure(lambda: epoch, group=group, name="packing", role="seqzoo", limit=lambda: step(cli), seconds=0)
    assert share(benchmark) / count < PACKING


def test_listops_generation(measure, benchmark, device):
    if device.type != "cpu":
        pytest.skip("trees are grown on the CPU")
    count = 10_000
    seeds = itertools.count()
    group = f"ListOps, {count:,} trees of the published law"
    measure(lambda: lambda: listops.generate(next(seeds), count), group=group, name="seqzoo", role="seqzoo", seconds=0)
    if benchmark.stats is not None:
        assert benchmark.stats.stats.median * 100_000 / count <= 60


def test_pathfinder_generation(measure, benchmark, device):
    if device.type != "cpu":
        pytest.skip("images are drawn on the CPU")
    count, starts = 200, itertools.count(0, 200)
    drawing = pathfinder.drawing(32)
    group = f"Pathfinder, {count} images of 32 x 32"
    measure(
        lambda: lambda: pathfinder.draw(0, next(starts), count, 32, drawing),
        group=group,
        name="seqzoo",
        role="seqzoo",
        seconds=0,
    )
    if benchmark.stats is not None:
        assert count / benchmark.stats.stats.median >= 100
