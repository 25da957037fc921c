"""HGRN, RG-LRU and GateLoop against the formulas of their papers, written out token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo import create
from seqzoo.testing import inputs

T = 40


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def make(name: str, options: dict):
    torch.manual_seed(0)
    mixer = create(name, d_model=16, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def convolved(mixer, u: Tensor, activated: bool) -> Tensor:
    if mixer.conv1d is None:
        return u
    taps = mixer.conv1d.weight.shape[-1]
    windows = F.pad(u, (0, 0, taps - 1, 0)).unfold(1, taps, 1)  # (B, T, D, W)
    y = (windows * mixer.conv1d.weight[:, 0]).sum(-1) + mixer.conv1d.bias
    return y * sigmoid(y) if activated else y


def loop(a: Tensor, b: Tensor) -> Tensor:
    h, found = torch.zeros_like(b[:, 0]), []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        found.append(h)
    return torch.stack(found, 1)


def normalised(mixer, h: Tensor, gate: Tensor) -> Tensor:
    return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight * gate * sigmoid(gate)


@pytest.mark.parametrize("options", [{}, {"expand": 1.5, "lower_bound": 0.5, "d_conv": 3, "bias": True}], ids=str)
def test_hgrn_is_the_formula_of_the_paper(options: dict):
    mixer, x = make("hgrn", options), inputs((2, T, 16), torch.float64)
    forget, value, gate = mixer.in_proj(convolved(mixer, x, True)).chunk(3, -1)
    bound = options.get("lower_bound", 0.0)
    f = bound + (1 - bound) * sigmoid(forget)
    h = loop(f, (1 - f) * value * sigmoid(value))
    expected = mixer.out_proj(normalised(mixer, h, gate))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"n_heads": 2}, {"expand": 1.5, "n_heads": 4, "d_conv": None, "c": 2.0}], ids=str)
def test_rglru_is_the_formula_of_the_paper(options: dict):
    mixer, x = make("rglru", options), inputs((2, T, 16), torch.float64)
    u, gate = mixer.in_proj(x).chunk(2, -1)
    u = convolved(mixer, u, False)
    r, i = (
        sigmoid(u @ torch.block_diag(*weight) + bias.flatten())
        for weight, bias in zip(mixer.gates_weight, mixer.gates_bias, strict=True)
    )
    # sigmoid(-Lambda)^(c r): the paper's sigmoid(Lambda) with the other sign, as in its code
    a = (1 / (1 + torch.exp(mixer.Lambda))) ** (mixer.c * r)
    h = loop(a, (1 - a**2).sqrt() * i * u)
    gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(h * gelu), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"expand": 1.5, "d_conv": 3, "bias": True}], ids=str)
def test_gateloop_is_attention_with_complex_decays(options: dict):
    """Its quadratic form: ``o_i = Re sum_j q_i k_j v_j prod_{j < m <= i} a_m``."""
    mixer, x = make("gateloop", options), inputs((2, T, 16), torch.float64)
    q, k, v, alpha, beta, gate = mixer.in_proj(convolved(mixer, x, True)).chunk(6, -1)
    a = sigmoid(alpha) * torch.exp(1j * beta)
    assert (a.abs() < 1).all()
    assert (a.imag.abs() > 0.01).any()
    o = torch.zeros_like(q)
    for i in range(T):
        weight = torch.ones_like(a[:, 0])
        for j in range(i, -1, -1):
            o[:, i] += (q[:, i] * weight * k[:, j] * v[:, j]).real
            weight = weight * a[:, j]
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(normalised(mixer, o, gate)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["hgrn", "rglru"])
def test_a_shut_gate_keeps_a_state_without_adding(name: str):
    """Where what is kept rounds to 1, what enters must not be what rounding left of ``1 - f``."""
    mixer = create(name, d_model=16, d_conv=None, bias=True)
    with torch.no_grad():
        if name == "hgrn":
            mixer.in_proj.bias[:16] = 30.0
        else:
            mixer.gates_bias[0] = -30.0
    x = inputs((1, 1000, 16), torch.float32)
    given = {"h": torch.ones(1, 16)}
    _, state = mixer(x, given, return_state=True)
    _, wide = mixer.double()(x.double(), {"h": torch.ones(1, 16).double()}, return_state=True)
    torch.testing.assert_close(state["h"].double(), wide["h"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("hgrn", {"lower_bound": -0.1}, "lower_bound must be at least 0 and below 1, got -0.1"),
        ("hgrn", {"expand": 1.03}, r"expand \* d_model must be a positive integer"),
        ("rglru", {"c": 0.0}, "c must be a finite number greater than 0, got 0.0"),
        ("rglru", {"n_heads": 3}, "n_heads must divide the width 16, got 3"),
        ("gateloop", {"d_conv": 9}, "d_conv must be an integer from 2 to 8, got 9"),
    ],
)
def test_bad_options(name: str, options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        create(name, **({"d_model": 16} | options))
