"""A Mamba layer, forward and backward, beside what it is made of and beside peers."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from seqzoo import create

WIDTH, STATE = 256, 16


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


def parts(step, device, shape):
    """The linear maps, forward and backward, and three exponentials for every value of the states."""

    def make():
        linear = step(Parts, shape)()
        values = -torch.rand(shape[0] * shape[1], 2 * WIDTH, STATE, device=device)
        out = torch.empty_like(values)

        def call():
            linear()
            for _ in range(3):
                torch.exp(values, out=out)

        return call

    return make


@pytest.fixture(params=[2048, 512, 128], ids=str)
def place(request, device, training_step):
    shape = 1, request.param, WIDTH
    return {
        "group": f"mamba layer {shape} fp32 forward+backward",
        "limit": parts(training_step, device, shape),
        "seconds": 4.0,
    }, shape


def test_parts(measure, place):
    options, _ = place
    measure(options["limit"], name="its linear maps and 3 exponentials a value", role="limit", **options)


def test_seqzoo(measure, place, training_step):
    options, shape = place
    measure(training_step(lambda: create("mamba", d_model=WIDTH), shape), name="seqzoo", role="seqzoo", **options)


@pytest.mark.skipif(importlib.util.find_spec("mambapy") is None, reason="mambapy is missing")
def test_mambapy(measure, place, training_step):
    from mambapy.mamba import MambaBlock, MambaConfig

    options, shape = place
    build = lambda: MambaBlock(MambaConfig(d_model=WIDTH, n_layers=1))  # noqa: E731
    measure(training_step(build, shape), name="mambapy", role="peer", **options)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is missing")
def test_transformers(measure, place, training_step):
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    options, shape = place
    if shape[1] > 512:
        pytest.skip("its time is quadratic in the length: minutes")
    build = lambda: MambaMixer(MambaConfig(hidden_size=WIDTH, state_size=STATE), layer_idx=0)  # noqa: E731
    measure(training_step(build, shape), name="transformers", role="peer", **options)
