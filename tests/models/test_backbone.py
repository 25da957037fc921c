"""Block and Backbone: their formula, their initialisation, what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from seqzoo import Packing, create
from seqzoo.mixer import Mixed, SequenceMixer
from seqzoo.models import Backbone, Block, LanguageModel, ModelConfig
from seqzoo.modules.norm import NORMS

Build = Callable[..., LanguageModel]


class Paying(SequenceMixer):
    """Returns its inputs, and their mean square as an auxiliary loss."""

    def mix(self, x: torch.Tensor, state: Any, packing: Any, return_state: bool) -> Mixed:
        return Mixed(x, {}, x.square().mean())

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> dict[str, Any]:
        return {}

    def reset_parameters(self) -> None:
        pass


@pytest.mark.parametrize("norm", ["rms", "layer", "batch"])
@pytest.mark.parametrize("mlp", ["gated", "plain", "none"])
def test_pre_norm_block(norm: str, mlp: str):
    block = Block(create("min_gru", d_model=16), norm=norm, mlp=mlp).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y = x + block.mixer(block.mixer_norm(x))[0]
    if mlp != "none":
        y = y + block.mlp(block.mlp_norm(y))
    torch.testing.assert_close(block(x)[0], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mlp", ["gated", "none"])
def test_post_norm_block(mlp: str):
    block = Block(create("min_gru", d_model=16), norm_position="post", mlp=mlp).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y = block.mixer_norm(x + block.mixer(x)[0])
    if mlp != "none":
        y = block.mlp_norm(y + block.mlp(y))
    torch.testing.assert_close(block(x)[0], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_reaches_the_branches_alone(position: str):
    block = Block(create("min_gru", d_model=16), norm_position=position, dropout=0.999999)
    x = torch.randn(2, 5, 16)
    expected = x if position == "pre" else block.mlp_norm(block.mixer_norm(x))
    assert torch.equal(block(x)[0], expected)
    assert not torch.equal(block.eval()(x)[0], expected)


def test_output_projections_start_small_in_deep_models():
    """By their variance: PyTorch's initialisation has 1 / (3 fan_in)."""
    config = ModelConfig(vocab_size=5, d_model=128, n_layers=3, pattern=[{"name": "min_gru", "expand": 2.0}])
    for branches, options in ((6, {}), (3, {"mlp": "none"}), (1, {"norm_position": "post"})):
        backbone = Backbone(ModelConfig(**{**config.to_dict(), **options}))
        for block in backbone.blocks:
            projections = block.output_projections()
            assert len(projections) == (1 if block.mlp is None else 2)
            for projection in projections:
                expected = (3 * projection.in_features * branches) ** -0.5
                assert projection.weight.std().item() == pytest.approx(expected, rel=0.05)
            assert block.mixer.in_proj.weight.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.05)


def test_a_deep_model_starts_near_its_inputs(mixer: str):
    """What the scaling is for: the residual's size depends little on the depth."""
    sizes = []
    for depth in (1, 24):
        torch.manual_seed(0)
        backbone = Backbone(ModelConfig(vocab_size=5, d_model=32, n_layers=depth, pattern=mixer))
        seen: list[torch.Tensor] = []
        backbone.norm.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        backbone(torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1)))
        sizes.append(seen[0].std().item())
    assert sizes[1] < 4 * sizes[0]


@pytest.mark.parametrize("options", [{}, {"max_positions": 9, "norm": "batch", "mlp": "plain"}])
def test_everything_is_initialised_from_the_meta_device(mixer: str, options: dict[str, Any]):
    config = ModelConfig(vocab_size=7, d_model=16, n_layers=2, pattern=mixer, tie_embeddings=False, **options)
    torch.manual_seed(0)
    expected = LanguageModel(config)
    torch.manual_seed(0)
    expected.reset_parameters()
    with torch.device("meta"):
        model = LanguageModel(config)
    # to_empty fills with NaN here, so whatever is left out differs
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.reset_parameters()
    for tensors in ("named_parameters", "named_buffers"):
        for (name, one), (_, other) in zip(getattr(model, tensors)(), getattr(expected, tensors)(), strict=True):
            assert torch.equal(one, other), name


def test_auxiliary_losses_are_summed():
    config = ModelConfig(vocab_size=5, d_model=16, n_layers=3, pattern="min_gru", mlp="none")
    backbone = Backbone(config).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert backbone(x)[2].item() == 0.0
    backbone.blocks[0].mixer = Paying(16)
    backbone.blocks[2].mixer = Paying(16)
    seen: list[torch.Tensor] = []
    for index in (0, 2):
        backbone.blocks[index].mixer_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    auxiliary = backbone(x)[2]
    torch.testing.assert_close(auxiliary, seen[0].square().mean() + seen[1].square().mean())


def test_the_loss_holds_the_auxiliary_losses(build: Build, tokens: Callable[..., torch.Tensor]):
    model = build(auxiliary_weight=0.25)
    ids, labels = tokens(2, 6), tokens(2, 6, seed=1)
    model.backbone.blocks[0].mixer = Paying(16)
    hidden, _, auxiliary = model.backbone(model.embedding(ids))
    plain = nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), labels.flatten())
    assert auxiliary.item() > 0.1
    torch.testing.assert_close(model.loss(ids, labels), plain + 0.25 * auxiliary)


