"""A minGRU layer, forward and backward, beside its Linear layers alone and beside peers; and its decoding."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from seqzoo import create

SHAPE = BATCH, LENGTH, WIDTH = 8, 2048, 256
GROUP = f"min_gru layer {SHAPE} fp32 forward+backward"


@pytest.fixture
def place(training_step):
    return {"group": GROUP, "limit": training_step(lambda: torch.nn.Linear(WIDTH, 2 * WIDTH, bias=False), SHAPE)}


def test_linear_layers_alone(measure, place):
    measure(place["limit"], name="its Linear layers alone", role="limit", **place)


def test_seqzoo(measure, place, training_step):
    step = training_step(lambda: create("min_gru", d_model=WIDTH), SHAPE)
    measure(step, name="seqzoo", role="seqzoo", **place)


@pytest.mark.skipif(importlib.util.find_spec("minGRU_pytorch") is None, reason="minGRU_pytorch is missing")
def test_min_gru_pytorch(measure, place, training_step):
    from minGRU_pytorch import minGRU

    measure(training_step(lambda: minGRU(WIDTH), SHAPE), name="minGRU_pytorch", role="peer", **place)


def test_torch_gru(measure, place, training_step):
    step = training_step(lambda: torch.nn.GRU(WIDTH, WIDTH, batch_first=True), SHAPE)
    measure(step, name="torch.nn.GRU", role="peer", **place)


@pytest.mark.parametrize("position", [0, 100_000])
@pytest.mark.parametrize("name", ["min_gru", "min_lstm"])
def test_decoding(measure, device, name, position):
    """The limit is a step at the start: what comes later must not cost more."""
    mixer = create(name, d_model=WIDTH).to(device)
    x = torch.randn(BATCH, WIDTH, device=device)

    def stepping(tokens):
        def make():
            _, state = mixer(torch.randn(BATCH, tokens, WIDTH, device=device), return_state=True)
            return lambda: mixer.step(x, state)

        return make

    with torch.inference_mode():
        measure(
            stepping(position),
            group=f"{name} step, batch {BATCH}, width {WIDTH}",
            name=f"after {position:,} tokens",
            role="seqzoo" if position else "limit",
            limit=stepping(0),
            seconds=0.5,
        )
