"""A minGRU layer, forward and backward, beside its Linear layers alone and beside peers; and its decoding."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from seqzoo import create

BATCH, LENGTH, WIDTH = 8, 2048, 256
GROUP = f"min_gru layer {(BATCH, LENGTH, WIDTH)} fp32 forward+backward"


def training_step(build, device):
    """What makes forward and backward passes of a module."""

    def make():
        module = build().to(device)
        x = torch.randn(BATCH, LENGTH, WIDTH, device=device, requires_grad=True)
        weight = torch.randn(BATCH, LENGTH, WIDTH, device=device)
        sources = [x, *module.parameters()]

        def call():
            y = module(x)
            y = y[0] if isinstance(y, tuple) else y
            # a layer of another width is weighted as far as it goes
            along = weight if y.shape == weight.shape else weight.repeat(1, 1, y.shape[2] // WIDTH)
            torch.autograd.grad(y, sources, along)

        return call

    return make


@pytest.fixture
def place(device):
    return {"group": GROUP, "limit": training_step(lambda: torch.nn.Linear(WIDTH, 2 * WIDTH, bias=False), device)}


def test_linear_layers_alone(measure, place):
    measure(place["limit"], name="its Linear layers alone", role="limit", **place)


def test_seqzoo(measure, place, device):
    step = training_step(lambda: create("min_gru", d_model=WIDTH), device)
    measure(step, name="seqzoo", role="seqzoo", **place)


@pytest.mark.skipif(importlib.util.find_spec("minGRU_pytorch") is None, reason="minGRU_pytorch is missing")
def test_min_gru_pytorch(measure, place, device):
    from minGRU_pytorch import minGRU

    measure(training_step(lambda: minGRU(WIDTH), device), name="minGRU_pytorch", role="peer", **place)


def test_torch_gru(measure, place, device):
    step = training_step(lambda: torch.nn.GRU(WIDTH, WIDTH, batch_first=True), device)
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