def test_batch_norm_refuses_states(build: Build, tokens: Callable[..., torch.Tensor]):
    model = build(norm="batch").train()
    ids = tokens(1, 6)
    assert torch.isfinite(model(ids)[0]).all()
    state = model.init_state(1)
    for options in ({"state": state}, {"return_state": True}):
        with pytest.raises(ValueError, match="norm='batch' takes whole sequences and no state"):
            model(ids, **options)
    with pytest.raises(ValueError, match="takes whole sequences alone and cannot step"):
        model.step(ids[:, 0], state)


def test_batch_norm_counts_true_tokens_alone(build: Build, tokens: Callable[..., torch.Tensor]):
    ids, lengths = tokens(3, 6), [6, 4, 1]
    packed = torch.cat([row[:length] for row, length in zip(ids, lengths, strict=True)])[None]
    bounds = torch.tensor([0, 6, 10, 11], dtype=torch.int32)
    found = []
    for given in (
        {"ids": ids, "lengths": lengths},
        {"ids": torch.nn.functional.pad(ids, (0, 5), value=1), "lengths": lengths},
        {"ids": packed, "cu_seqlens": bounds},
    ):
        model = build(norm="batch").double().train()
        norm = model.backbone.blocks[0].mixer_norm
        logits = model(given.pop("ids"), **given)[0]
        true = logits[0] if "cu_seqlens" in given else torch.cat([logits[row, :n] for row, n in enumerate(lengths)])
        true.square().sum().backward()
        found.append((true.detach(), norm.running_mean.clone(), norm.running_var.clone(), norm.weight.grad))
    embedded = build(norm="batch").double().embedding(packed)[0]
    torch.testing.assert_close(found[0][1], 0.1 * embedded.mean(0), rtol=1e-12, atol=1e-14)
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, another, rtol=1e-10, atol=1e-12)
    # judged, a token has the numbers that it has without its neighbours
    model.eval()
    alone = torch.cat([model(ids[row : row + 1, :n])[0][0] for row, n in enumerate(lengths)])
    torch.testing.assert_close(model(packed, cu_seqlens=bounds)[0][0], alone, rtol=1e-10, atol=1e-12)


def test_learned_positions_are_those_of_each_sequence(build: Build, tokens: Callable[..., torch.Tensor]):
    model = build(max_positions=8, n_layers=1)
    x = torch.zeros(1, 7, 16, dtype=torch.float64)
    positions, weight = model.backbone.positions, model.backbone.positions.weight
    assert torch.equal(positions(x, None, None)[0][0], weight[:7])
    start = {"position": torch.tensor([5, 1, 2])}
    packing = Packing.from_lengths([3, 0, 4])
    placed, after = positions(x, start, packing)
    assert torch.equal(placed[0], weight[[5, 6, 7, 2, 3, 4, 5]])
    assert after["position"].tolist() == [8, 1, 6]
    for call in (
        lambda: positions(x, {"position": torch.tensor([2])}, None),
        lambda: (
            positions(x, None, Packing.from_lengths([7]))[0] + positions(x, start, Packing.from_lengths([4, 0, 3]))[0]
        ),
        lambda: model(tokens(1, 9)),
    ):
        with pytest.raises(ValueError, match="9 tokens is longer than max_positions, 8"):
            call()


def test_wrong_states(build: Build, tokens: Callable[..., torch.Tensor]):
    model, ids = build(max_positions=8), tokens(2, 3)
    state = model.init_state(2)
    assert len(state) == 3
    with pytest.raises(ValueError, match="3 entries, one a mixer and the positions', got 2"):
        model(ids, state[:2])
    with pytest.raises(ValueError, match="2 entries, one a mixer, got 3"):
        build()(ids, state)
    with pytest.raises(TypeError, match="list of its mixers' states, got dict"):
        model(ids, state[0])
    for wrong in (build(), model):
        with pytest.raises(ValueError, match="for 3 sequences"):
            wrong(tokens(3, 3), wrong.init_state(2))
    with pytest.raises(ValueError, match="has the key 'position', got \\['h'\\]"):
        model(ids, [state[0], state[0], state[0]])


def test_copies_are_independent(build: Build, tokens: Callable[..., torch.Tensor]):
    model, ids = build(["min_gru", "min_lstm"]), tokens(2, 5)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids)[0], model(ids)[0])
    with torch.no_grad():
        twin.embedding.weight.zero_()
    assert model.embedding.weight.any()
    other = LanguageModel(model.config).double()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids)[0], model(ids)[0])


@pytest.mark.parametrize("norm", NORMS)
def test_all_norms_have_the_epsilon(norm: str):
    config = ModelConfig(vocab_size=9, d_model=16, n_layers=2, pattern="min_gru", norm=norm, norm_eps=0.25)
    assert [module.eps for module in Backbone(config).modules() if isinstance(module, NORMS[norm])] == [0.25] * 5
