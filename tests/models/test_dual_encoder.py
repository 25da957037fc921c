"""The classifier of pairs: the same encoder for both, however a batch arrives, saving, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqzoo import hub
from seqzoo.models import ClassifierConfig, DualEncoder, SequenceClassifier
from seqzoo.packing import Packing
from seqzoo.testing import boundaries, inputs

# three pairs: 3 with 0, 7 with 5, 1 with 4
LENGTHS = (3, 7, 1, 0, 5, 4)


def build(**options) -> DualEncoder:
    torch.manual_seed(0)
    kind = {} if "n_features" in options else {"vocab_size": 11}
    config = ClassifierConfig(**{"d_model": 16, "n_layers": 2, "n_classes": 4, "pattern": "min_gru"} | kind | options)
    return DualEncoder(config).double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pattern", ["min_gru", "s4d"])
def test_however_a_batch_arrives_a_pair_is_that_pair_alone(pooling, bidirectional, pattern):
    model = build(pooling=pooling, bidirectional=bidirectional, pattern=pattern)
    longest = max(LENGTHS)
    ids = tokens(len(LENGTHS), longest)
    rows = [row[:length] for row, length in zip(ids, LENGTHS, strict=True)]
    pairs = list(zip(rows[:3], rows[3:], strict=True))
    alone = torch.cat(
        [model(torch.cat(pair)[None], cu_seqlens=boundaries([len(one) for one in pair])) for pair in pairs]
    )
    assert alone.shape == (3, 4)
    packed = torch.cat(rows)[None]
    counts = torch.tensor(LENGTHS)[:, None]
    for scores in (
        model(packed, cu_seqlens=boundaries(LENGTHS)),
        model(packed, cu_seqlens=Packing.from_lengths(LENGTHS)),
        model(ids, lengths=LENGTHS),
        model(ids, attention_mask=torch.arange(longest) < counts),
    ):
        torch.testing.assert_close(scores, alone, rtol=1e-9, atol=1e-9)


def test_what_is_classified():
    model = build()
    first, second = tokens(2, 6), tokens(4, 6)[2:]
    a, b = (model.backbone(model.embedding(ids))[0].mean(1) for ids in (first, second))
    features = torch.cat((a, b, a * b, a - b), -1)
    hidden = F.gelu(features @ model.head.hidden.weight.T + model.head.hidden.bias)
    expected = hidden @ model.head.out.weight.T + model.head.out.bias
    torch.testing.assert_close(model(torch.cat((first, second))), expected)
    assert not torch.allclose(model(torch.cat((second, first))), expected)


def test_gradients_reach_every_parameter_through_both():
    model = build(n_features=3, bidirectional=True, pattern="s4d")
    x, labels = inputs((4, 5, 3), torch.float64).requires_grad_(), torch.tensor([1, 3])
    loss = model.loss(x, labels)
    torch.testing.assert_close(loss, F.cross_entropy(model(x), labels))
    for gradient in torch.autograd.grad(loss, [x, *model.parameters()]):
        assert gradient.abs().max() > 0


def test_it_has_the_encoder_of_one_sequence():
    """The two sequences share all weights: nothing is there twice."""
    model = build()
    single = SequenceClassifier(model.config)
    assert {name for name, _ in model.named_parameters() if not name.startswith("head.")} == {
        name for name, _ in single.named_parameters() if not name.startswith("head.")
    }


def test_saving_and_loading(tmp_path):
    model = build(pattern=[{"name": "s4d", "d_state": 4}], bidirectional=True).float()
    hub.save_pretrained(model, tmp_path / "model")
    loaded = hub.from_pretrained(tmp_path / "model")
    assert type(loaded) is DualEncoder
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens(2, 5)), model(tokens(2, 5)))


def test_it_is_initialised_anew():
    model = build().float()
    with torch.device("meta"):
        empty = DualEncoder(model.config)
    empty.to_empty(device="cpu")
    torch.manual_seed(3)
    empty.reset_parameters()
    torch.manual_seed(3)
    model.reset_parameters()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, empty.get_parameter(name)), name


@pytest.mark.parametrize("packed", [False, True])
def test_it_compiles_for_all_lengths(packed):
    model = build(n_layers=1, mlp="none").float()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((5, 9), (70, 3), (64, 66)):
            ids = tokens(1, sum(lengths)) if packed else tokens(4, lengths[0])
            options = {"cu_seqlens": Packing.from_lengths(lengths)} if packed else {}
            torch.testing.assert_close(compiled(ids, **options), model(ids, **options))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build()(tokens(3, 4)), "an even number, got 3"),
        (lambda: build()(tokens(1, 4), cu_seqlens=boundaries((1, 2, 1))), "an even number, got 3"),
        (lambda: build().loss(tokens(4, 4), torch.zeros(4).long()), "one for each of the 2 sequences, got 4"),
        (lambda: build()(torch.full((2, 3), 11)), "ids must lie between 0 and 10"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
