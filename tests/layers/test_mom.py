"""Mixture of memories: its core where there is one memory, its equations token by token, its routing and its loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqzoo
from seqzoo import SequenceMixer, create
from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.modules.routing import BLOCK, PartLinear, Router, Streams
from seqzoo.testing import boundaries, inputs, random_state

WIDTH = 16
CORES: dict[str, dict[str, Any]] = {
    "gated_deltanet": {"n_heads": 2, "bias": True},
    "deltanet": {"n_heads": 2, "d_conv": None},
    "kda": {"n_heads": 2},
    "gla": {"n_heads": 2, "bias": True, "d_conv": 3},
    "hgrn2": {"n_heads": 2},
    "retnet": {"n_heads": 2},
    "lightning_attention": {"n_heads": 2},
    "linear_attention": {"n_heads": 2, "feature_map": "learned", "bias": True},
}


def build(core: str = "gated_deltanet", **options: Any) -> SequenceMixer:
    """A mixture in float64 whose every parameter counts."""
    torch.manual_seed(0)
    given = CORES.get(core, {})
    mixer = create("mixture_of_memories", d_model=WIDTH, core={"name": core, **given}, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return mixer


def own_maps(core: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear maps of the tokens, besides q, k and v, that a memory has to itself, in order."""
    for name, child in core.named_children():
        first = child[0] if isinstance(child, nn.Sequential) else child
        if isinstance(first, nn.Linear) and name not in ("in_proj", "gate_proj", "out_proj"):
            yield f"{name}.0" if isinstance(child, nn.Sequential) else name, first


@torch.no_grad()
def memory_of(mixer: SequenceMixer, core: str, index: int) -> SequenceMixer:
    """The base layer with the weights of one memory."""
    base = create(core, d_model=WIDTH, **CORES[core]).double()
    parts = dict(mixer.core.named_parameters())
    for name, parameter in base.named_parameters():
        if name in parts:
            parameter.copy_(parts[name])
    for kind in ("weight", "bias"):
        own = getattr(mixer.memory_proj, kind)
        if own is None:
            continue
        getattr(base.in_proj, kind).copy_(torch.cat((getattr(mixer.q_proj, kind), own[index, : mixer.key_values])))
        place = mixer.key_values
        for _, linear in own_maps(base):
            if getattr(linear, kind) is None:
                linear.register_parameter(kind, nn.Parameter(torch.zeros(linear.out_features, dtype=torch.float64)))
            getattr(linear, kind).copy_(own[index, place : place + linear.out_features])
            place += linear.out_features
        assert place == own.shape[1]
    return base


