"""Memory at length: pieces of the MLP, blocks computed anew, gradients in chunks; all equal to doing without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo import LimitError, Packing, fork
from seqzoo.models import Block, LanguageModel, ModelConfig, backward_in_chunks
from seqzoo.testing import differentiable

Build = Callable[..., LanguageModel]
Tokens = Callable[..., torch.Tensor]

LOCAL = {"name": "sliding_window_attention", "window": 3}
HYBRIDS: dict[str, dict[str, Any]] = {
    "cache": {"pattern": ["mamba", "attention"]},
    "ring": {"pattern": ["min_gru", LOCAL], "max_positions": 40},
    "parallel": {"pattern": [{"parallel": ["attention", "mamba"]}]},
    "shared": {"pattern": [{"name": "mamba2", "mlp": "none"}, {"name": "attention", "shared": "a"}], "n_layers": 4},
    "experts": {"pattern": ["attention", "min_gru"], "mlp": "experts"},
}


@pytest.fixture(params=HYBRIDS)
def hybrid(request: pytest.FixtureRequest) -> dict[str, Any]:
    return HYBRIDS[request.param]


def assert_near(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def assert_same_gradients(model: LanguageModel, other: LanguageModel) -> None:
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if two.grad is None:
            assert one.grad is None or not one.grad.any(), name
        else:
            assert one.grad is not None, name
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-11, msg=name)


def boundaries_of(cu_seqlens: torch.Tensor | Packing) -> torch.Tensor:
    return cu_seqlens.cu_seqlens if isinstance(cu_seqlens, Packing) else cu_seqlens


def given_state(model: LanguageModel, tokens: Tokens, rows: int) -> list[dict[str, torch.Tensor]]:
    """A state in use, whose caches have room that a step without gradients would write to."""
    with torch.no_grad():
        _, state = model.prefill(tokens(rows, 3, seed=5))
        for seed in (6, 7):
            _, state = model.step(tokens(rows, seed=seed), state)
    return state


def require_gradients(state: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    return [value.requires_grad_() for one in state for value in one.values() if differentiable(value)]


# -- gradients in chunks --


def compare(build: Build, tokens: Tokens, options: dict[str, Any], chunk_size: int, **packed: Any) -> None:
    plain, chunked = build(**options), build(**options)
    ids = tokens(*((1, 14) if packed else (2, 14)))
    labels = tokens(*ids.shape, seed=1)
    labels[0, [0, 5, 6, 7]] = -100
    rows = len(boundaries_of(packed["cu_seqlens"])) - 1 if packed else 2
    state = given_state(plain, tokens, rows)
    states = [fork(state, 1) for _ in range(2)]
    sources = [require_gradients(one) for one in states]
    expected, after = plain.loss(ids, labels, states[0], return_state=True, **packed)
    expected.backward()
    loss, own = backward_in_chunks(chunked, ids, labels, chunk_size, states[1], return_state=True, **packed)
    assert not loss.requires_grad
    assert_near(loss, expected.detach())
    assert_same_gradients(chunked, plain)
    for one, two in zip(*sources, strict=True):
        assert_near(two.grad, one.grad)
    # the same state as far as it is read
    assert not any(value.requires_grad for one in own for value in one.values())
    again = tokens(rows, 2, seed=3)
    assert_near(chunked(again, own)[0], plain(again, after)[0])
    for one, two in zip(own, after, strict=True):
        for key, value in one.items():
            if value.shape == two[key].shape:
                assert_near(value, two[key].detach())


@pytest.mark.parametrize("chunk_size", [1, 5, 14])
def test_gradients_in_chunks(mixer: str, chunk_size: int, build: Build, tokens: Tokens):
    # a balance loss is another one over chunks
    compare(build, tokens, {"pattern": mixer, "auxiliary_weight": 0.0}, chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_gradients_of_hybrids_in_chunks(hybrid: dict[str, Any], chunk_size: int, build: Build, tokens: Tokens):
    compare(build, tokens, {**hybrid, "auxiliary_weight": 0.0}, chunk_size)


@pytest.mark.parametrize("lengths", [[4, 1, 0, 9], [0, 14, 0], [3, 2, 2, 3, 4], [5, 5, 4]])
@pytest.mark.parametrize("chunk_size", [1, 5])
def test_gradients_of_packed_sequences_in_chunks(
    hybrid: dict[str, Any], lengths: list[int], chunk_size: int, build: Build, tokens: Tokens
):
    packing = Packing.from_lengths(lengths)
    compare(build, tokens, {**hybrid, "auxiliary_weight": 0.0}, chunk_size, cu_seqlens=packing.cu_seqlens)


def test_prefixes_in_chunks(build: Build, tokens: Tokens):
    options = {"pattern": ["prefix_linear_attention", "attention"]}
    # the second begins in the chunk in which the first ends; the chunk after that has neither's prefix
    packing = Packing.from_lengths([6, 8], prefix_lengths=[3, 2])
    compare(build, tokens, options, 4, cu_seqlens=packing)
    ids = tokens(1, 14)
    causal = build(**options).loss(ids, ids, cu_seqlens=packing.cu_seqlens)
    assert abs(backward_in_chunks(build(**options), ids, ids, 4, cu_seqlens=packing) - causal) > 1e-4
    for size, words in ((2, "sequence 0, tokens 0 to 3 of all, is cut .* ends at 2"), (7, "sequence 1, .* ends at 7")):
        with pytest.raises(ValueError, match=words):
            backward_in_chunks(build(**options), ids, ids, size, cu_seqlens=packing)


def test_gradients_of_padded_batches_in_chunks(build: Build, tokens: Tokens):
    plain, chunked, ids = build(["mamba", "attention"]), build(["mamba", "attention"]), tokens(3, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0] * 6])
    for options in ({"attention_mask": mask}, {"lengths": [4, 6, 0]}):
        for model in (plain, chunked):
            model.zero_grad()
        expected = plain.loss(ids, ids.flip(1), **options)
        expected.backward()
        assert_near(backward_in_chunks(chunked, ids, ids.flip(1), 4, **options), expected.detach())
        assert_same_gradients(chunked, plain)


def test_gradients_accumulate_and_scale(build: Build, tokens: Tokens):
    plain, chunked = build(), build()
    first, second = tokens(2, 7), tokens(2, 7, seed=1)
    (3 * plain.loss(first, second)).backward()
    plain.loss(second, first).backward()
    assert_near(backward_in_chunks(chunked, first, second, 3, scale=3.0), plain.loss(first, second).detach())
    backward_in_chunks(chunked, second, first, 3)
    assert_same_gradients(chunked, plain)


def test_a_given_state_is_not_used_up(hybrid: dict[str, Any], build: Build, tokens: Tokens):
    model = build(**hybrid)
    state = given_state(model, tokens, 2)
    before = fork(state, 1)
    for _ in range(2):
        backward_in_chunks(model, tokens(2, 7), tokens(2, 7, seed=1), 3, state)
        assert_near(state, before)


def test_the_graph_behind_a_state_is_walked(build: Build, tokens: Tokens):
    plain, chunked = build(["mamba", "attention"]), build(["mamba", "attention"])
    ids, labels = tokens(2, 9), tokens(2, 9, seed=1)
    for model, chunk_size in ((plain, 9), (chunked, 2)):
        _, state = model(ids[:, :4], return_state=True)
        backward_in_chunks(model, ids[:, 4:], labels[:, 4:], chunk_size, state)
        assert model.backbone.blocks[1].mixer.in_proj.weight.grad is not None
    assert_same_gradients(chunked, plain)
    expected = build(["mamba", "attention"])
    _, state = expected(ids[:, :4], return_state=True)
    expected.loss(ids[:, 4:], labels[:, 4:], state).backward()
    assert_same_gradients(chunked, expected)


def test_auxiliary_losses_are_the_chunks_mean(build: Build, tokens: Tokens):
    options = {"pattern": "min_gru", "mlp": "experts", "auxiliary_weight": 0.7}
    plain, chunked, ids, labels = build(**options), build(**options), tokens(2, 7), tokens(2, 7, seed=1)
    expected, state = 0, None
    for start, size in ((0, 3), (3, 3), (6, 1)):
        part = slice(start, start + size)
        loss, state = plain.loss(ids[:, part], labels[:, part], state, return_state=True)
        expected = expected + loss * size / 7
    expected.backward()
    assert_near(backward_in_chunks(chunked, ids, labels, 3), expected.detach())
    assert_same_gradients(chunked, plain)


def test_dropout_is_the_same_in_both_passes(build: Build, tokens: Tokens):
    options = {"pattern": ["mamba", "attention"], "dropout": 0.4}
    plain, chunked = build(**options).train(), build(**options).train()
    ids, labels = tokens(2, 9), tokens(2, 9, seed=1)
    torch.manual_seed(3)
    expected, state = 0, None
    for start in (0, 3, 6):
        part = slice(start, start + 3)
        loss, state = plain.loss(ids[:, part], labels[:, part], state, return_state=True)
        expected = expected + loss / 3
    drawn = torch.rand(3)
    expected.backward()
    torch.manual_seed(3)
    assert_near(backward_in_chunks(chunked, ids, labels, 3), expected.detach())
    assert torch.equal(torch.rand(3), drawn)
    assert_same_gradients(chunked, plain)


def test_no_pass_sees_more_than_a_chunk(build: Build, tokens: Tokens):
    model, seen = build(["mamba", "attention"]), []
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    backward_in_chunks(model, tokens(1, 10), tokens(1, 10), 3)
    # the last chunk once
    assert seen == [3, 3, 3, 1, 3, 3, 3]


def test_caches_of_a_dense_batch_are_kept_once(build: Build, tokens: Tokens, monkeypatch: pytest.MonkeyPatch):
    from seqzoo.models import long_sequences

    kept: list[list[dict[str, torch.Tensor]]] = []
    honest = long_sequences._Run._kept

    def watched(*arguments: Any) -> Any:
        kept.append(honest(*arguments))
        return kept[-1]

    monkeypatch.setattr(long_sequences._Run, "_kept", watched)
    backward_in_chunks(build("attention", n_layers=1), tokens(1, 64), tokens(1, 64), 1)
    blocks = {one[0]["k"].untyped_storage().data_ptr(): one[0]["k"].untyped_storage().nbytes() for one in kept}
    # doubled when full: 1, 2 and 16 to 64 places, not one cache for each of 64 lengths
    assert sum(blocks.values()) < 3 * 64 * 16 * 8


def test_sequences_without_tokens_in_chunks(build: Build, tokens: Tokens):
    model = build()
    state = given_state(model, tokens, 2)
    sources = require_gradients(state)
    loss, after = backward_in_chunks(model, tokens(2, 0), tokens(2, 0), 3, state, return_state=True)
    assert loss.item() == 0.0
    assert_near(after, [{key: value.detach() for key, value in one.items()} for one in state])
    assert all(not source.grad.any() for source in sources)
    loss = backward_in_chunks(model, tokens(2, 5), torch.full((2, 5), -100), 3)
    assert loss.item() == 0.0
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_wrong_arguments_of_chunks(build: Build, tokens: Tokens):
    model, ids = build(), tokens(2, 5)
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="chunk_size must be a positive integer, got"):
            backward_in_chunks(model, ids, ids, wrong)
    with pytest.raises(ValueError, match=r"labels must have the shape of ids, \(2, 5\), got \(2, 4\)"):
        backward_in_chunks(model, ids, ids[:, 1:], 2)
    with pytest.raises(TypeError, match="ids must be int64 or int32"):
        backward_in_chunks(model, ids.float(), ids, 2)
    with pytest.raises(ValueError, match="2 entries, one a mixer, got 1"):
        backward_in_chunks(model, ids, ids, 2, model.init_state(2)[:1])
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients, which are switched off here"):
        backward_in_chunks(model, ids, ids, 2)
    with pytest.raises(LimitError, match="Attention has no state"):
        backward_in_chunks(build([{"name": "attention", "causal": False}]), ids, ids, 2)
    with pytest.raises(ValueError, match="norm='batch' takes whole sequences"):
        backward_in_chunks(build(norm="batch"), ids, ids, 2)


# -- pieces of the MLP, and blocks computed anew --


@pytest.mark.parametrize(
    "memory",
    [
        {"mlp_chunk_size": 1},
        {"mlp_chunk_size": 5},
        {"mlp_chunk_size": 1000},
        {"checkpoint_blocks": True},
        {"mlp_chunk_size": 4, "checkpoint_blocks": True},
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "mamba", "mlp": "plain", "norm_position": "post"},
        {"pattern": ["mamba", "attention"], "dropout": 0.3},
        {"pattern": "min_gru", "mlp": "experts", "auxiliary_weight": 0.6, "n_experts": 3},
        {"pattern": [{"parallel": [LOCAL, "mamba2"], "shared": "a"}], "norm": "layer"},
        {"pattern": "long_conv", "residual_in_fp32": True},
    ],
)
def test_results_are_those_without(options: dict[str, Any], memory: dict[str, Any], build: Build, tokens: Tokens):
    plain, spared = build(**options).train(), build(**options, **memory).train()
    ids, labels = tokens(2, 9), tokens(2, 9, seed=1)
    results = []
    for model in (plain, spared):
        torch.manual_seed(2)
        loss, state = model.loss(ids, labels, model.init_state(2), return_state=True)
        (loss + sum(value.square().sum() for one in state for value in one.values() if value.requires_grad)).backward()
        results.append((loss.detach(), [{key: value.detach() for key, value in one.items()} for one in state]))
    assert_near(results[1], results[0])
    assert_same_gradients(spared, plain)
    packing = Packing.from_lengths([4, 0, 14])
    got, expected = (
        model.eval().loss(ids.view(1, 18), labels.view(1, 18), cu_seqlens=packing) for model in (spared, plain)
    )
    assert_near(got, expected)
    with torch.no_grad():
        assert_near(spared(ids)[0], plain(ids)[0])
        assert_near(spared.step(ids[:, 0], results[1][1])[0], plain.step(ids[:, 0], results[0][1])[0])
        assert spared(ids[:, :0])[0].shape == (2, 0, 23)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


def saved(run: Callable[[], torch.Tensor]) -> int:
    """Numbers that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("mlp", ["gated", "experts"])
