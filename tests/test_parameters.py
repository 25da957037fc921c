"""Optimiser groups, and parameters that stay in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seqzoo import parameter_groups
from seqzoo.testing import PlainMixer, inputs


def settings(groups: list[dict]) -> dict[str, tuple[float, float]]:
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_options_and_defaults():
    model = nn.Sequential(nn.Linear(16, 16), PlainMixer(16), nn.LayerNorm(16))
    assert settings(parameter_groups(model, 0.1, 0.01)) == {
        "0.weight": (0.1, 0.01),
        "0.bias": (0.1, 0.0),
        "1.decay": (0.05, 0.0),
        "1.out_proj.weight": (0.1, 0.01),
        "2.weight": (0.1, 0.0),
        "2.bias": (0.1, 0.0),
    }


def test_a_rate_that_is_a_tensor():
    groups = parameter_groups(nn.Sequential(nn.Linear(16, 16), PlainMixer(16)), torch.tensor(0.1))
    assert sorted(len(group["params"]) for group in groups) == [1, 3]
    torch.optim.AdamW(groups, foreach=False)


def test_shared_and_frozen_parameters():
    one = nn.Linear(4, 4, bias=False)
    model = nn.ModuleList([one, one, nn.Linear(4, 4, bias=False).requires_grad_(False)])
    assert settings(parameter_groups(model, 0.1)) == {"0.weight": (0.1, 0.0)}


def test_an_option_for_no_parameter_is_an_error():
    mixer = PlainMixer(16)
    mixer.parameter_options = lambda: {"decays": {"weight_decay": 0.0}}
    with pytest.raises(ValueError, match="no parameter 'decays'; did you mean decay"):
        parameter_groups(mixer, 0.1)
    mixer.parameter_options = lambda: {"decay": {"momentum": 0.0}}
    with pytest.raises(ValueError, match="asks for 'momentum'"):
        parameter_groups(mixer, 0.1)


def test_float32_survives_conversion_with_its_gradient_and_loading():
    mixer = PlainMixer(16)
    mixer(inputs((1, 3, 16), torch.float32))[0].sum().backward()
    mixer.to(torch.bfloat16)
    assert mixer.decay.dtype == mixer.decay.grad.dtype == torch.float32
    assert mixer.out_proj.weight.dtype == torch.bfloat16
    torch.optim.AdamW(mixer.parameters()).step()
    half = {name: value.to(torch.bfloat16) for name, value in mixer.state_dict().items()}
    for assign in (False, True):
        other = PlainMixer(16).to(torch.bfloat16)
        other.load_state_dict(half, assign=assign)
        assert other.decay.dtype == torch.float32