def by_tokens(mixer: SequenceMixer, core: str, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The docstring, token by token: each chosen memory reads the token and is written; the others stay."""
    memories = [memory_of(mixer, core, index) for index in range(mixer.n_parts)]
    probabilities = (x @ mixer.router.weight.T).softmax(-1)
    rows, finals = [], []
    for row in range(x.shape[0]):
        states = [memory.init_state(1) for memory in memories]
        outputs = []
        for t in range(x.shape[1]):
            token, p = x[row : row + 1, t : t + 1], probabilities[row, t]
            chosen = sorted(range(mixer.n_memories), key=lambda m: -float(p[m]))[: mixer.router.top_k]
            weights = [(m, p[m] / sum(p[n] for n in chosen)) for m in chosen]
            weights += [(mixer.n_memories, 1.0)] if mixer.shared_memory else []
            read = torch.zeros(())
            for m, weight in weights:
                memory = memories[m]
                o, states[m] = memory.remember(token, memory.in_proj(token), states[m], None)
                read = read + weight * o
            outputs.append(memories[0].read(token, read))
        rows.append(torch.cat(outputs, 1))
        finals.append({key: torch.cat([state[key] for state in states]) for key in states[0]})
    return torch.cat(rows), {key: torch.stack([one[key] for one in finals]) for key in finals[0]}


@pytest.mark.parametrize("core", CORES)
def test_one_memory_is_the_core(core: str):
    mixer = build(core, n_memories=1, top_k=1, shared_memory=False)
    base, x = memory_of(mixer, core, 0), inputs((2, 37, WIDTH), torch.float64)
    (y, state), (expected, wanted) = (one(x, return_state=True) for one in (mixer, base))
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    assert state.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(state[key][:, 0], value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("options", [{}, {"n_memories": 3, "top_k": 1, "shared_memory": False}], ids=str)
@torch.no_grad()
def test_it_is_its_equations_token_by_token(core: str, options: dict[str, Any]):
    mixer, x = build(core, **options), inputs((2, 9, WIDTH), torch.float64)
    y, state = mixer(x, return_state=True)
    expected, wanted = by_tokens(mixer, core, x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    for key, value in wanted.items():
        torch.testing.assert_close(state[key], value, rtol=1e-11, atol=1e-12)


def test_packed_documents_are_documents_one_by_one():
    lengths = [7, 0, 1, 200, 33, 0]
    mixer, x = build(), inputs((1, sum(lengths), WIDTH), torch.float64).requires_grad_()
    state = {key: value.requires_grad_() for key, value in random_state(mixer, len(lengths), x).items()}
    y, final = mixer(x, state, cu_seqlens=boundaries(lengths), return_state=True)
    pieces, states = [], []
    for index, (start, end) in enumerate(itertools.pairwise(boundaries(lengths).tolist())):
        one, after = mixer(
            x[:, start:end], {key: value[index : index + 1] for key, value in state.items()}, return_state=True
        )
        pieces.append(one)
        states.append(after)
    wanted = {"y": torch.cat(pieces, 1)} | {key: torch.cat([one[key] for one in states]) for key in states[0]}
    sources = [x, *state.values(), *mixer.parameters()]
    losses = [
        sum((value * inputs(tuple(value.shape), torch.float64, seed=i)).sum() for i, value in enumerate(found.values()))
        for found in ({"y": y, **final}, wanted)
    ]
    for one, other in zip(*(torch.autograd.grad(loss, sources) for loss in losses), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))
    for key, value in {"y": y, **final}.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-10, atol=1e-11)


def test_what_is_not_chosen_keeps_its_state_and_its_gradient():
    mixer = build("kda", n_memories=3, shared_memory=False, top_k=1)
    x = inputs((1, 1, WIDTH), torch.float64)
    state = {key: value.requires_grad_() for key, value in random_state(mixer, 1, x).items()}
    chosen = int((x[0, 0] @ mixer.router.weight.T).argmax())
    _, final = mixer(x, state, return_state=True)
    for key, value in state.items():
        kept = [index for index in range(3) if torch.equal(final[key][:, index], value[:, index])]
        assert kept == [index for index in range(3) if index != chosen], key
        (gradient,) = torch.autograd.grad(final[key].sum(), value, retain_graph=True)
        assert torch.equal(gradient[:, kept], torch.ones_like(gradient[:, kept]))


def imbalance(probabilities: Tensor, top_k: int) -> Tensor:
    """Of one sequence, ``(T, M)``."""
    memories = probabilities.shape[1]
    chosen = F.one_hot(probabilities.topk(top_k).indices, memories).sum(1)
    shares = chosen.double().mean(0) / top_k
    return memories * (shares * probabilities.mean(0)).sum()


def test_the_loss_and_its_gradient():
    mixer, x = build(), inputs((3, 20, WIDTH), torch.float64).requires_grad_()
    *_, loss = mixer(x, return_auxiliary=True)
    expected = torch.stack([imbalance((row @ mixer.router.weight.T).softmax(-1), 2) for row in x]).mean()
    torch.testing.assert_close(loss, expected)
    sources = [x, mixer.router.weight]
    for one, other in zip(*(torch.autograd.grad(value, sources) for value in (loss, expected)), strict=True):
        assert float(other.abs().max()) > 0
        torch.testing.assert_close(one, other)
    lengths = [9, 0, 41, 10]
    *_, packed = mixer(x.reshape(1, 60, WIDTH), cu_seqlens=boundaries(lengths), return_auxiliary=True)
    alone = [
        imbalance((one @ mixer.router.weight.T).softmax(-1), 2) * len(one)
        for one in x.flatten(0, 1).split(lengths)
        if len(one)
    ]
    torch.testing.assert_close(packed, torch.stack(alone).sum() / 60)
    assert not mixer(x[:, :0], return_auxiliary=True)[2].any()


def test_the_loss_is_one_where_shares_are_equal_and_grows_to_the_number_of_memories():
    mixer = build(n_memories=4, top_k=1)
    with torch.no_grad():
        mixer.router.weight.copy_(torch.eye(4, WIDTH))
    even = torch.eye(4, WIDTH, dtype=torch.float64).repeat(3, 1)[None]
    one = even[:, :1].expand(1, 12, WIDTH)
    for scale in (0.1, 1.0, 50.0):
        torch.testing.assert_close(mixer(even * scale, return_auxiliary=True)[2], torch.ones(()).double())
    torch.testing.assert_close(mixer(one * 50.0, return_auxiliary=True)[2], torch.full((), 4.0).double())


def test_the_loss_enters_a_model():
    config = ModelConfig(vocab_size=9, d_model=16, n_layers=2, pattern="mixture_of_memories", mlp="none")
    torch.manual_seed(0)
    model = LanguageModel(config).double()
    ids = torch.arange(18).view(2, 9) % 9
    without = LanguageModel(ModelConfig(**{**config.to_dict(), "auxiliary_weight": 0.0})).double()
    without.load_state_dict(model.state_dict())
    difference = float((model.loss(ids, ids) - without.loss(ids, ids)).detach())
    assert config.auxiliary_weight == 0.01
    # at the beginning the memories are nearly balanced
    assert 0.015 < difference < 0.03


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "counts", [(3, 0, 5, 1), (0, 0, 2 * BLOCK, 0), (BLOCK + 1, BLOCK, 7, 0), (0, 0, 0, 0)], ids=str
)
@pytest.mark.parametrize("width", [5, 16])
def test_a_linear_map_a_part(width: int, counts: tuple[int, ...], dtype: torch.dtype, monkeypatch):
    """In blocks, and of whole 16 bytes by PyTorch's grouped product, which has no float64."""
    torch.manual_seed(0)
    grouped = []
    monkeypatch.setattr(
        nn.functional,
        "grouped_mm",
        lambda *a, product=nn.functional.grouped_mm, **k: grouped.append(1) or product(*a, **k),
    )
    maps = PartLinear(8, width, 4, bias=True)
    maps.reset_parameters()
    nn.init.normal_(maps.bias)
    maps.to(dtype)
    choices = torch.cat([torch.full((count, 1), part) for part, count in enumerate(counts)])
    choices = choices[torch.randperm(len(choices))]
    x = inputs((len(choices), 8), dtype).requires_grad_()
    streams = Streams.of(choices, 4, torch.zeros(len(choices), dtype=torch.int64), 1)
    assert streams.bounds.tolist() == [0, *itertools.accumulate(counts)]
    y = maps(x, streams)
    assert bool(grouped) == (width == 16 and dtype != torch.float64 and len(choices) > 0)
    part = choices[streams.source, 0]
    expected = torch.einsum("nd,ned->ne", x[streams.source], maps.weight[part]) + maps.bias[part]
    sources = [x, maps.weight, maps.bias]
    weight = inputs(tuple(y.shape), dtype, seed=3)
    tolerance = 8 * torch.finfo(dtype).eps
    pairs = zip(*(torch.autograd.grad((o * weight).sum(), sources) for o in (y, expected)), strict=True)
    for one, other in ((y, expected), *pairs):
        scale = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=8 * tolerance * scale)