def test_hidden_units_exist_for_one_piece_at_a_time(mlp: str):
    from seqzoo import create

    made, kept = {}, {}
    for size in (None, 8):
        block = Block(create("min_gru", d_model=16), mlp=mlp, mlp_ratio=6.0, mlp_chunk_size=size, n_experts=2, top_k=1)
        block.reset_parameters()
        x = torch.randn(1, 256, 16, requires_grad=True)
        kept[size] = saved(lambda block=block, x=x: block(x)[0].sum())
        with Largest() as largest:
            block(x)[0].sum().backward()
        made[size] = largest.size
    assert made[None] >= 256 * 2 * 96
    # what is left are the tokens, three times as wide in the mixer, or the weights
    assert made[8] <= max(256 * 16 * 3, 16 * 192 * 4)
    # gates, values, what is made of them
    assert kept[None] - kept[8] >= 256 * 3 * 96


def test_training_keeps_the_blocks_inputs_alone(build: Build, tokens: Tokens):
    ids = tokens(1, 200)
    options = {"pattern": "mamba", "n_layers": 6}
    plain, spared = (build(**options, checkpoint_blocks=flag) for flag in (False, True))
    evaluated = [saved(lambda model=model: model.eval().loss(ids, ids)) for model in (plain, spared)]
    assert evaluated[0] == evaluated[1]
    # outside of the blocks: embeddings, the last norm, the loss
    trained = [saved(lambda model=model: model.train().loss(ids, ids)) for model in (plain, spared)]
    assert trained[1] < trained[0] / 6


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mlp_chunk_size": 0}, ValueError, "mlp_chunk_size must be at least 1, got 0"),
        ({"mlp_chunk_size": 2.5}, TypeError, "mlp_chunk_size must be an integer, got 2.5"),
        ({"checkpoint_blocks": 1}, TypeError, "checkpoint_blocks must be true or false, got 1"),
        ({"checkpoint_blocks": True, "norm": "batch"}, ValueError, "norm='batch' would count twice"),
        ({"mlp_chunk_size": 3, "norm": "batch"}, ValueError, "norm='batch' would count twice"),
        ({"n_experts": 2, "top_k": 3}, ValueError, "top_k must be at most n_experts, 2, got 3"),
        ({"n_experts": 0}, ValueError, "n_experts must be at least 1, got 0"),
        ({"top_k": "2"}, TypeError, "top_k must be an integer, got '2'"),
    ],
)
def test_wrong_values(options: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        ModelConfig(vocab_size=9, d_model=16, n_layers=1, pattern="min_gru", **options)
