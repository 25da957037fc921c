"""Arrangements of blocks: MLPs a layer, mixers in parallel, shared blocks, experts; and the named models."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import seqzoo
from seqzoo import LimitError, Packing, create, list_mixers
from seqzoo.hub import from_pretrained, save_pretrained
from seqzoo.hub.saving import read_tensors
from seqzoo.mixer import registration
from seqzoo.models import Backbone, Block, LanguageModel, ModelConfig, ParallelMixers, generate, presets
from seqzoo.models.config import OF_BLOCK
from seqzoo.modules.experts import Experts
from seqzoo.modules.mlp import MLP
from seqzoo.testing import PlainMixer

Build = Callable[..., LanguageModel]
Tokens = Callable[..., torch.Tensor]

LOCAL = {"name": "sliding_window_attention", "window": 3}
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "interleaved": {"pattern": ["mamba", "attention"]},
    "mlps": {"pattern": [{"name": "mamba", "mlp": "none"}, LOCAL | {"mlp": "experts"}, "min_gru"], "n_layers": 3},
    "parallel": {"pattern": [{"parallel": ["attention", {"name": "mamba", "expand": 1}, LOCAL]}]},
    "shared": {
        "pattern": [{"name": "mamba2", "mlp": "none"}, {"name": "attention", "shared": "global"}],
        "n_layers": 4,
    },
    "shared parallel": {"pattern": {"parallel": [LOCAL, "min_gru"], "shared": "a", "mlp": "plain"}, "n_layers": 3},
    "experts": {"pattern": "min_gru", "mlp": "experts", "n_experts": 5, "top_k": 3, "mlp_ratio": 1.0},
}
ARRANGEMENTS["shared parallel"]["pattern"] = [ARRANGEMENTS["shared parallel"]["pattern"]]


@pytest.fixture(params=ARRANGEMENTS)
def arrangement(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ARRANGEMENTS[request.param]


def assert_near(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


# -- every arrangement --


def test_it_travels_through_json(arrangement: dict[str, Any]):
    config = ModelConfig(**{"vocab_size": 9, "d_model": 16, "n_layers": 2, **arrangement})
    assert ModelConfig.from_json(config.to_json()) == config


def test_it_trains(arrangement: dict[str, Any], build: Build, tokens: Tokens):
    model, ids, labels = build(**arrangement).train(), tokens(2, 9), tokens(2, 9, seed=1)
    optimizer = torch.optim.AdamW(seqzoo.parameter_groups(model, 3e-3))
    losses = []
    for _ in range(4):
        loss = model.loss(ids, labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < losses[0] - 0.01


def test_decoding_is_prefill(arrangement: dict[str, Any], build: Build, tokens: Tokens):
    model, ids = build(**arrangement), tokens(2, 9)
    whole, _ = model(ids)
    _, state = model.prefill(ids[:, :4])
    for index in range(4, 9):
        logits, state = model.step(ids[:, index], state)
        assert_near(logits, whole[:, index])
    assert generate(model, ids, 3, temperature=0).shape == (2, 3)


def test_packed_is_separate(arrangement: dict[str, Any], build: Build, tokens: Tokens):
    model, ids, lengths = build(**arrangement), tokens(1, 12), [4, 1, 0, 7]
    _, before = model(tokens(4, 2, seed=1), return_state=True)
    logits, after = model(ids, before, cu_seqlens=Packing.from_lengths(lengths), return_state=True)
    again = tokens(4, 1, seed=2)
    continued, _ = model(again, after)
    for index, (start, length) in enumerate(zip((0, 4, 5, 5), lengths, strict=True)):
        own = [{key: value[index : index + 1] for key, value in one.items()} for one in before]
        alone, own = model(ids[:, start : start + length], own, return_state=True)
        assert_near(logits[:, start : start + length], alone)
        assert_near(continued[index : index + 1], model(again[index : index + 1], own)[0])


def test_it_saves_and_loads(arrangement: dict[str, Any], build: Build, tokens: Tokens, tmp_path: Path):
    model = build(**arrangement)
    save_pretrained(model, tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again(tokens(2, 5))[0], model(tokens(2, 5))[0])
    stored = read_tensors(tmp_path / "model" / "model.safetensors")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sum(tensor.numel() for tensor in stored.values()) == parameters + sum(b.numel() for b in model.buffers())
    other = LanguageModel(model.config).double()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens(2, 5))[0], model(tokens(2, 5))[0])


def test_it_is_initialised_from_the_meta_device(arrangement: dict[str, Any]):
    config = ModelConfig(**{"vocab_size": 9, "d_model": 16, "n_layers": 2, **arrangement})
    torch.manual_seed(0)
    expected = LanguageModel(config)
    torch.manual_seed(0)
    expected.reset_parameters()
    with torch.device("meta"):
        model = LanguageModel(config)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.reset_parameters()
    for (name, one), (_, other) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_the_state_has_the_size_that_is_told(arrangement: dict[str, Any], build: Build, tokens: Tokens):
    model = build(**arrangement, max_positions=20)
    for length in (2, 11):
        _, state = model.prefill(tokens(1, length))
        assert sum(value.numel() for one in state for value in one.values()) == model.state_size(length)


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": [{"parallel": ["min_gru", "mamba2"]}, {"name": "mamba", "mlp": "none"}]},
        {"pattern": [{"name": "min_gru", "shared": "a", "mlp": "experts"}], "n_layers": 2},
        {"pattern": "mamba", "checkpoint_blocks": True},
        {"pattern": "min_gru", "mlp_chunk_size": 4},
    ],
)
def test_it_compiles(options: dict[str, Any], build: Build, tokens: Tokens):
    torch._dynamo.reset()
    model, ids, labels = build(**options).train(), tokens(2, 9), tokens(2, 9, seed=1)
    # PyTorch 2.13 cannot trace a second checkpoint of a dynamic size
    dynamic = "mlp_chunk_size" not in options
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    loss, expected = compiled(ids, labels), model.loss(ids, labels)
    assert_near(loss, expected)
    parameters = list(model.parameters())
    assert_near(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))
    torch._dynamo.reset()


def test_a_hybrid_decodes_in_an_eighth_of_the_memory(build: Build, tokens: Tokens):
    attention = {"name": "attention", "n_heads": 4}
    sizes = {}
    for name, pattern in (("hybrid", ["mamba"] * 7 + [attention]), ("attention", [attention])):
        model = LanguageModel(ModelConfig(vocab_size=23, d_model=256, n_layers=8, pattern=pattern))
        sizes[name] = model.state_size(2**14)
        # the formula is that of real tensors
        _, state = model.prefill(tokens(1, 5))
        assert sum(value.numel() for one in state for value in one.values()) == model.state_size(5)
        by_kind = [
            sum(value.numel() for value in one.values()) for one in model.init_state(1) if one.keys() != {"k", "v"}
        ]
        assert sum(by_kind) == model.state_size(0)
    assert sizes["attention"] > 8 * 2 * 2**14 * 256
    assert 0.125 < sizes["hybrid"] / sizes["attention"] <= 0.15


# -- an MLP a layer --


def test_every_layer_has_its_mlp():
    entries = ["mamba", {"name": "mamba", "mlp": "none"}, {"name": "attention", "mlp": "experts", "n_heads": 2}]
    config = ModelConfig(vocab_size=9, d_model=16, n_layers=4, pattern=entries, mlp="plain", n_experts=3, top_k=1)
    backbone = Backbone(config)
    kinds = [type(block.mlp) for block in backbone.blocks]
    assert kinds == [MLP, type(None), Experts, MLP]
    # as many branches as there are, in all output projections
    assert {block.branches for block in backbone.blocks} == {7}
    assert backbone.blocks[2].mlp.router.extra_repr() == "16, n_parts=3, top_k=1"


def test_no_mixer_has_an_option_that_an_entry_means_otherwise():
    for name in list_mixers():
        assert not {*OF_BLOCK, "parallel", "name"} & set(inspect.signature(registration(name).mixer).parameters)


# -- in parallel --


def test_parallel_mixers_are_their_formula():
    mixers = [create("min_gru", d_model=16), create("mamba", d_model=16)]
    parallel = ParallelMixers(mixers).double()
    with torch.no_grad():
        for norm in parallel.norms:
            norm.weight.uniform_(0.5, 2)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    expected = 0
    for mixer, norm in zip(mixers, parallel.norms, strict=True):
        y = mixer(x)[0]
        expected = expected + norm.weight * y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() / 2
    assert_near(parallel(x)[0], expected)
    _, state = parallel(x, return_state=True)
    assert set(state) == {"0.h", "1.conv", "1.ssm"}
    _, alone = mixers[1](x, return_state=True)
    assert_near({"conv": state["1.conv"], "ssm": state["1.ssm"]}, alone)
    assert parallel.state_size(9) == sum(mixer.state_size(9) for mixer in mixers)
    assert parallel.flops(9) == sum(mixer.flops(9) for mixer in mixers)


def test_parallel_auxiliary_losses_add_up():
    parallel = ParallelMixers([PlainMixer(16), create("min_gru", d_model=16), PlainMixer(16)])
    x = torch.randn(2, 7, 16)
    *_, loss = parallel(x, return_auxiliary=True)
    assert_near(loss, sum(parallel.mixers[index](x, return_auxiliary=True)[2] for index in (0, 2)))
    assert parallel.to(torch.bfloat16).mixers[0].decay.dtype == torch.float32


def test_parallel_mixers_have_the_limits_of_each():
    backward = create("attention", d_model=16, causal=False)
    parallel = ParallelMixers([create("mamba", d_model=16), backward])
    assert parallel.limits.keys() == backward.limits.keys()
    x = torch.randn(1, 5, 16)
    assert parallel(x)[0].shape == x.shape
    for call in (
        lambda: parallel.step(x[:, 0], {}),
        lambda: parallel(x, return_state=True),
        lambda: parallel.init_state(1),
    ):
        with pytest.raises(
            LimitError, match=r"ParallelMixers has no .*: Attention: an output depends on the tokens af"
        ):
            call()
    assert not parallel.discontinuous
    routed = create("mixture_of_memories", d_model=16)
    assert ParallelMixers([create("mamba", d_model=16), routed]).discontinuous
    assert not ParallelMixers.discontinuous


def test_the_scales_of_parallel_mixers_start_small_in_deep_models():
    pattern = [{"parallel": ["mamba", "attention"]}]
    backbone = Backbone(ModelConfig(vocab_size=9, d_model=16, n_layers=8, pattern=pattern))
    for block in backbone.blocks:
        assert {type(one).__name__ for one in block.output_projections()} == {"RMSNorm", "Linear"}
        assert len(block.output_projections()) == 3
        for norm in block.mixer.norms:
            assert_near(norm.weight, torch.full((16,), 0.25))
        # the mixers' own stay as they are: PyTorch's initialisation is uniform within fan_in ** -0.5
        assert block.mixer.mixers[1].out_proj.weight.abs().max() > 0.2
        assert block.mlp.out_proj.weight.abs().max() <= 0.25 * block.mlp.out_proj.in_features**-0.5


# -- shared --


def test_shared_blocks_are_one(build: Build, tokens: Tokens):
    arrangement = ARRANGEMENTS["shared"]
    model, ids = build(**arrangement), tokens(2, 6)
    backbone = model.backbone
    assert backbone.order == [0, 1, 2, 1]
    assert len(backbone.blocks) == 3
    assert not any("blocks.3" in name for name in model.state_dict())
    # three blocks, two of them with an MLP at two depths
    assert {block.branches for block in backbone.blocks} == {6}
    unshared = copy.deepcopy(arrangement)
    del unshared["pattern"][1]["shared"]
    apart = build(**unshared)
    for depth, place in enumerate(backbone.order):
        apart.backbone.blocks[depth].load_state_dict(backbone.blocks[place].state_dict())
    apart.embedding.load_state_dict(model.embedding.state_dict())
    apart.backbone.norm.load_state_dict(backbone.norm.state_dict())
    logits, state = model(ids, return_state=True)
    expected, expected_state = apart(ids, return_state=True)
    assert_near(logits, expected)
    assert_near(state, expected_state)
    assert not torch.equal(state[1]["k"], state[3]["k"])
    # gradients of both depths add up
    logits.square().sum().backward()
    expected.square().sum().backward()
    both = [apart.backbone.blocks[depth].mixer.in_proj.weight.grad for depth in (1, 3)]
    assert_near(backbone.blocks[1].mixer.in_proj.weight.grad, both[0] + both[1])


def test_shared_output_projections_are_scaled_once():
    entry = {"name": "min_gru", "expand": 2.0, "shared": "one", "mlp": "none"}
    backbone = Backbone(ModelConfig(vocab_size=9, d_model=128, n_layers=4, pattern=[entry]))
    assert len(backbone.blocks) == 1
    weight = backbone.blocks[0].mixer.out_proj.weight
    assert weight.std().item() == pytest.approx((3 * 256 * 4) ** -0.5, rel=0.05)
    assert len(seqzoo.parameter_groups(backbone, 1e-3)[0]["params"]) < 8


def test_entries_that_share_by_name_and_by_mapping_agree():
    entries = [{"name": "mamba", "shared": "a"}, {"name": "mamba", "shared": "a", "mlp": "gated"}, "mamba"]
    assert Backbone(ModelConfig(vocab_size=9, d_model=16, n_layers=6, pattern=entries)).order == [0, 0, 1, 0, 0, 2]


# -- experts --


def dense(experts: Experts, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every expert on every token, weighted by zero where it was not chosen; and the loss."""
    probabilities = (x @ experts.router.weight.T).softmax(-1)
    threshold = probabilities.sort(-1, descending=True)[0][..., experts.router.top_k - 1, None]
    chosen = torch.where(probabilities >= threshold, probabilities, 0)
    weights = chosen / chosen.sum(-1, keepdim=True)
    y = 0
    for index in range(probabilities.shape[-1]):
        gate, value = (x @ experts.in_proj.weight[index].T).chunk(2, -1)
        y = y + weights[..., index, None] * ((F.silu(gate) * value) @ experts.out_proj.weight[index].T)
    shares = (chosen > 0).to(x.dtype).flatten(0, -2).mean(0) / experts.router.top_k
    return y, len(shares) * (shares * probabilities.flatten(0, -2).mean(0)).sum()


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts_are_the_dense_sum(top_k: int, tokens: int):
    torch.manual_seed(tokens)
    experts = Experts(16, 32, 5, top_k).double()
    experts.reset_parameters()
    x = torch.randn(2, tokens, 16, dtype=torch.float64, requires_grad=True)
    y, loads = experts(x)
    loss = experts.imbalance(loads)
    expected, expected_loss = dense(experts, x)
    assert_near(y, expected)
    assert_near(loss, expected_loss)
    weight = torch.randn_like(y)
    sources = [x, *experts.parameters()]
    for got, want in zip(
        torch.autograd.grad((y * weight).sum() + loss, sources),
        torch.autograd.grad((expected * weight).sum() + expected_loss, sources, allow_unused=True),
        strict=True,
    ):
        assert_near(got, torch.zeros_like(got) if want is None else want)


