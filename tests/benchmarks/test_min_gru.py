"""A minGRU layer, forward and backward, beside its Linear layers alone and beside peers; and its decoding."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from seqzoo import create

BATCH, LENGTH, WIDTH = 8, 2048, 256
GROUP = f"min_gru layer {(BATCH, LENGTH, WIDTH)} fp32 forward+backward"


def training_step(module, device):
    torch.manual_seed(0)
    module = module.to(device)
    x = torch.randn(BATCH, LENGTH, WIDTH, device=device, requires_grad=True)
    weight = torch.randn(BATCH, LENGTH, WIDTH, device=device)
    sources = [x, *module.parameters()]

    def call():
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        # a layer of another width is weighted as far as it goes
        torch.autograd.grad(y, sources, weight if y.shape == weight.shape else weight.repeat(1, 1, y.shape[2] // WIDTH))

    return call


def test_linear_layers_alone(measure, device):
    step = training_step(torch.nn.Linear(WIDTH, 2 * WIDTH, bias=False), device)
    measure(step, group=GROUP, name="its Linear layers alone", role="limit")


def test_seqzoo(measure, device):
    measure(training_step(create("min_gru", d_model=WIDTH), device), group=GROUP, name="seqzoo", role="seqzoo")


@pytest.mark.skipif(importlib.util.find_spec("minGRU_pytorch") is None, reason="minGRU_pytorch is missing")
def test_min_gru_pytorch(measure, device):
    from minGRU_pytorch import minGRU

    measure(training_step(minGRU(WIDTH), device), group=GROUP, name="minGRU_pytorch", role="peer")


def test_torch_gru(measure, device):
    module = torch.nn.GRU(WIDTH, WIDTH, batch_first=True)
    measure(training_step(module, device), group=GROUP, name="torch.nn.GRU", role="peer")


@pytest.mark.parametrize("position", [0, 100_000])
@pytest.mark.parametrize("name", ["min_gru", "min_lstm"])
def test_decoding(measure, device, name, position):
    mixer = create(name, d_model=WIDTH).to(device)
    x = torch.randn(BATCH, WIDTH, device=device)
    with torch.inference_mode():
        _, state = mixer(torch.randn(BATCH, max(position, 1), WIDTH, device=device)[:, :position], return_state=True)
        measure(
            lambda: mixer.step(x, state),
            group=f"{name} step, batch {BATCH}, width {WIDTH}",
            name=f"after {position:,} tokens",
            role="limit" if position == 0 else "seqzoo",
            seconds=0.5,
            warm=True,
        )