def test_streams_keep_the_order_of_time():
    torch.manual_seed(0)
    sequence = torch.tensor([0] * 5 + [2] * 4)
    choices = torch.stack([torch.randperm(3)[:2] for _ in range(9)])
    streams = Streams.of(choices, 3, sequence, 3)
    expected = [
        [t for t in range(9) if sequence[t] == s and part in choices[t].tolist()] for part in range(3) for s in range(3)
    ]
    assert [streams.source[a:b].tolist() for a, b in itertools.pairwise(streams.packing.bounds())] == expected
    x = torch.randn(9, 4, requires_grad=True)
    back = streams.gather(streams.spread(x), torch.full((9, 2), 0.5))
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(torch.autograd.grad(back.sum(), x)[0], torch.ones(9, 4))


def test_equal_probabilities_go_to_the_first():
    router = Router(4, 5, 2)
    router.reset_parameters()
    choices, weights, _ = router(torch.zeros(3, 4))
    assert choices.tolist() == [[0, 1]] * 3
    assert torch.equal(weights, torch.full((3, 2), 0.5))


def test_narrow_floats_choose_as_wide_ones():
    torch.manual_seed(0)
    router = Router(64, 8, 2)
    router.reset_parameters()
    x = torch.randn(500, 64).bfloat16()
    wide = router.bfloat16()(x.double())[0]
    assert torch.equal(router(x)[0], wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.float()(x.float())[0], wide)