def test_a_balanced_load_has_the_least_loss():
    experts = Experts(16, 32, 4, 2)
    even = torch.full((2, 4), 5.0)
    assert experts.imbalance(even).item() == pytest.approx(1.0)
    assert experts.imbalance(torch.tensor([[10.0, 10, 0, 0], [9, 9, 1, 1]])).item() == pytest.approx(1.8)
    assert experts.imbalance(torch.zeros(2, 4)).item() == 0.0


def test_the_loss_of_experts_is_in_the_models(build: Build, tokens: Tokens):
    model = build("min_gru", mlp="experts", n_experts=3, top_k=1, auxiliary_weight=0.5, n_layers=1)
    ids, labels = tokens(2, 8), tokens(2, 8, seed=1)
    hidden, _, auxiliary = model.backbone(model.embedding(ids))
    block = model.backbone.blocks[0]
    x = model.embedding(ids)
    x = x + block.mixer(block.mixer_norm(x))[0]
    assert_near(auxiliary, dense(block.mlp, block.mlp_norm(x))[1])
    assert_near(model.loss(ids, labels), model.cross_entropy(hidden, labels) + 0.5 * auxiliary)
    # with one expert a token the router learns from it alone
    model.loss(ids, labels).backward()
    assert block.mlp.router.weight.grad.any()


