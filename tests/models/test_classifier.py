"""The classifier of sequences: pooling over true tokens however a batch arrives, saving, bad input."""

from __future__ import annotations

import pytest
import torch

from seqzoo import hub
from seqzoo.layers import Bidirectional
from seqzoo.models import ClassifierConfig, SequenceClassifier
from seqzoo.packing import Packing
from seqzoo.testing import boundaries, inputs

LENGTHS = (3, 7, 1, 0, 5)


def build(**options) -> SequenceClassifier:
    torch.manual_seed(0)
    kind = {} if "n_features" in options else {"vocab_size": 11}
    config = ClassifierConfig(**{"d_model": 16, "n_layers": 2, "n_classes": 4, "pattern": "min_gru"} | kind | options)
    return SequenceClassifier(config).double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pattern", ["min_gru", "s4d", [{"name": "s4", "d_state": 4}, "lru"]], ids=str)
def test_however_a_batch_arrives_it_counts_true_tokens(pooling, bidirectional, pattern):
    model = build(pooling=pooling, bidirectional=bidirectional, pattern=pattern)
    longest = max(LENGTHS)
    ids = tokens(len(LENGTHS), longest)
    rows = [row[:length] for row, length in zip(ids, LENGTHS, strict=True)]
    alone = torch.cat([model(row[None]) for row in rows])
    packed = torch.cat(rows)[None]
    places = torch.arange(longest)
    counts = torch.tensor(LENGTHS)[:, None]
    left = torch.stack([torch.roll(row, longest - length) for row, length in zip(ids, LENGTHS, strict=True)])
    for scores in (
        model(packed, cu_seqlens=boundaries(LENGTHS)),
        model(packed, cu_seqlens=Packing.from_lengths(LENGTHS)),
        model(ids, lengths=LENGTHS),
        model(ids, attention_mask=places < counts),
        model(left, attention_mask=places >= longest - counts),
    ):
        torch.testing.assert_close(scores, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_what_is_pooled(pooling):
    model = build(pooling=pooling)
    ids = tokens(2, 6)
    hidden = model.backbone(model.embedding(ids))[0]
    pooled = {"mean": hidden.mean(1), "last": hidden[:, -1], "first": hidden[:, 0]}[pooling]
    torch.testing.assert_close(model(ids), pooled @ model.head.weight.T + model.head.bias)


def test_the_mean_of_many_narrow_outputs():
    """Added up in bfloat16, 4096 ones are 256."""
    model = build(pattern="min_gru", mlp="none").to(torch.bfloat16)
    hidden = 1 + 0.01 * inputs((1, 4096, 16), torch.bfloat16)
    pooled = model._pool(hidden, Packing.from_lengths((4096,)))
    torch.testing.assert_close(pooled, hidden.float().mean(1).to(torch.bfloat16))


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_sequences_without_tokens_have_the_output_s_bias(pooling):
    model = build(pooling=pooling)
    none = torch.zeros(1, 0, dtype=torch.int64)
    for scores in (model(none), model(none, cu_seqlens=boundaries((0, 0)))):
        torch.testing.assert_close(scores, model.head.bias.expand_as(scores))


def test_gradients_reach_every_parameter_and_equal_those_of_single_sequences():
    model = build(n_features=3, pooling="mean", bidirectional=True, pattern="s4d")
    lengths = tuple(length for length in LENGTHS if length)
    x = inputs((1, sum(lengths), 3), torch.float64)
    labels = torch.arange(len(lengths)) % 4
    packed = torch.autograd.grad(model.loss(x, labels, cu_seqlens=boundaries(lengths)), list(model.parameters()))
    alone = sum(model.loss(one, labels[i : i + 1]) for i, one in enumerate(x.split(lengths, 1))) / len(lengths)
    for one, other in zip(packed, torch.autograd.grad(alone, list(model.parameters())), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_the_loss_is_the_mean_cross_entropy():
    model = build()
    ids, labels = tokens(5, 6), torch.tensor([0, 1, 2, 3, 0])
    expected = -model(ids).log_softmax(-1)[torch.arange(5), labels].mean()
    torch.testing.assert_close(model.loss(ids, labels), expected)


def test_two_directions_are_one_mixer_a_block():
    model = build(bidirectional=True, pattern="s4d")
    assert all(isinstance(block.mixer, Bidirectional) and block.mixer.joint for block in model.backbone.blocks)


def test_saving_and_loading(tmp_path):
    model = build(pattern=[{"name": "s4d", "d_state": 4}], bidirectional=True).float()
    hub.save_pretrained(model, tmp_path / "model")
    loaded = hub.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens(2, 5)), model(tokens(2, 5)))


@pytest.mark.parametrize("packed", [False, True])
def test_it_compiles_for_all_lengths(packed):
    model = build(pattern="s4d", bidirectional=True).float()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((5, 9), (70, 3), (64, 66)):
            ids = tokens(1, sum(lengths)) if packed else tokens(2, lengths[0])
            options = {"cu_seqlens": Packing.from_lengths(lengths)} if packed else {}
            torch.testing.assert_close(compiled(ids, **options), model(ids, **options))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: build(vocab_size=None), ValueError, "give vocab_size or n_features, one of them, got None and None"),
        (lambda: build(vocab_size=3, n_features=2), ValueError, "one of them, got 3 and 2"),
        (lambda: build(pooling="max"), ValueError, "there is no pooling 'max'"),
        (lambda: build(bidirectional=1), TypeError, "bidirectional must be true or false"),
        (lambda: build(n_classes=0), ValueError, "n_classes must be at least 1, got 0"),
        (lambda: build()(torch.zeros(2, 3)), TypeError, "x must be int64 or int32, got torch.float32"),
        (lambda: build()(torch.full((1, 3), 11)), ValueError, "ids must lie between 0 and 10"),
        (lambda: build(n_features=3)(tokens(2, 3)), TypeError, "x must be a Tensor of numbers, got torch.int64"),
        (
            lambda: build(n_features=3)(torch.zeros(2, 5, 2).double()),
            ValueError,
            r"x must have shape \(B, T, F\) with F = 3, got \(2, 5, 2\)",
        ),
        (
            lambda: build().loss(tokens(3, 4), torch.zeros(2).long()),
            ValueError,
            "one for each of the 3 sequences, got 2",
        ),
        (lambda: build()(tokens(2, 4), lengths=[1, 2], attention_mask=tokens(2, 4)), ValueError, "at most one of"),
        (
            lambda: build()(tokens(2, 4), attention_mask=tokens(2, 3)),
            ValueError,
            r"must have shape \(B, T\) = \(2, 4\)",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
