"""The layers with a matrix state against the formulas of their papers, written out token by token in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo import create, list_mixers
from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.ops import checks, linear_attention
from seqzoo.testing import inputs

T = 70


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def make(name: str, **options: Any):
    torch.manual_seed(0)
    mixer = create(name, d_model=16, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def convolved(mixer, u: Tensor) -> Tensor:
    taps = mixer.conv1d.weight.shape[-1]
    windows = F.pad(u, (0, 0, taps - 1, 0)).unfold(1, taps, 1)  # (B, T, D, W)
    y = (windows * mixer.conv1d.weight[:, 0]).sum(-1)
    return y if mixer.conv1d.bias is None else y + mixer.conv1d.bias


def queries(mixer, x: Tensor) -> list[Tensor]:
    """q, k and v, ``(B, T, H, .)``, in front of what is the layer's own."""
    qkv = mixer.in_proj(x)
    if mixer.conv1d is not None:
        qkv = convolved(mixer, qkv)
    if (mixer.activation if mixer.conv1d is None else mixer.conv_activation) == "silu":
        qkv = qkv * sigmoid(qkv)
    return [part.unflatten(-1, (mixer.n_heads, -1)) for part in qkv.split(mixer.widths, dim=-1)]


def loop(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | float = 1.0, beta: Tensor | None = None) -> Tensor:
    """``S = decay S + k v^T``, with beta ``S = (I - beta k k^T) decay S + beta k v^T``; ``o = q S``, unscaled."""
    decay = torch.as_tensor(decay, dtype=q.dtype).expand(q.shape)
    S, outputs = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[3], dtype=q.dtype), []
    for t in range(q.shape[1]):
        S = decay[:, t, :, :, None] * S
        key, written = k[:, t], v[:, t]
        if beta is not None:
            written = beta[:, t, :, None] * (written - torch.einsum("bhk,bhkv->bhv", key, S))
        S = S + torch.einsum("bhk,bhv->bhkv", key, written)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outputs, 1)


def finished(mixer, o: Tensor, x: Tensor) -> Tensor:
    """The norm of every head, the gate, the output projection."""
    if mixer.norm is not None:
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    if mixer.gate_proj is not None:
        gate = mixer.gate_proj(x).unflatten(-1, (mixer.n_heads, -1))
        o = o * sigmoid(gate) * (gate if mixer.gate == "silu" else 1)
    return mixer.out_proj(o.flatten(2))


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None, None] * 10000.0 ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle).to(torch.cdouble)
    return torch.cat((turned.real, turned.imag), -1)


def steps(mixer, x: Tensor) -> Tensor:
    """The decay of Gated DeltaNet and KDA."""
    raw = torch.log1p(torch.exp(mixer.decay_proj(x) + mixer.decay.dt_bias)).unflatten(-1, (mixer.n_heads, -1))
    return torch.exp(-torch.exp(mixer.decay.A_log)[:, None] * raw)


def retnet(mixer, x, q, k, v):
    return loop(rotated(q), rotated(k), v, 1 - 2.0 ** (-5 - torch.arange(mixer.n_heads))[:, None].double())


def lightning_attention(mixer, x, q, k, v):
    rate = 2.0 ** (-8 * torch.arange(1, mixer.n_heads + 1, dtype=torch.float64) / mixer.n_heads)
    return loop(q, k, v, torch.exp(-mixer.decay_scale * rate)[:, None])


def gla(mixer, x, q, k, v):
    return loop(q, k, v, sigmoid(mixer.decay_proj(x)).unflatten(-1, (mixer.n_heads, -1)) ** (1 / mixer.gate_power))


def hgrn2(mixer, x, q, k, v):
    f = mixer.lower_bound + (1 - mixer.lower_bound) * sigmoid(k)
    return loop(q * sigmoid(q), 1 - f, v, f)


