"""A Mamba-2 layer, forward and backward, beside its linear maps alone and beside transformers."""

from __future__ import annotations

import importlib.util

import pytest
from torch import nn

from seqzoo import create

WIDTH = 256


class Parts(nn.Module):
    """The layer's linear maps."""

    def __init__(self) -> None:
        super().__init__()
        mamba = create("mamba2", d_model=WIDTH)
        self.width, self.in_proj, self.out_proj = mamba.width, mamba.in_proj, mamba.out_proj

    def forward(self, x):
        return self.out_proj(self.in_proj(x)[..., : self.width])


@pytest.fixture(params=[2048, 512], ids=str)
def place(request, training_step):
    shape = 1, request.param, WIDTH
    return {
        "group": f"mamba2 layer {shape} fp32 forward+backward",
        "limit": training_step(Parts, shape),
        "seconds": 4.0,
    }, shape


def test_parts(measure, place):
    options, _ = place
    measure(options["limit"], name="its linear maps", role="limit", **options)


def test_seqzoo(measure, place, training_step):
    options, shape = place
    measure(training_step(lambda: create("mamba2", d_model=WIDTH), shape), name="seqzoo", role="seqzoo", **options)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is missing")
def test_transformers(measure, place, training_step):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    options, shape = place
    config = Mamba2Config(hidden_size=WIDTH, num_heads=8, head_dim=64, state_size=128, n_groups=1)
    measure(training_step(lambda: Mamba2Mixer(config, layer_idx=0), shape), name="transformers", role="peer", **options)
