"""Mamba against two implementations by others, Longhorn against its equations written out, and what they begin with."""

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
from mambapy import mamba as mambapy
from transformers import FalconMambaConfig, MambaConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer

import seqzoo
from seqzoo import create
from seqzoo.testing import inputs

WIDTH = 32
# our options, and those of transformers; T is no power of two, on which mambapy's scan takes another way
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "other sizes": (
        {"d_state": 5, "d_conv": 2, "expand": 3, "dt_rank": 7},
        {"state_size": 5, "conv_kernel": 2, "expand": 3, "time_step_rank": 7},
    ),
    "biases": ({"bias": True, "conv_bias": False}, {"use_bias": True, "use_conv_bias": False}),
    "norms": ({"norm_eps": 0.1}, {"mixer_rms_eps": 0.1}),
}


def shaken(module: nn.Module) -> nn.Module:
    """Moves every parameter away from where it begins, so that each counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.2)
    return module


def gradients(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients of a weighted sum of the outputs: of the input, and of all parameters by name."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    loss = (y * inputs(tuple(y.shape), y.dtype, seed=5)).sum()
    return dict(zip(("x", *names), torch.autograd.grad(loss, (x, *parameters)), strict=True))


def compare(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype, tolerance: float) -> None:
    """Compares outputs and all gradients of the same parameters, each by its greatest value."""
    theirs.load_state_dict(shaken(ours).state_dict())
    x = inputs((2, 41, WIDTH), dtype).requires_grad_()
    y, expected = ours(x)[0], theirs(x)
    found, wanted = {"y": y, **gradients(ours, x, y)}, {"y": expected, **gradients(theirs, x, expected)}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error, scale = float((found[name] - value).detach().abs().max()), float(value.detach().abs().max())
        assert scale > 1e-3, f"{name} is too small to tell anything"
        assert error <= tolerance * scale, f"{name}: {error / scale:.1e}"


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_mixer_of_transformers(name: str):
    options, others = VARIANTS[name]
    kind, config = (FalconMambaMixer, FalconMambaConfig) if "norm_eps" in options else (MambaMixer, MambaConfig)
    torch.manual_seed(0)
    theirs = kind(config(hidden_size=WIDTH, num_hidden_layers=1, **others), layer_idx=0, initialize_mixer_weights=False)
    # float32, which it takes parts to itself
    compare(create("mamba", d_model=WIDTH, **options), theirs.eval(), torch.float32, 2e-5)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "norms"])
def test_it_is_the_block_of_mambapy(name: str):
    options, _ = VARIANTS[name]
    words = {"expand": "expand_factor"}
    config = mambapy.MambaConfig(WIDTH, 1, **{words.get(key, key): value for key, value in options.items()})
    torch.manual_seed(0)
    theirs = mambapy.MambaBlock(config).double()
    # it takes these two to float32, which would be the only rounding left
    for key in ("A_log", "D"):
        parameter = getattr(theirs, key)
        parameter.float = parameter.double
    compare(create("mamba", d_model=WIDTH, **options).double(), theirs, torch.float64, 1e-12)


@torch.no_grad()
def test_it_begins_as_in_the_paper():
    """Section 3.6: A = -(n + 1), and steps between 0.001 and 0.1, uniform in their logarithm."""
    torch.manual_seed(0)
    mixer = create("mamba", d_model=2048, d_state=5)
    assert mixer.dt_rank == 128
    torch.testing.assert_close(mixer.A_log, torch.arange(1.0, 6).log().expand(4096, 5))
    torch.testing.assert_close(mixer.transition_matrix(), -torch.arange(1.0, 6).expand(4096, 5))
    assert torch.equal(mixer.D, torch.ones(4096))
    steps = F.softplus(mixer.dt_proj.bias.double())
    assert float(steps.min()) >= 0.001 * (1 - 1e-4)
    assert float(steps.max()) <= 0.1 * (1 + 1e-4)
    place = (steps.log() - math.log(0.001)) / math.log(100)
    # the greatest distance of 4096 uniform values from their distribution exceeds this once in 3000 times
    assert float((place.sort().values - torch.linspace(0, 1, 4096)).abs().max()) < 2 / 4096**0.5
    assert float(mixer.dt_proj.weight.abs().max()) <= 128**-0.5
    floor = create("mamba", d_model=64, dt_init_floor=0.05)
    assert float(F.softplus(floor.dt_proj.bias).min()) >= 0.05 * (1 - 1e-4)


@pytest.mark.parametrize("name", ["mamba", "longhorn"])
def test_the_step_outlives_an_initialisation_of_all_linear_layers(name: str):
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    mixer = create(name, d_model=32, bias=True)
    before = mixer.dt_proj.bias.clone()
    with torch.no_grad():
        mixer.in_proj.bias.add_(1)
    mixer.apply(initialise)
    assert torch.equal(mixer.dt_proj.bias, before)
    assert before.std() > 0
    assert not mixer.in_proj.bias.any()


@pytest.mark.parametrize("name", ["mamba", "longhorn"])
def test_what_stays_float32(name: str):
    mixer = create(name, d_model=32)
    wide = {"mamba": {"A_log", "D", "dt_proj.bias"}, "longhorn": {"D"}}[name]
    before = {key: value.clone() for key, value in mixer.state_dict().items()}
    mixer.to(torch.bfloat16)
    for key, parameter in mixer.named_parameters():
        assert parameter.dtype == (torch.float32 if key in wide else torch.bfloat16), key
        if key in wide:
            assert torch.equal(parameter, before[key])
    x = inputs((2, 9, 32), torch.float32)
    y, state = mixer(x.bfloat16(), return_state=True)
    assert y.dtype == state["conv"].dtype == torch.bfloat16
    assert state["ssm"].dtype == torch.float32
    assert {parameter.dtype for parameter in mixer.double().parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ["mamba", "longhorn"])
def test_a_narrow_default_dtype_narrows_no_more_than_a_conversion(name: str):
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixer = create(name, d_model=32)
    finally:
        torch.set_default_dtype(torch.float32)
    converted = create(name, d_model=32).bfloat16()
    kinds = [{key: value.dtype for key, value in one.named_parameters()} for one in (mixer, converted)]
    assert kinds[0] == kinds[1]
    if name == "mamba":
        torch.testing.assert_close(mixer.A_log[0], torch.arange(1.0, 17).log())


@pytest.mark.parametrize("name", ["mamba", "longhorn"])
def test_parameters_that_something_else_stands_for(name: str):
    mixer, x = create(name, d_model=32), inputs((2, 5, 32), torch.float32)
    expected = mixer(x)[0]
    constants = {key: value.detach() for key, value in mixer.named_parameters()}
    assert torch.equal(torch.func.functional_call(mixer, constants, (x,))[0], expected)
    nn.utils.parametrize.register_parametrization(mixer, "D", nn.Identity())
    assert torch.equal(mixer(x)[0], expected)
    mixer.bfloat16()(x.bfloat16())


def test_norms_that_autocast_widens(monkeypatch: pytest.MonkeyPatch):
    """As CUDA's does, unlike the CPU's."""
    mixer, x = create("mamba", d_model=32, norm_eps=1e-6), inputs((2, 5, 32), torch.float32)
    narrow = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda value, *rest, **options: narrow(value.float(), *rest, **options))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixer(x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["mamba", "longhorn"])
def test_what_does_not_decay(name: str):
    from seqzoo.models import LanguageModel, ModelConfig

    config = ModelConfig(vocab_size=9, d_model=32, n_layers=1, pattern=[{"name": name, "bias": True}], mlp="none")
    groups = seqzoo.parameter_groups(LanguageModel(config), lr=1.0, weight_decay=0.1)
    decays = {key: group["weight_decay"] for group in groups for key in group["names"]}
    mixer = "backbone.blocks.0.mixer."
    assert {key for key, decay in decays.items() if decay == 0.1} == {
        "embedding.weight",
        *(f"{mixer}{layer}.weight" for layer in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")),
    }
    kept = {"D", "dt_proj.bias", "conv1d.bias", "in_proj.bias", "out_proj.bias"}
    if name == "mamba":
        kept.add("A_log")
    norms = {"backbone.blocks.0.mixer_norm.weight", "backbone.norm.weight"}
    assert {key for key, decay in decays.items() if decay == 0} == {*norms, *(mixer + key for key in kept)}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"d_state": 0}, ValueError, "d_state must be a positive integer, got 0"),
        ({"d_state": True}, ValueError, "d_state must be a positive integer, got True"),
        ({"dt_rank": 1.5}, ValueError, "dt_rank must be a positive integer, got 1.5"),
        ({"d_conv": 1}, ValueError, "d_conv must be an integer from 2 to 8, got 1"),
        ({"d_conv": 9}, ValueError, "d_conv must be an integer from 2 to 8, got 9"),
        ({"expand": 1.03}, ValueError, r"expand \* d_model must be a positive integer, got 1.03 \* 16"),
        ({"expand": 0}, ValueError, "expand must be a finite number greater than 0, got 0"),
        ({"expand": "2"}, ValueError, "expand must be a finite number greater than 0, got '2'"),
        ({"expand": math.nan}, ValueError, "expand must be a finite number greater than 0, got nan"),
        ({"dt_rank": "auto"}, ValueError, "or None for d_model / 16, got 'auto'"),
        ({"bias": "False"}, ValueError, "bias must be True or False, got 'False'"),
        ({"d_inner": 3}, TypeError, "no option 'd_inner'"),
    ],
)
@pytest.mark.parametrize("name", ["mamba", "longhorn"])
def test_bad_options(name: str, options: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        create(name, d_model=16, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dt_min": 0.2}, "dt_min must not be above dt_max, got 0.2 and 0.1"),
        ({"dt_min": 0}, "dt_min must be a finite number greater than 0, got 0"),
        ({"dt_max": math.inf}, "dt_max must be a finite number greater than 0, got inf"),
        ({"dt_init_floor": -1.0}, "dt_init_floor must not be negative, got -1.0"),
        ({"dt_init_floor": math.nan}, "dt_init_floor must be a finite number, got nan"),
        ({"norm_eps": 0}, r"norm_eps \(None for no norm\) must be a finite number greater than 0, got 0"),
        ({"norm_eps": "1e-6"}, "greater than 0, got '1e-6'"),
    ],
    ids=str,
)
def test_bad_options_of_mamba(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        create("mamba", d_model=16, **options)


def longhorn_parts(mixer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, k, q, beta and z of the docstring, the convolution taken tap by tap."""
    width, taps = mixer.width, mixer.conv1d.weight.shape[2]
    u, z = (x @ mixer.in_proj.weight.T).split(width, dim=-1)
    padded = torch.cat((u.new_zeros(u.shape[0], taps - 1, width), u), dim=1)
    u = sum(padded[:, tap : tap + x.shape[1]] * mixer.conv1d.weight[:, 0, tap] for tap in range(taps))
    u = u + mixer.conv1d.bias
    u = u * torch.sigmoid(u)
    rank, n = mixer.dt_rank, mixer.d_state
    projected = u @ mixer.x_proj.weight.T
    r, k, q = projected[..., :rank], projected[..., rank : rank + n], projected[..., rank + n :]
    beta = torch.sigmoid(r @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    return u, k, q, beta, z


@pytest.mark.parametrize("options", [{}, {"d_state": 3, "d_conv": 2, "expand": 1.5, "dt_rank": 2}], ids=str)
def test_longhorn_is_its_equations(options: dict[str, Any]):
    torch.manual_seed(0)
    mixer = shaken(create("longhorn", d_model=WIDTH, **options).double())
    x = inputs((2, 37, WIDTH), torch.float64)
    u, k, q, beta, z = longhorn_parts(mixer, x)
    h = x.new_zeros(2, mixer.width, mixer.d_state)
    rows = []
    for t in range(x.shape[1]):
        square = k[:, t] ** 2
        eps = beta[:, t] / (1 + beta[:, t] * square.sum(-1, keepdim=True))
        factor = 1 - eps[..., None] * square[:, None]
        assert float(factor.detach().min()) > 0
        assert float(factor.detach().max()) < 1
        h = factor * h + (eps * u[:, t])[..., None] * k[:, t, None]
        rows.append((h * q[:, t, None]).sum(-1) + mixer.D * u[:, t])
    expected = (torch.stack(rows, 1) * z * torch.sigmoid(z)) @ mixer.out_proj.weight.T
    y, state = mixer(x, return_state=True)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state["ssm"], h, rtol=1e-10, atol=1e-12)


def online_solution(u: Tensor, k: Tensor, beta: Tensor, h: Tensor) -> Tensor:
    """What minimises |s - h|^2 + beta (s k - u)^2 over s, by its normal equations, for one token: (E, N)."""
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    left = eye + beta[:, None, None] * torch.outer(k, k)
    return torch.linalg.solve(left, h + (beta * u)[:, None] * k)


@pytest.mark.parametrize("n", [1, 4])
@torch.no_grad()
def test_the_diagonal_of_longhorn_is_exact_for_one_value(n: int):
    torch.manual_seed(0)
    mixer = shaken(create("longhorn", d_model=WIDTH, d_state=n).double())
    x = inputs((1, 37, WIDTH), torch.float64)
    u, k, _, beta, _ = (part[0] for part in longhorn_parts(mixer, x))
    h = x.new_zeros(mixer.width, n)
    for t in range(x.shape[1]):
        h = online_solution(u[t], k[t], beta[t], h)
    state = mixer(x, return_state=True)[1]["ssm"][0]
    error = float((state - h).abs().max() / h.abs().max())
    # for more values the step towards each is taken without the others
    assert error < 1e-12 if n == 1 else error > 1e-6