def delta(mixer, x, q, k, v):
    beta = (2 if mixer.negative_eigenvalues else 1) * sigmoid(mixer.beta_proj(x))
    q, k = (value / value.norm(dim=-1, keepdim=True) for value in (q, k))
    return loop(q, k, v, steps(mixer, x) if hasattr(mixer, "decay") else 1.0, beta)


# the formula, whether outputs are divided by sqrt(K), and options
FORMULAS = {
    "retnet": (retnet, True, ({"n_heads": 2}, {"n_heads": 4, "expand_v": 1, "d_conv": 3, "bias": True})),
    "lightning_attention": (lightning_attention, False, ({"n_heads": 4}, {"n_heads": 2, "decay_scale": 0.3})),
    "gla": (gla, True, ({}, {"n_heads": 2, "gate_rank": 3, "gate_power": 2.0, "d_conv": 2, "bias": True})),
    "hgrn2": (hgrn2, False, ({"n_heads": 2}, {"n_heads": 4, "lower_bound": 0.6, "d_conv": 4})),
    "deltanet": (delta, True, ({"n_heads": 2}, {"negative_eigenvalues": True, "d_conv": None, "bias": True})),
    "gated_deltanet": (delta, True, ({"n_heads": 2}, {"negative_eigenvalues": True, "n_heads": 4, "d_conv": None})),
    "kda": (delta, True, ({"n_heads": 2}, {"negative_eigenvalues": True, "d_conv": None, "bias": True})),
}


@pytest.mark.parametrize(
    ("name", "options"), [(name, one) for name, (_, _, each) in FORMULAS.items() for one in each], ids=str
)
def test_it_is_the_formula_of_the_paper(name: str, options: dict):
    formula, scaled, _ = FORMULAS[name]
    mixer, x = make(name, **options), inputs((2, T, 16), torch.float64)
    q, k, v = queries(mixer, x)
    o = formula(mixer, x, q, k, v) * (q.shape[-1] ** -0.5 if scaled else 1)
    torch.testing.assert_close(mixer(x)[0], finished(mixer, o, x), rtol=1e-10, atol=1e-10)


def features(name: str, x: Tensor) -> Tensor:
    size = x.shape[-1]
    if name == "elu+1":
        return torch.where(x > 0, x + 1, torch.exp(x))
    if name == "relu":
        return x.clamp(min=0)
    if name == "learned":
        e, f = torch.exp(x), torch.exp(-x)
        return torch.cat((e / e.sum(-1, keepdim=True), f / f.sum(-1, keepdim=True)), -1)
    squares = torch.einsum("...i,...j->...ij", x, x).flatten(-2) / math.sqrt(2 * size)
    return torch.cat((torch.ones_like(x[..., :1]), x / size**0.25, squares), -1)


@pytest.mark.parametrize("d_conv", [None, 3])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("feature_map", ["elu+1", "relu", "taylor", "learned"])
def test_linear_attention_is_that_of_its_features(feature_map: str, normalise: bool, d_conv: int | None):
    options = {"feature_map": feature_map, "normalise": normalise, "d_conv": d_conv}
    mixer = make("linear_attention", head_dim=8, bias=True, **options)
    x = inputs((2, T, 16), torch.float64)
    q, k, v = queries(mixer, x)
    if feature_map == "learned":
        q, k = (torch.einsum("bthk,hkl->bthl", value, w) for value, w in zip((q, k), mixer.feature_proj, strict=True))
    q, k = features(feature_map, q), features(feature_map, k)
    o = loop(q, k, v)
    if normalise:
        total = loop(q, k, torch.ones_like(v[..., :1]))
        o = torch.where(total > 0, o / total.clamp(min=1e-300), 0.0)
    else:
        o = o / mixer.features**0.5  # scale-free: a norm follows, whose epsilon alone sees it
    torch.testing.assert_close(mixer(x)[0], finished(mixer, o, x), rtol=1e-10, atol=1e-10)