def test_more_memories_cost_no_more():
    few, many = (create("mixture_of_memories", d_model=64, n_memories=n) for n in (4, 64))
    assert many.memory_proj.weight.numel() == 13 * few.memory_proj.weight.numel()
    router = 2 * 100 * 60 * 64
    assert abs(many.flops(100) - few.flops(100) - router) <= 1


def test_options_and_state_travel():
    core = {"name": "gla", "n_heads": 2}
    config = ModelConfig(vocab_size=9, d_model=16, n_layers=1, pattern=[{"name": "mixture_of_memories", "core": core}])
    assert ModelConfig.from_dict(config.to_dict()) == config
    model = LanguageModel(config)
    assert core == {"name": "gla", "n_heads": 2}
    assert model.backbone.blocks[0].mixer.init_state(3)["S"].shape == (3, 5, 2, 4, 8)
    groups = seqzoo.parameter_groups(
        create("mixture_of_memories", d_model=16, core={"name": "gated_deltanet", "bias": True}), 1.0, 0.1
    )
    kept = {name for group in groups if group["weight_decay"] == 0 for name in group["names"]}
    assert {"memory_proj.bias", "core.decay.A_log", "core.decay.dt_bias", "q_proj.bias"} <= kept
    assert not {"memory_proj.weight", "router.weight"} & kept


def test_nothing_of_the_routing_is_read_on_the_host():
    """On the meta device there is nothing to read."""
    with torch.device("meta"):
        mixer = build().float()
        for options in ({}, {"cu_seqlens": torch.empty(3, dtype=torch.int32)}):
            y, state = mixer(torch.empty(1, 6, WIDTH), return_state=True, **options)
            assert y.shape == (1, 6, WIDTH)
            assert state["S"].shape[0] == (2 if options else 1)


def test_a_batch_of_none():
    mixer = build()
    y, state = mixer(inputs((0, 4, WIDTH), torch.float64), mixer.init_state(0), return_state=True)
    assert y.shape == (0, 4, WIDTH)
    assert all(value.shape[0] == 0 for value in state.values())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"top_k": 5}, ValueError, "a token can go to at most all 4 parts, got top_k = 5"),
        ({"top_k": 0}, ValueError, "top_k must be a positive integer, got 0"),
        ({"n_memories": 0}, ValueError, "n_memories must be a positive integer, got 0"),
        ({"n_memories": True, "top_k": 1}, ValueError, "must be a positive integer, got True"),
        ({"core": "gated_delta"}, ValueError, "keys and values of every head, got 'gated_delta'; did you mean"),
        ({"core": "min_gru"}, ValueError, "every head, got 'min_gru'; known are deltanet, gated_deltanet, gla"),
        (
            {"core": "prefix_linear_attention"},
            ValueError,
            "got 'prefix_linear_attention'; did you mean linear_attention",
        ),
        ({"core": "mixture_of_memories"}, ValueError, "core must be a mixer with keys"),
        ({"core": {"n_heads": 2}}, ValueError, "core must be a mixer .* got None"),
        ({"core": {"name": "gla", "heads": 2}}, TypeError, "gla has no option 'heads'; did you mean n_heads"),
        ({"core": {"name": "gla", "d_model": 32}}, ValueError, "d_model belongs to the mixture, not to its core"),
        ({"core": 3}, TypeError, "core must be a name or a mapping with a name and options, got 3"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        create("mixture_of_memories", d_model=16, **options)
