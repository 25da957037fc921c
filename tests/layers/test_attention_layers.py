"""Attention and sliding window attention: oracles, positions, and the cache and the ring behind a step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqzoo import Packing, create, fork
from seqzoo.modules.rotary import Rotary
from seqzoo.testing import inputs

WIDTH = 32


def build(name: str = "attention", **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return create(name, d_model=WIDTH, **options).double()


def dense(mixer, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The layer by PyTorch's own attention, with a mask and all heads of keys."""
    counts = [mixer.n_heads, mixer.n_kv_heads, mixer.n_kv_heads]
    q, k, v = mixer.in_proj(x).unflatten(-1, (-1, mixer.head_dim)).split(counts, dim=2)
    if mixer.q_norm is not None:
        q, k = (F.rms_norm(t, t.shape[-1:], n.weight, n.eps) for t, n in ((q, mixer.q_norm), (k, mixer.k_norm)))
    if mixer.rotary is not None:
        # as complex numbers
        half = mixer.head_dim // 2
        rates = mixer.rotary.base ** -(torch.arange(half).double() / half)
        turn = torch.polar(torch.ones(()).double(), torch.arange(x.shape[1])[:, None, None] * rates)
        q, k = (torch.cat((y.real, y.imag), -1) for y in (torch.complex(*t.chunk(2, -1)) * turn for t in (q, k)))
    k, v = (t.repeat_interleave(mixer.n_heads // mixer.n_kv_heads, dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden)
    return mixer.out_proj(o.transpose(1, 2).flatten(2))


def distance(total: int) -> torch.Tensor:
    places = torch.arange(total)
    return places[:, None] - places


@pytest.mark.parametrize(
    "options", [{"n_heads": 4}, {"n_heads": 4, "n_kv_heads": 2, "qk_norm": True, "bias": True}, {"rotary_base": None}]
)
def test_layers_are_pytorchs_attention(options):
    x = inputs((2, 30, WIDTH), torch.float64)
    gaps = distance(30)
    for name, own, hidden in (
        ("attention", {}, gaps < 0),
        ("attention", {"causal": False}, gaps > 30),
        ("sliding_window_attention", {"window": 7}, (gaps < 0) | (gaps >= 7)),
    ):
        mixer = build(name, **options, **own)
        torch.testing.assert_close(mixer(x)[0], dense(mixer, x, hidden), rtol=1e-10, atol=1e-12)


def test_sinks_take_a_share_and_caps_bound_scores():
    x = inputs((1, 9, WIDTH), torch.float64)
    plain = build(n_heads=2, rotary_base=None)
    sunk = build(n_heads=2, rotary_base=None, sinks=True)
    sunk.load_state_dict({**plain.state_dict(), "sinks": torch.full((2,), 80.0)})
    assert sunk(x)[0].abs().max() < 1e-20
    sunk.load_state_dict({**plain.state_dict(), "sinks": torch.full((2,), -80.0)})
    torch.testing.assert_close(sunk(x)[0], plain(x)[0])
    capped = build(n_heads=2, rotary_base=None, logit_cap=1e-9)
    capped.load_state_dict(plain.state_dict())
    values = capped.in_proj(x)[..., -WIDTH:]
    means = values.cumsum(1) / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(capped(x)[0], capped.out_proj(means), rtol=1e-7, atol=1e-9)


def test_rotary_scaling_is_that_of_transformers():
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    theirs = {
        "linear": {"rope_type": "linear", "factor": 4.0},
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    }
    ours = {
        "linear": {"factor": 4},
        "llama3": {"factor": 8, "original": 64},
        "yarn": {"factor": 4, "original": 64},
    }
    for kind, options in theirs.items():
        config = transformers.LlamaConfig(
            hidden_size=64,
            num_attention_heads=2,
            max_position_embeddings=256,
            rope_parameters={"rope_theta": 1e4, **options},
        )
        rates, growth = rope.ROPE_INIT_FUNCTIONS[options["rope_type"]](config, torch.device("cpu"))
        rotary = Rotary(32, scaling={"kind": kind, **ours[kind]})
        torch.testing.assert_close(rotary.rates(torch.device("cpu")), rates.double(), rtol=1e-5, atol=1e-9)
        assert rotary.growth() == pytest.approx(growth)


def test_ntk_scaling_keeps_the_shortest_wavelength_and_stretches_the_longest():
    device = torch.device("cpu")
    plain, scaled = Rotary(32).rates(device), Rotary(32, scaling={"kind": "ntk", "factor": 4}).rates(device)
    assert scaled[0] == plain[0]
    torch.testing.assert_close(scaled[-1], plain[-1] / 4)


def test_rotary_scores_depend_on_the_distance_alone():
    rotary = Rotary(8)
    q, k = inputs((1, 1, 1, 8), torch.float64), inputs((1, 1, 1, 8), torch.float64, seed=5)
    scores = [(rotary(q, torch.tensor([[at + 3]])) * rotary(k, torch.tensor([[at]]))).sum() for at in (0, 17, 100_000)]
    assert max(scores) - min(scores) < 1e-9


# -- the cache --


@torch.no_grad()
def test_without_gradients_a_cache_is_written_in_place_and_doubles():
    mixer = build(n_heads=2)
    x = inputs((2, 60, WIDTH), torch.float64)
    whole = mixer(x)[0]
    _, state = mixer(x[:, :3], return_state=True)
    outputs, places = [], []
    for token in x[:, 3:].unbind(1):
        y, state = mixer.step(token, state)
        outputs.append(y)
        places.append((state["k"].data_ptr(), state["k"].shape[1]))
    torch.testing.assert_close(torch.stack(outputs, 1), whole[:, 3:])
    # 3, then 16, 32 and 64 places, and no copy between
    assert sorted({capacity for _, capacity in places}) == [16, 32, 64]
    assert len(set(places)) == 3
    # head by head, as attention reads them
    assert state["k"].transpose(1, 2).is_contiguous()
    assert state["v"].transpose(1, 2).is_contiguous()
    assert state["length"].tolist() == [60, 60]
    assert not state["k"][:, 60:].any()


def test_with_gradients_a_state_stays_as_it_was():
    mixer = build(n_heads=2)
    x = inputs((1, 8, WIDTH), torch.float64)
    _, state = mixer(x[:, :4], return_state=True)
    before = {name: value.clone() for name, value in state.items()}
    first, _ = mixer.step(x[:, 4], state)
    second, _ = mixer.step(x[:, 4], state)
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], state[name]) for name in state)


