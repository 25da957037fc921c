"""LanguageModel: every way of reading the same tokens gives the same, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from seqzoo import Packing, join
from seqzoo.mixer import registration
from seqzoo.models import LanguageModel

Build = Callable[..., LanguageModel]
Tokens = Callable[..., torch.Tensor]
LENGTHS = [4, 1, 0, 7]


def assert_near(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def assert_same_row(got: list[dict[str, torch.Tensor]], row: int, expected: list[dict[str, torch.Tensor]]) -> None:
    """A row of a state is that of a sequence alone, whose caches may have room for fewer tokens."""
    for one, two in zip(got, expected, strict=True):
        both = join([{key: value[row : row + 1] for key, value in one.items()}, two])
        assert_near({key: value[0] for key, value in both.items()}, {key: value[1] for key, value in both.items()})


def gradients(model: LanguageModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(
        zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True), strict=True)
    )


@pytest.mark.parametrize("options", [{}, {"norm_position": "post", "norm": "layer"}, {"max_positions": 12}])
def test_whole_is_pieces_is_steps(mixer: str, options: dict[str, Any], build: Build, tokens: Tokens):
    model, ids = build(mixer, **options), tokens(2, 12)
    whole, final = model(ids, return_state=True)
    state = None
    pieces = []
    for piece in ids.split([5, 1, 6], dim=1):
        logits, state = model(piece, state, return_state=True)
        pieces.append(logits)
    assert_near(torch.cat(pieces, 1), whole)
    assert_near(state, final)
    state = model.init_state(2)
    for index in range(12):
        logits, state = model.step(ids[:, index], state)
        assert_near(logits, whole[:, index])
    assert_near(state, final)


def test_a_state_is_returned_when_asked_for(build: Build, tokens: Tokens):
    assert build()(tokens(2, 3))[1] is None
    assert build()(tokens(2, 3), return_state=True)[1] is not None


@pytest.mark.parametrize("given", ["tensor", "packing"])
def test_packed_is_separate(mixer: str, given: str, build: Build, tokens: Tokens):
    model, ids = build(mixer, max_positions=9), tokens(1, sum(LENGTHS))
    _, before = model(tokens(len(LENGTHS), 2, seed=1), return_state=True)
    packing = Packing.from_lengths(LENGTHS)
    cu_seqlens = packing if given == "packing" else packing.cu_seqlens
    logits, after = model(ids, before, cu_seqlens=cu_seqlens, return_state=True)
    start = 0
    for index, length in enumerate(LENGTHS):
        own = [{key: value[index : index + 1] for key, value in one.items()} for one in before]
        if length > 0:
            alone, own = model(ids[:, start : start + length], own, return_state=True)
            assert_near(logits[:, start : start + length], alone)
        assert_same_row(after, index, own)
        start += length


def padded(side: str, ids: torch.Tensor) -> torch.Tensor:
    """A mask over rows of 7 for LENGTHS."""
    places = torch.arange(ids.shape[1])
    lengths = torch.tensor(LENGTHS)[:, None]
    return places < lengths if side == "right" else places >= ids.shape[1] - lengths


@pytest.mark.parametrize("side", ["left", "right", "lengths", "lengths list"])
def test_padded_is_separate(mixer: str, side: str, build: Build, tokens: Tokens):
    model, ids = build(mixer, max_positions=9), tokens(4, 7)
    _, before = model(tokens(4, 2, seed=1), return_state=True)
    mask = padded("left" if side == "left" else "right", ids)
    options: dict[str, Any] = {
        "left": {"attention_mask": mask},
        "right": {"attention_mask": mask.long()},
        "lengths": {"lengths": torch.tensor(LENGTHS)},
        "lengths list": {"lengths": LENGTHS},
    }[side]
    logits, after = model(ids, before, return_state=True, **options)
    assert logits.shape == (4, 7, model.config.vocab_size)
    assert not logits[~mask].any()
    for index, length in enumerate(LENGTHS):
        own = [{key: value[index : index + 1] for key, value in one.items()} for one in before]
        if length > 0:
            alone, own = model(ids[index][mask[index]][None], own, return_state=True)
            assert_near(logits[index][mask[index]], alone[0])
        assert_same_row(after, index, own)


def test_padding_has_no_influence(build: Build, tokens: Tokens):
    model, ids, labels = build(), tokens(4, 7), tokens(4, 7, seed=1)
    mask = padded("left", ids)
    # any token may stand in the padding, and any label beside it
    noisy = torch.where(mask, ids, tokens(4, 7, seed=2))
    wrong = torch.where(mask, labels, 10**9)
    assert torch.equal(model(noisy, attention_mask=mask)[0], model(ids, attention_mask=mask)[0])
    loss = model.loss(ids, labels, attention_mask=mask)
    assert torch.equal(model.loss(noisy, wrong, attention_mask=mask), loss)
    logits = model(ids, attention_mask=mask)[0]
    assert_near(loss, F.cross_entropy(logits[mask], labels[mask]))


def test_gradients_flow_through_the_state(mixer: str, build: Build, tokens: Tokens):
    # an auxiliary loss over a whole sequence may be another than over its pieces
    model = build(mixer, max_positions=10, auxiliary_weight=0.0)
    ids, labels = tokens(2, 10), tokens(2, 10, seed=1)
    whole = model.loss(ids, labels)
    first, state = model.loss(ids[:, :4], labels[:, :4], return_state=True)
    second = model.loss(ids[:, 4:], labels[:, 4:], state)
    assert_near(0.4 * first + 0.6 * second, whole)
    expected = gradients(model, whole)
    assert_near(gradients(model, 0.4 * first + 0.6 * second), expected)
    cut = [{key: value.detach() for key, value in one.items()} for one in state]
    apart = gradients(model, 0.4 * first.detach() + 0.6 * model.loss(ids[:, 4:], labels[:, 4:], cut))
    assert any((apart[name] - expected[name]).norm() > 1e-3 * expected[name].norm() for name in expected)


@pytest.mark.parametrize("chunk_size", [3, None])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_the_cross_entropy_of_the_logits(
    mixer: str, tied: bool, chunk_size: int | None, build: Build, tokens: Tokens
):
    model, ids, labels = build(mixer, tie_embeddings=tied, auxiliary_weight=0.0), tokens(1, 12), tokens(1, 12, seed=1)
    labels[0, [0, 5]] = -100
    cu_seqlens = Packing.from_lengths([5, 7])
    loss, state = model.loss(ids, labels, cu_seqlens=cu_seqlens, return_state=True, chunk_size=chunk_size)
    logits, expected_state = model(ids, cu_seqlens=cu_seqlens, return_state=True)
    expected = F.cross_entropy(logits[0], labels[0])
    assert loss.dtype == torch.float64
    assert_near(loss, expected)
    assert_near(state, expected_state)
    assert_near(gradients(model, loss), gradients(model, expected))


def test_loss_where_nothing_counts(build: Build, tokens: Tokens):
    model, ids = build(), tokens(2, 5)
    loss = model.loss(ids, torch.full_like(ids, -100))
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("options", [{}, {"lengths": [0, 0]}, {"attention_mask": torch.zeros(2, 3)}])
def test_empty_sequences(options: dict[str, Any], mixer: str, build: Build, tokens: Tokens):
    model = build(mixer, max_positions=9)
    ids = tokens(2, 3 if options else 0)
    _, before = model(tokens(2, 2), return_state=True)
    logits, after = model(ids, before, return_state=True, **options)
    assert logits.shape == (*ids.shape, 23)
    assert not logits.any()
    assert_near(after, before)
    loss = model.loss(ids, ids, **options)
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_int32_tokens(build: Build, tokens: Tokens):
    model, ids, labels = build(), tokens(2, 5), tokens(2, 5, seed=1)
    assert torch.equal(model(ids.int())[0], model(ids)[0])
    assert torch.equal(model.loss(ids.int(), labels.int()), model.loss(ids, labels))


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_low_precision(kind: str, mixer: str, build: Build, tokens: Tokens):
    ids, labels = tokens(2, 9), tokens(2, 9, seed=1)
    # small enough for every parameter to matter within a few tokens
    pattern = [{"name": mixer, **registration(mixer).mixer.variants[0]}]
    expected = build(pattern).loss(ids, labels)
    if kind == "bfloat16":
        model = build(pattern, dtype=torch.bfloat16)
        loss = model.loss(ids, labels)
    else:
        model = build(pattern, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(ids, labels)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 0.05 * expected.item()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_tied_embeddings_are_one_parameter(build: Build):
    tied = {name for name, _ in build().named_parameters()}
    assert {name for name, _ in build(tie_embeddings=False).named_parameters()} - tied == {"head.weight"}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, ValueError, "holes, row 0 has one"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 2, 1]])}, ValueError, "1 at tokens and 0 at padding"),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, r"shape \(B, T\) = \(2, 3\), got \(2, 4\)"),
        ({"attention_mask": [[1, 1, 1]]}, TypeError, "must be a Tensor, got list"),
        ({"lengths": [3]}, ValueError, r"shape \(B,\) = \(2,\), got \(1,\)"),
        ({"lengths": [3, 4]}, ValueError, r"between 0 and 3, got \[3, 4\]"),
        ({"lengths": [-1, 3]}, ValueError, r"between 0 and 3, got \[-1, 3\]"),
        ({"lengths": [1.0, 3.0]}, TypeError, "lengths must be integers"),
        ({"lengths": [1, 3], "attention_mask": torch.ones(2, 3)}, ValueError, "at most one.*lengths, attention_mask"),
        ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, ValueError, "batch of 1, got a batch of 2"),
        ({"cu_seqlens": torch.tensor([0, 6])}, TypeError, "must be int32"),
        ({"mask": torch.ones(2, 3)}, TypeError, "unexpected keyword argument 'mask'"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], words: str, build: Build, tokens: Tokens):
    model, ids = build(), tokens(2, 3)
    with pytest.raises(error, match=words):
        model(ids, **options)
    with pytest.raises(error, match=words):
        model.loss(ids, ids, **options)


def test_wrong_tokens(build: Build, tokens: Tokens):
    model, ids = build(), tokens(2, 3)
    for wrong in (23, -1):
        with pytest.raises(ValueError, match=f"ids must lie between 0 and 22, got .*{wrong}"):
            model(torch.full_like(ids, wrong))
        with pytest.raises(ValueError, match="ids must lie between 0 and 22"):
            model.step(torch.full((2,), wrong), model.init_state(2))
    with pytest.raises(TypeError, match=r"ids must be int64 or int32, got torch.float32"):
        model(ids.float())
    with pytest.raises(TypeError, match="ids must be a Tensor, got list"):
        model([1, 2])
    with pytest.raises(ValueError, match=r"ids must have shape \(B, T\), got \(3,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"ids must have shape \(B,\), got \(2, 3\)"):
        model.step(ids, model.init_state(2))
    with pytest.raises(ValueError, match=r"labels must have the shape of ids, \(2, 3\), got \(2, 2\)"):
        model.loss(ids, ids[:, 1:])
    with pytest.raises(TypeError, match="labels must be int64 or int32"):
        model.loss(ids, ids.float())
    with pytest.raises(ValueError, match="labels must lie between 0 and 22, or be -100, got 23"):
        model.loss(ids, torch.full_like(ids, 23))


def test_no_sequences_at_all(build: Build, tokens: Tokens):
    model = build(["min_gru", "attention"], max_positions=9)
    _, state = model(tokens(0, 4), return_state=True)
    logits, _ = model(tokens(0, 5), state)
    assert logits.shape == (0, 5, model.config.vocab_size)