def test_the_taylor_features_are_the_exponential_to_second_order():
    mixer = make("linear_attention", feature_map="taylor")
    from seqzoo.layers.linear_attention import FEATURE_MAPS

    q, k = (inputs((50, mixer.key_dim), torch.float64, seed=seed) for seed in (1, 2))
    phi, count = FEATURE_MAPS["taylor"]
    s = (q * k).sum(-1) / mixer.key_dim**0.5
    torch.testing.assert_close((phi(q) * phi(k)).sum(-1), 1 + s + s**2 / 2)
    assert phi(q).shape[-1] == count(mixer.key_dim) == mixer.features


def test_hgrn2_is_gated_linear_attention_with_keys_tied_to_the_decay():
    mixer, x = make("hgrn2", n_heads=2), inputs((2, T, 16), torch.float64)
    q, k, v = queries(mixer, x)
    log_decay = F.logsigmoid(k)
    o, S = linear_attention(F.silu(q), 1 - log_decay.exp(), v, log_decay, scale=1.0)
    y, state = mixer(x, return_state=True)
    torch.testing.assert_close(y, finished(mixer, o, x))
    torch.testing.assert_close(state["S"], S)


def test_retnet_keeps_the_decays_of_the_paper_whatever_is_trained():
    """A state alone, without keys, shrinks by ``1 - 2^(-5 - h)`` a token."""
    mixer = make("retnet", n_heads=4)
    assert not any(value.shape == (4,) for value in mixer.state_dict().values())
    state = mixer.init_state(1)
    state["S"] += 1
    _, after = mixer(torch.zeros(1, 10, 16, dtype=torch.float64), state, return_state=True)
    kept = torch.tensor([31 / 32, 63 / 64, 127 / 128, 255 / 256], dtype=torch.float64) ** 10
    torch.testing.assert_close(after["S"], kept[:, None, None].expand(1, 4, 4, 8))
    assert after["position"].tolist() == [10]


def test_beta_of_one_and_unit_keys_overwrite():
    mixer = make("deltanet", n_heads=2, d_conv=None, bias=True)
    torch.nn.init.constant_(mixer.beta_proj.bias, 60.0)
    x, v = torch.zeros(1, 12, 16, dtype=torch.float64), inputs((1, 12, 2, 8), torch.float64)
    # four keys, orthogonal but of any length, each written three times
    keys = 5 * torch.linalg.qr(inputs((8, 8), torch.float64)).Q[:4].repeat(3, 1)
    k = keys[None, :, None].expand(1, 12, 2, 8)
    o, state = mixer.recur(x, k, k, v, None, None)
    torch.testing.assert_close(o * 8**0.5, v)
    read = torch.einsum("nk,bhkv->bnhv", keys[:4] / 5, state["S"])
    torch.testing.assert_close(read, v[:, 8:])


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda"])
def test_negative_eigenvalues_turn_the_sign_of_what_a_key_holds(name: str):
    """beta = 2 reflects the state at every key: that counts parity, which factors between 0 and 1 cannot."""
    mixer = make(name, n_heads=1, d_conv=None, negative_eigenvalues=True, bias=True)
    torch.nn.init.constant_(mixer.beta_proj.bias, 60.0)
    torch.nn.init.zeros_(mixer.beta_proj.weight)
    if name != "deltanet":
        torch.nn.init.constant_(mixer.decay.A_log, -60.0)
    K, V = mixer.key_dim, mixer.value_dim
    key = F.normalize(inputs((K,), torch.float64), dim=0)
    k = key.expand(1, 5, 1, K)
    state = {"S": key[:, None].expand(1, 1, K, V).contiguous()}
    o, after = mixer.recur(inputs((1, 5, 16), torch.float64), k, k, torch.zeros(1, 5, 1, V).double(), state, None)
    signs = torch.tensor([-1.0, 1, -1, 1, -1], dtype=torch.float64)
    torch.testing.assert_close(o * K**0.5, signs[None, :, None, None].expand(1, 5, 1, V))
    torch.testing.assert_close(after["S"], -state["S"])