def test_a_state_of_inference_mode_continues_outside_it():
    mixer = build(n_heads=2)
    x = inputs((1, 6, WIDTH), torch.float64)
    with torch.inference_mode():
        _, state = mixer(x[:, :4], return_state=True)
        _, state = mixer.step(x[:, 4], state)
    with torch.no_grad():
        y, _ = mixer.step(x[:, 5], state)
    torch.testing.assert_close(y, mixer(x)[0][:, 5])


@torch.no_grad()
def test_rows_of_unequal_length_decode_as_alone():
    mixer = build(n_heads=4, n_kv_heads=2)
    lengths = (5, 0, 17, 1)
    x = inputs((1, sum(lengths), WIDTH), torch.float64)
    _, state = mixer(x, cu_seqlens=Packing.from_lengths(lengths), return_state=True)
    tokens = inputs((4, 3, WIDTH), torch.float64, seed=4)
    alone = []
    for row, one in enumerate(x.split(lengths, 1)):
        alone.append(mixer(torch.cat((one, tokens[row : row + 1]), 1))[0][:, -3:])
    copies = fork(state, 2)
    outputs = []
    for token in tokens.unbind(1):
        y, state = mixer.step(token, state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), torch.cat(alone))
    twice, _ = mixer(tokens.repeat_interleave(2, 0), copies, return_state=True)
    torch.testing.assert_close(twice[1::2], torch.cat(alone))


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention", "sliding_window_attention"])
def test_a_cache_of_the_length_it_says(name):
    mixer = build(name, n_heads=2, **({"window": 6} if name.startswith("sliding") else {}))
    for length in (1, 2, 9):
        size = mixer.state_size(length)
        _, state = mixer(inputs((3, length, WIDTH), torch.float64), return_state=True)
        assert size * 3 == sum(value.numel() for value in state.values())