def test_experts_start_small_in_deep_models():
    block = Block(create("min_gru", d_model=16), mlp="experts", mlp_ratio=4.0, branches=16)
    block.reset_parameters()
    assert block.mlp.out_proj in block.output_projections()
    assert block.mlp.out_proj.weight.abs().max().item() == pytest.approx(64**-0.5 / 4, rel=0.02)
    assert block.mlp.in_proj.weight.abs().max().item() == pytest.approx(16**-0.5, rel=0.02)


def test_experts_of_half_precision(build: Build, tokens: Tokens):
    ids, labels = tokens(2, 9), tokens(2, 9, seed=1)
    expected = build(mlp="experts").loss(ids, labels).item()
    assert build(mlp="experts", dtype=torch.bfloat16).loss(ids, labels).item() == pytest.approx(expected, rel=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        loss = build(mlp="experts", dtype=torch.float32).loss(ids, labels)
    assert loss.item() == pytest.approx(expected, rel=0.05)


# -- bad input --

LIMITED = {"name": "attention", "causal": False}


@pytest.mark.parametrize(
    ("entries", "error", "words"),
    [
        ([{"parallel": ["mamba", "atention"]}], ValueError, "no mixer 'atention'; did you mean attention"),
        ([{"name": "mmaba", "mlp": "none"}], ValueError, "no mixer 'mmaba'; did you mean mamba"),
        ([{"name": "mamba", "mpl": "none"}], TypeError, "mamba has no option 'mpl'; did you mean mlp"),
        ([{"name": "mamba", "mlp": "expert"}], ValueError, "no mlp 'expert'; did you mean experts"),
        ([{"name": "mamba", "mlp": None}], TypeError, "mlp must be a name, got None"),
        ([{"name": "mamba", "shared": 3}], TypeError, "shared must be a word that blocks have in common, got 3"),
        ([{"name": "mamba", "shared": None}], TypeError, "shared must be a word .* got None"),
        ([{"name": "mamba", "shared": ""}], TypeError, "shared must be a word .* got ''"),
        ([{"parallel": ["mamba"]}], ValueError, r"list of at least 2 mixers, got \['mamba'\]"),
        ([{"parallel": []}], ValueError, r"list of at least 2 mixers, got \[\]"),
        ([{"parallel": "mamba"}], ValueError, "list of at least 2 mixers, got 'mamba'"),
        ([{"parallel": ["mamba", 3]}], TypeError, "a name or a mapping.*got 3"),
        ([{"parallel": ["mamba", "min_gru"], "sharde": "a"}], ValueError, "got 'sharde'; did you mean shared"),
        ([{"parallel": ["mamba", "min_gru"], "name": "a"}], ValueError, "'mlp' and 'shared' alone, got 'name'"),
        ([{"parallel": ["mamba", {"name": "min_gru", "mlp": "none"}]}], ValueError, "'mlp' belongs beside 'parallel'"),
        ([{"mlp": "none"}], ValueError, r"needs a name, or 'parallel', got \{\}"),
        (
            [{"name": "mamba", "shared": "a"}, {"name": "mamba", "expand": 1, "shared": "a"}],
            ValueError,
            r"shared='a' are one block and must agree, got .*'shared': 'a'\} and .*'expand': 1",
        ),
        (
            [{"name": "mamba", "shared": "a"}, {"name": "mamba", "mlp": "none", "shared": "a"}],
            ValueError,
            "must agree, got .* and .*'mlp': 'none'",
        ),
    ],
)
def test_wrong_patterns(entries: list[Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        ModelConfig(vocab_size=9, d_model=16, n_layers=2, pattern=entries)


def test_wrong_parts():
    mixer = create("min_gru", d_model=16)
    with pytest.raises(ValueError, match="parallel mixers must be at least 2, got 1"):
        ParallelMixers([mixer])
    with pytest.raises(ValueError, match=r"parallel mixers need one d_model, got \[16, 32\]"):
        ParallelMixers([mixer, create("min_gru", d_model=32)])
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        Experts(16, 0, 2, 1)
    with pytest.raises(ValueError, match="at most all 2 parts, got top_k = 3"):
        Experts(16, 8, 2, 3)


def test_a_mixer_of_both_directions_does_not_step(build: Build, tokens: Tokens):
    for pattern in ([LIMITED], [{"parallel": [LIMITED, "mamba"]}]):
        model = build(pattern)
        assert model(tokens(1, 3))[0].shape == (1, 3, 23)
        with pytest.raises(LimitError, match=r"has no (state|step): .*depends on the tokens after it"):
            model.init_state(1)
        with pytest.raises(LimitError, match=r"has no step: .*depends on the tokens after it"):
            model.step(tokens(1), [{}, {}])
        with pytest.raises(LimitError, match="has no state"):
            generate(model, tokens(1, 3), 2)


# -- named models --


@pytest.mark.parametrize("name", presets.list_models())
def test_a_named_model_is_what_it_says(name: str, tokens: Tokens):
    one = presets.preset(name)
    assert one.paper
    assert one.arxiv[4] == "."
    assert one.description.endswith(".")
    with torch.device("meta"):
        model = seqzoo.create_model(name)
    assert model.config == one.config()
    assert 4e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e7
    torch.manual_seed(0)
    small = seqzoo.create_model(name, d_model=32, vocab_size=23).double()
    ids = tokens(2, 6)
    whole, _ = small(ids)
    state = small.init_state(2)
    for index in range(6):
        logits, state = small.step(ids[:, index], state)
        assert_near(logits, whole[:, index])
    optimizer = torch.optim.AdamW(small.parameters(), lr=3e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = small.loss(ids, ids.flip(1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_named_models_are_arranged_as_their_papers():
    def mixers(name: str) -> list[str]:
        layers = presets.preset(name).config().layers()
        return [one.mixer if isinstance(one.mixer, str) else one.mixer.get("name", "parallel") for one in layers]

    assert mixers("jamba-small").count("mamba") == 7
    assert mixers("jamba-small").count("attention") == 1
    assert [one.mlp for one in presets.preset("jamba-small").config().layers()] == ["gated", "experts"] * 4
    assert mixers("samba-small") == ["mamba", "sliding_window_attention"] * 4
    assert mixers("hymba-small") == ["parallel"] * 7
    assert mixers("zamba-small") == (["mamba2"] * 5 + ["attention"]) * 2
    assert mixers("griffin-small") == ["rglru", "rglru", "sliding_window_attention"] * 3
    with torch.device("meta"):
        assert len(seqzoo.create_model("zamba-small").backbone.blocks) == 11


def test_wrong_named_models():
    with pytest.raises(ValueError, match="no model 'jambo-small'; did you mean jamba-small"):
        seqzoo.create_model("jambo-small")
    with pytest.raises(ValueError, match=r"no model \['mamba-small'\]; did you mean mamba-small"):
        seqzoo.create_model(["mamba-small"])  # pyright: ignore - that is refused
    with pytest.raises(ValueError, match="ModelConfig has no 'n_layer'; did you mean n_layers"):
        seqzoo.create_model("mamba-small", n_layer=3)
    with pytest.raises(TypeError):
        presets.preset("mamba-small").values["d_model"] = 3
    assert seqzoo.create_model("mamba-small", n_layers=1, vocab_size=11).config.vocab_size == 11


def test_the_table_has_a_row_a_model():
    lines = presets.table().splitlines()
    assert [line.split()[0] for line in lines[2:]] == seqzoo.list_models()