@pytest.mark.parametrize("d_conv", [None, 3])
@pytest.mark.parametrize(
    ("forget", "enter"),
    [(-30.0, 30.0), (4.0, 0.0), (30.0, -30.0), (-30.0, -30.0), (30.0, 30.0)],
    ids=lambda value: f"{value:g}",
)
def test_mlstm_is_its_recurrence_without_a_stabiliser(forget: float, enter: float, d_conv: int | None):
    mixer = make("mlstm", n_heads=2, d_conv=d_conv)
    H, K = mixer.n_heads, mixer.head_dim
    with torch.no_grad():
        mixer.gates_proj.bias.copy_(torch.tensor([forget] * H + [enter] * H))
        # gates that vary from token to token
        mixer.gates_proj.weight.normal_(std=0.5)
    x = inputs((2, T, 16), torch.float64)
    u, z = mixer.up_proj(x).chunk(2, -1)
    c = u
    if d_conv is not None:
        c = convolved(mixer, u)
        c = c * sigmoid(c)

    def blocks(value: Tensor, weight: Tensor) -> Tensor:
        return value @ torch.block_diag(*weight)

    q, k, v = (blocks(value, weight) for value, weight in zip((c, c, u), mixer.qkv_weight, strict=True))
    gates = mixer.gates_proj(torch.cat((q, k, v), -1))
    q, k, v = (value.unflatten(-1, (H, -1)) for value in (q, k, v))
    # exp(30) is far from what float64 cannot hold
    f, i = sigmoid(gates[..., :H]), torch.exp(gates[..., H:])
    S, n, outputs = torch.zeros(2, H, K, K).double(), torch.zeros(2, H, K).double(), []
    for t in range(T):
        key = i[:, t, :, None] * k[:, t] / K**0.5
        S = f[:, t, :, None, None] * S + torch.einsum("bhk,bhv->bhkv", key, v[:, t])
        n = f[:, t, :, None] * n + key
        bound = (q[:, t] * n).sum(-1, keepdim=True).abs().clamp(min=1)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) / bound)
    h = torch.stack(outputs, 1)
    h = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    expected = mixer.out_proj((h.flatten(2) + mixer.skip * c) * z * sigmoid(z))
    y, state = mixer(x, return_state=True)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    scale = torch.exp(state["m"])
    for ours, theirs in ((scale[..., None, None] * state["S"], S), (scale[..., None] * state["n"], n)):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()
    low, _ = mixer.float()(x.float())
    assert (low - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_mlstm_survives_gates_that_no_exponential_holds():
    mixer = make("mlstm", n_heads=2).float()
    with torch.no_grad():
        mixer.gates_proj.bias.copy_(torch.tensor([-1e4, 5.0, 300.0, -300.0]))
    x = inputs((2, T, 16), torch.float32).requires_grad_()
    y, state = mixer(x, return_state=True)
    gradients = torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])
    assert all(torch.isfinite(value).all() for value in (y, *state.values(), *gradients))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("linear_attention", {"feature_map": "elu"}, r"there is no feature map 'elu'; did you mean relu or elu\+1"),
        (
            "linear_attention",
            {"feature_map": "taylor", "head_dim": 32, "d_model": 64},
            "taylor makes 561 features of heads of 32",
        ),
        ("linear_attention", {"feature_map": "learned", "head_dim": 192, "d_model": 192}, "384 features"),
        ("retnet", {"head_dim": 1}, "rotary positions need an even head_dim, got 1"),
        ("retnet", {"n_heads": 3}, "n_heads must divide the width 16, got 3"),
        ("lightning_attention", {"decay_scale": -1.0}, "decay_scale must not be negative, got -1.0"),
        ("gla", {"gate_power": 0.0}, "gate_power must be a finite number greater than 0, got 0.0"),
        ("gla", {"expand_k": 0.51}, r"expand_k \* d_model must be a positive integer"),
        ("hgrn2", {"lower_bound": 1.0}, "lower_bound must be at least 0 and below 1, got 1.0"),
        ("deltanet", {"head_dim": 5}, "heads must make up the width 16, got head_dim = 5"),
        ("deltanet", {"n_heads": 2, "head_dim": 4}, r"n_heads \* head_dim = 2 \* 4"),
        ("deltanet", {"d_conv": 1}, "d_conv must be an integer from 2 to 8, got 1"),
        ("kda", {"n_heads": 0}, "n_heads must be a positive integer, got 0"),
        ("mlstm", {"block_size": 5}, "block_size must divide the 32 channels, got 5"),
    ],
)
def test_bad_options(name: str, options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        create(name, **({"d_model": 16} | options))


@pytest.mark.parametrize("name", ["deltanet", "kda", "hgrn2", "lightning_attention"])
def test_keys_that_do_not_fit_say_why(name: str):
    with pytest.raises(
        ValueError, match="K must be at most 256, got 320: the kernels hold a whole row of keys on chip"
    ):
        create(name, d_model=320, head_dim=320)


@pytest.mark.parametrize("d_model", [16, 272, 768, 2096, 4096])
def test_defaults_run_at_any_width(d_model: int):
    for name in list_mixers():
        with torch.device("meta"):
            mixer = create(name, d_model=d_model)
            y, _ = mixer(torch.empty(2, 5, d_model))
        assert y.shape == (2, 5, d_model), name


@pytest.mark.parametrize("feature_map", ["elu+1", "relu"])
@torch.no_grad()
def test_float16_over_many_tokens(feature_map: str):
    """The sum of the features leaves its range, and the least denominator too."""
    torch.manual_seed(0)
    mixer = create("linear_attention", d_model=32, feature_map=feature_map, bias=True)
    x = inputs((1, 4096, 32), torch.float32) + 1
    expected = mixer(x)[0]
    y = mixer.half()(x.half())[0].float()
    assert float((y - expected).abs().max()) < 0.01 * float(expected.abs().max())
    mixer.in_proj.bias[:64] = -50.0
    assert not mixer(x.half())[0].isnan().any()


def test_the_decay_of_mlstm_has_a_sign():
    mixer = create("mlstm", d_model=32)
    with torch.no_grad():
        mixer.gates_proj.weight.normal_(std=0.5)
        forget, enter = mixer.gates_proj.bias.chunk(2)
        forget.fill_(3)
        enter.fill_(300)
    with checks():
        mixer(inputs((2, 60, 32), torch.float32))


def check_beginning(name: str, mixer) -> None:
    if name in ("gated_deltanet", "kda"):
        rate, step = mixer.decay.A_log.exp(), F.softplus(mixer.decay.dt_bias)
        assert rate.min() >= 1
        assert rate.max() <= 16.001
        assert step.min() >= 0.00099
        assert step.max() <= 0.1001
    elif name == "mlstm":
        forget, enter = mixer.gates_proj.bias.chunk(2)
        torch.testing.assert_close(forget, torch.linspace(3.0, 6.0, mixer.n_heads))
        assert enter.abs().max() < 1
        assert (mixer.gates_proj.weight == 0).all()
    elif name == "rglru":
        kept = torch.exp(-mixer.c * F.softplus(mixer.Lambda))
        assert kept.min() >= 0.8999
        assert kept.max() <= 0.9991
    elif name == "linear_attention":
        torch.testing.assert_close(mixer.feature_proj, torch.eye(16).expand(2, 4, 16, 16))


@pytest.mark.parametrize("name", ["gated_deltanet", "kda", "mlstm", "rglru", "linear_attention"])
def test_the_beginning_survives_initialising_a_whole_model_again(name: str):
    options = {"feature_map": "learned", "n_heads": 4} if name == "linear_attention" else {}
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LanguageModel(ModelConfig(vocab_size=8, d_model=64, n_layers=2, pattern=[{"name": name, **options}]))
    model.to_empty(device="cpu")
    model.reset_parameters()
    for again in (lambda: None, lambda: model.apply(_reset), model.reset_parameters):
        again()
        for block in model.backbone.blocks:
            check_beginning(name, block.mixer)


def _reset(module: torch.nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