@torch.no_grad()
def test_a_ring_keeps_its_size_and_sees_its_window():
    mixer = build("sliding_window_attention", window=5, n_heads=2)
    x = inputs((1, 40, WIDTH), torch.float64)
    state = mixer.init_state(1)
    for at, token in enumerate(x.unbind(1)):
        y, state = mixer.step(token, state)
        assert state["k"].shape == (1, 5, 2, 16)
        if at >= 5:
            # a sequence that begins inside the window differs by what its first tokens do not see
            assert not torch.allclose(y, mixer(x[:, at - 3 : at + 1])[0][:, -1])
    torch.testing.assert_close(y, mixer(x)[0][:, -1])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("attention", {"n_heads": 5}, "n_heads must divide the width 32, got 5"),
        ("attention", {"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads must divide the 4 heads, got 3"),
        ("attention", {"n_kv_heads": 0}, "n_kv_heads must be a positive integer, got 0"),
        ("attention", {"head_dim": 1}, "rotary positions need an even head_dim, got 1"),
        ("attention", {"rotary_base": -1}, "rotary_base must be a finite number greater than 1"),
        ("attention", {"rotary_base": None, "rotary_scaling": {"kind": "linear"}}, "needs a rotary_base"),
        ("attention", {"rotary_scaling": {"kind": "yarm", "factor": 2}}, "did you mean yarn"),
        ("attention", {"rotary_scaling": {"kind": "yarn", "factor": 2, "orignal": 3}}, "did you mean original"),
        ("attention", {"rotary_scaling": {"kind": "yarn"}}, "a factor of at least 1, got None"),
        ("attention", {"rotary_scaling": {"kind": "llama3", "factor": 2, "low": 9}}, "bounds that ascend"),
        ("attention", {"logit_cap": 0}, "logit_cap must be a finite number greater than 0, got 0"),
        ("attention", {"sinks": 1}, "sinks must be True or False, got 1"),
        ("attention", {"causal": "no"}, "causal must be True or False"),
        ("sliding_window_attention", {"window": 0}, "window must be a positive integer, got 0"),
    ],
)
def test_bad_options(name, options, words):
    with pytest.raises(ValueError, match=words):
        build(name, **options)


def test_a_scaling_that_is_no_mapping():
    with pytest.raises(TypeError, match="rotary_scaling must be a mapping or None, got 4"):
        build(rotary_scaling=4)


def test_a_cache_that_a_gradient_needs_is_not_written_in_place():
    mixer = build(n_heads=2, sinks=True).requires_grad_(False)
    mixer.sinks.requires_grad_()
    x = inputs((2, 12, WIDTH), torch.float64)
    whole = torch.autograd.grad(mixer(x)[0].sum(), mixer.sinks)[0]
    total, state = mixer(x[:, :3], return_state=True)
    total = total.sum()
    for t in range(3, 12):
        y, state = mixer(x[:, t : t + 1], state, return_state=True)
        total = total + y.sum()
    torch.testing.assert_close(torch.autograd.grad(total, mixer.sinks)[0], whole, rtol=1e-9, atol=1e-11)


def test_a_step_under_autocast_writes_into_the_cache():
    mixer = build(n_heads=2).float()
    x = inputs((2, 40, WIDTH), torch.float32)
    places = set()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        whole, state = mixer(x[:, :8], return_state=True)[0], mixer(x[:, :8], return_state=True)[1]
        assert state["k"].dtype == torch.float32
        parts = [whole]
        for t in range(8, 40):
            y, state = mixer.step(x[:, t], state)
            places.add(state["k"].data_ptr())
            parts.append(y[:, None])
        expected = mixer(x)[0]
    # doubled at 9 and 17 tokens and 33
    assert len(places) == 3
    torch.testing.assert_close(torch.cat(parts, 1).float(), expected.float(), rtol=0.05, atol=0.05)
