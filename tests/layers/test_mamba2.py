"""Mamba-2 against the implementation of transformers, and what it begins with."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# before transformers is imported
os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from seqzoo import create
from seqzoo.testing import inputs

WIDTH = 32
# our options, and those of transformers; the length is no multiple of the chunks
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one group": ({"d_state": 6, "n_heads": 8}, {"state_size": 6, "num_heads": 8, "head_dim": 8, "n_groups": 1}),
    "groups": (
        {"d_state": 6, "head_dim": 8, "n_groups": 4},
        {"state_size": 6, "num_heads": 8, "head_dim": 8, "n_groups": 4},
    ),
    "other sizes": (
        {"d_state": 3, "d_conv": 2, "expand": 3, "head_dim": 16, "n_groups": 2, "norm_eps": 0.3},
        {
            "state_size": 3,
            "conv_kernel": 2,
            "expand": 3,
            "num_heads": 6,
            "head_dim": 16,
            "n_groups": 2,
            "layer_norm_epsilon": 0.3,
            "chunk_size": 8,
        },
    ),
    "biases": (
        {"d_state": 6, "n_heads": 2, "bias": True, "conv_bias": False},
        {
            "state_size": 6,
            "num_heads": 2,
            "head_dim": 32,
            "n_groups": 1,
            "use_bias": True,
            "use_conv_bias": False,
            "chunk_size": 16,
        },
    ),
    "limited steps": (
        {"d_state": 6, "n_heads": 8, "dt_limit": (0.05, 0.2)},
        {"state_size": 6, "num_heads": 8, "head_dim": 8, "n_groups": 1, "time_step_limit": (0.05, 0.2)},
    ),
}


def gradients(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients of a weighted sum of the outputs: of the input, and of all parameters by name."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    loss = (y * inputs(tuple(y.shape), y.dtype, seed=5)).sum()
    return dict(zip(("x", *names), torch.autograd.grad(loss, (x, *parameters)), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_mixer_of_transformers(name: str):
    options, others = VARIANTS[name]
    torch.manual_seed(0)
    ours = create("mamba2", d_model=WIDTH, **options)
    theirs = Mamba2Mixer(Mamba2Config(hidden_size=WIDTH, num_hidden_layers=1, **others), layer_idx=0).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    theirs.load_state_dict(ours.state_dict())
    # float32, which it takes parts to itself
    x = inputs((2, 41, WIDTH), torch.float32).requires_grad_()
    y, expected = ours(x)[0], theirs(x)
    found, wanted = {"y": y, **gradients(ours, x, y)}, {"y": expected, **gradients(theirs, x, expected)}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        error, scale = float((found[key] - value).detach().abs().max()), float(value.detach().abs().max())
        assert scale > 1e-3, f"{key} is too small to tell anything"
        assert error <= 2e-5 * scale, f"{key}: {error / scale:.1e}"


@torch.no_grad()
def test_it_begins_as_in_the_paper():
    torch.manual_seed(0)
    mixer = create("mamba2", d_model=2048, head_dim=8)
    assert torch.equal(mixer.D, torch.ones(512))
    assert torch.equal(mixer.norm.weight, torch.ones(4096))
    rates, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias.double())
    assert 1 <= float(rates.min()) < 1.2
    assert 15.8 < float(rates.max()) <= 16 * (1 + 1e-6)
    assert 0.001 * (1 - 1e-4) <= float(steps.min()) < 0.0011
    assert 0.09 < float(steps.max()) <= 0.1 * (1 + 1e-4)
    assert float(F.softplus(create("mamba2", d_model=64, dt_init_floor=0.05).dt_bias).min()) >= 0.05 * (1 - 1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_groups": 3, "n_heads": 4}, "n_groups must divide the 4 heads, got 3"),
        ({"n_groups": 0}, "n_groups must be a positive integer, got 0"),
        ({"dt_limit": (0.1,)}, r"dt_limit must be two numbers, got \(0.1,\)"),
        ({"A_range": (1, math.inf)}, r"A_range must be a range of positive numbers, got \(1, inf\)"),
        ({"d_state": 512}, "K must be at most 256, got 512"),
        ({"norm_eps": -1.0}, "norm_eps must be a finite number greater than 0, got -1.0"),
        ({"dt_limit": (0.5, 0.1)}, r"dt_limit must be a range of positive numbers, got \(0.5, 0.1\)"),
        ({"A_range": (0, 1)}, r"A_range must be a range of positive numbers, got \(0, 1\)"),
        ({"dt_min": 0.2}, "dt_min must not be above dt_max, got 0.2 and 0.1"),
        ({"head_dim": 5}, "heads must make up the width 32, got head_dim = 5"),
        ({"expand": 1.03}, r"expand \* d_model must be a positive integer, got 1.03 \* 16"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        create("mamba2", d_model=16, **options)
