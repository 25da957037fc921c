"""A Mamba layer, forward and backward, beside what it is made of and beside peers."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from seqzoo import create

WIDTH, STATE = 256, 16


def training_step(build, device, batch, length):
    """What makes forward and backward passes of a module."""

    def make():
        module = build().to(device)
        x = torch.randn(batch, length, WIDTH, device=device, requires_grad=True)
        weight = torch.randn(batch, length, WIDTH, device=device)
        sources = [x, *module.parameters()]

        def call():
            y = module(x)
            y = y[0] if isinstance(y, tuple) else y
            torch.autograd.grad(y, sources, weight)

        return call

    return make


class Parts(nn.Module):
    """The layer's linear maps, each on inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        mamba = create("mamba", d_model=WIDTH, d_state=STATE)
        self.rank = mamba.dt_rank
        self.in_proj, self.x_proj, self.out_proj = mamba.in_proj, mamba.x_proj, mamba.out_proj
        self.dt_proj = nn.Linear(mamba.dt_rank, mamba.width)

    def forward(self, x):
        u, z = self.in_proj(x).chunk(2, dim=-1)
        low = self.x_proj(u)[..., : self.rank]
        return self.out_proj(self.dt_proj(low) + z)


def parts(device, batch, length):
    """The linear maps, forward and backward, and three exponentials for every value of the states."""

    def make():
        linear = training_step(Parts, device, batch, length)()
        values = -torch.rand(batch * length, 2 * WIDTH, STATE, device=device)
        out = torch.empty_like(values)

        def call():
            linear()
            for _ in range(3):
                torch.exp(values, out=out)

        return call

    return make


@pytest.fixture(params=[(1, 2048), (1, 512), (1, 128)], ids=str)
def place(request, device):
    batch, length = request.param
    return {
        "group": f"mamba layer {(batch, length, WIDTH)} fp32 forward+backward",
        "limit": parts(device, batch, length),
        "seconds": 4.0,
    }, (device, batch, length)


def test_parts(measure, place):
    options, _ = place
    measure(options["limit"], name="its linear maps and 3 exponentials a value", role="limit", **options)


def test_seqzoo(measure, place):
    options, shape = place
    measure(training_step(lambda: create("mamba", d_model=WIDTH), *shape), name="seqzoo", role="seqzoo", **options)


@pytest.mark.skipif(importlib.util.find_spec("mambapy") is None, reason="mambapy is missing")
def test_mambapy(measure, place):
    from mambapy.mamba import MambaBlock, MambaConfig

    options, shape = place
    build = lambda: MambaBlock(MambaConfig(d_model=WIDTH, n_layers=1))  # noqa: E731
    measure(training_step(build, *shape), name="mambapy", role="peer", **options)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is missing")
def test_transformers(measure, place):
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    options, shape = place
    if shape[2] > 512:
        pytest.skip("its time is quadratic in the length: minutes")
    build = lambda: MambaMixer(MambaConfig(hidden_size=WIDTH, state_size=STATE), layer_idx=0)  # noqa: E731
    measure(training_step(build, *shape), name="transformers", role="peer", **options)
