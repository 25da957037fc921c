"""RecurrentMemory: its definition, what goes from segment to segment, and how far gradients go back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seqzoo.hub import from_pretrained, save_pretrained
from seqzoo.models import LanguageModel, ModelConfig, RecurrentMemory, RecurrentMemoryConfig

Build = Callable[..., LanguageModel]
Tokens = Callable[..., torch.Tensor]
PATTERNS: list[Any] = ["min_gru", ["mamba", "attention"], "mixture_of_memories"]


@pytest.fixture
def around(build: Build) -> Callable[..., RecurrentMemory]:
    """A memory that differs from zero around a small model."""

    def make(pattern: Any = "min_gru", options: dict[str, Any] | None = None, **memory: Any) -> RecurrentMemory:
        values = {"segment_length": 4, "n_memory": 3, **memory}
        made = RecurrentMemory.around(build(pattern, **(options or {})), **values)
        with torch.no_grad():
            made.memory.normal_(generator=torch.Generator().manual_seed(1))
        return made

    return make


def assert_near(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_its_definition(pattern: Any, around: Callable[..., RecurrentMemory], tokens: Tokens):
    model, ids, labels = around(pattern, {"auxiliary_weight": 0.5}), tokens(2, 10), tokens(2, 10, seed=1)
    logits, state = model(ids, return_state=True)
    memory, expected, auxiliary = model.memory.expand(2, 3, 16), [], 0
    for start, end in ((0, 4), (4, 8), (8, 10)):
        x = model.model.embedding(ids[:, start:end])
        hidden, _, loss = model.model.backbone(torch.cat((memory, x, memory), 1))
        expected.append(model.model.logits(hidden[:, 3:-3]))
        memory, auxiliary = hidden[:, -3:], auxiliary + loss * (end - start) / 10
    assert_near(logits, torch.cat(expected, 1))
    assert_near(state, {"memory": memory})
    labels[1, 3] = -100
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert_near(model.loss(ids, labels), plain + 0.5 * auxiliary)
    assert model(ids)[1] is None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_memory_segments_are_independent(pattern: Any, around: Callable[..., RecurrentMemory], tokens: Tokens):
    options = {"auxiliary_weight": 0.0}
    model, ids, labels = around(pattern, options, n_memory=0), tokens(2, 12), tokens(2, 12, seed=1)
    apart, _ = model.model(ids.view(6, 4))
    assert_near(model(ids)[0], apart.view(2, 12, -1))
    assert_near(model.loss(ids, labels), model.model.loss(ids.view(6, 4), labels.view(6, 4)))


def test_calls_chain(around: Callable[..., RecurrentMemory], tokens: Tokens):
    model, ids, labels = around(["mamba", "attention"]), tokens(2, 14), tokens(2, 14, seed=1)
    whole, final = model(ids, return_state=True)
    first, state = model(ids[:, :8], return_state=True)
    second, after = model(ids[:, 8:], state, return_state=True)
    assert_near(torch.cat((first, second), 1), whole)
    assert_near(after, final)
    one, state = model.loss(ids[:, :8], labels[:, :8], return_state=True)
    two = model.loss(ids[:, 8:], labels[:, 8:], state)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model.loss(ids, labels), parameters)
    assert_near(torch.autograd.grad((8 * one + 6 * two) / 14, parameters), expected)
    assert_near(model(ids, model.init_state(2))[0], whole)
    empty, same = model(ids[:, :0], state, return_state=True)
    assert empty.shape == (2, 0, 23)
    assert_near(same, state)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_causal(pattern: Any, around: Callable[..., RecurrentMemory], tokens: Tokens):
    model, ids = around(pattern), tokens(1, 12)
    other = ids.clone()
    other[0, 6] = (other[0, 6] + 1) % 23
    with torch.no_grad():
        one, two = model(ids)[0], model(other)[0]
    assert_near(one[:, :6], two[:, :6])
    assert ((one - two)[:, 6:].abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize(("every", "reached"), [(None, 0), (1, 7), (2, 6), (3, 6), (4, 4), (5, 5), (8, 0)])
def test_gradients_reach_as_far_back_as_is_told(
    every: int | None, reached: int, around: Callable[..., RecurrentMemory], tokens: Tokens
):
    """Of the loss of the last of eight segments, in the embeddings of each."""
    model, ids = around(detach_every=every), tokens(2, 32)
    labels = torch.full_like(ids, -100)
    labels[:, 28:] = ids[:, :4]
    seen: list[torch.Tensor] = []

    def watch(module: Any, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    model.model.embedding.register_forward_hook(watch)
    loss = model.loss(ids, labels)
    loss.backward()
    found = [x.grad is not None and bool(x.grad.any()) for x in seen]
    assert found == [index >= reached for index in range(8)]
    assert bool(model.memory.grad is not None and model.memory.grad.any()) == (reached == 0)
    # and the first token has its say in the last segment, whatever the gradients
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 23
    assert not torch.equal(model.loss(other, labels), loss)


def test_it_learns_to_recall_across_segments():
    """The first of 12 tokens, asked for at the end of the third segment: chance without a memory."""
    losses = {}
    for n_memory in (0, 2):
        torch.manual_seed(0)
        config = RecurrentMemoryConfig(
            vocab_size=6, d_model=32, n_layers=2, pattern="min_gru", segment_length=4, n_memory=n_memory
        )
        model = RecurrentMemory(config)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        recent = []
        for _ in range(200):
            ids = torch.randint(2, 6, (32, 12))
            labels = torch.full_like(ids, -100)
            ids[:, 0] = torch.randint(0, 2, (32,))
            labels[:, -1] = ids[:, 0]
            loss = model.loss(ids, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recent.append(loss.item())
        losses[n_memory] = sum(recent[-20:]) / 20
    assert losses[0] > 0.6
    assert losses[2] < 0.1


def test_it_saves_and_loads(around: Callable[..., RecurrentMemory], tokens: Tokens, tmp_path: Path):
    model = around(["mamba", "attention"], detach_every=2)
    save_pretrained(model, tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    assert type(again) is RecurrentMemory
    assert again.config == model.config
    assert torch.equal(again(tokens(2, 9))[0], model(tokens(2, 9))[0])
    assert RecurrentMemoryConfig.from_json(model.config.to_json()) == model.config


def test_it_is_initialised_from_the_meta_device():
    config = RecurrentMemoryConfig(vocab_size=9, d_model=16, n_layers=1, pattern="mamba", segment_length=4)
    with torch.device("meta"):
        model = RecurrentMemory(config)
    model.to_empty(device="cpu")
    model.reset_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.memory.std().item() == pytest.approx(0.02, rel=0.3)


def test_half_precision(around: Callable[..., RecurrentMemory], tokens: Tokens):
    ids, labels = tokens(2, 9), tokens(2, 9, seed=1)
    expected = around("mamba").loss(ids, labels).item()
    model = around("mamba").bfloat16()
    assert model.loss(ids, labels, model.init_state(2)).item() == pytest.approx(expected, rel=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        loss, state = around("mamba").float().loss(ids, labels, return_state=True)
    assert loss.item() == pytest.approx(expected, rel=0.05)
    assert state["memory"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"segment_length": 0}, ValueError, "segment_length must be at least 1, got 0"),
        ({"n_memory": -1}, ValueError, "n_memory must be at least 0, got -1"),
        ({"n_memory": 2.0}, TypeError, "n_memory must be an integer, got 2.0"),
        ({"detach_every": 0}, ValueError, "detach_every must be at least 1, got 0"),
        ({"detach_evry": 1}, ValueError, "no 'detach_evry'; did you mean detach_every"),
        ({"max_positions": 9}, ValueError, "max_positions must be at least 10, a segment and its memory.*got 9"),
    ],
)
def test_wrong_values(options: dict[str, Any], error: type[Exception], words: str, build: Build):
    with pytest.raises(error, match=words):
        RecurrentMemory.around(build(), **{"segment_length": 4, "n_memory": 3, **options})


def test_wrong_arguments(around: Callable[..., RecurrentMemory], build: Build, tokens: Tokens):
    model, ids = around(), tokens(2, 5)
    with pytest.raises(TypeError, match="needs segment_length"):
        RecurrentMemory.around(build())
    with pytest.raises(ValueError, match=r"state\['memory'\] must have shape \(2, 3, 16\), got \(1, 3, 16\)"):
        model(ids, model.init_state(1))
    with pytest.raises(ValueError, match=r"the state must be {'memory': Tensor}, got list"):
        model(ids, model.model.init_state(2))
    with pytest.raises(ValueError, match=r"the state must be {'memory': Tensor}, got \['h'\]"):
        model(ids, model.model.init_state(2)[0])
    with pytest.raises(TypeError, match=r"state\['memory'\] must be a Tensor, got list"):
        model(ids, {"memory": [0.0]})
    with pytest.raises(ValueError, match=r"state\['memory'\] is on meta, the model on cpu; move one of them"):
        model(ids, {"memory": model.init_state(2)["memory"].to("meta")})
    with pytest.raises(TypeError, match="a memory goes around a LanguageModel, got RecurrentMemory"):
        RecurrentMemory.around(model, segment_length=4)  # pyright: ignore - that is refused
    with pytest.raises(TypeError, match=r"must be torch.float64, got torch.float32"):
        model(ids, model.init_state(2, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"labels must have the shape of ids, \(2, 5\), got \(2, 4\)"):
        model.loss(ids, ids[:, 1:])
    with pytest.raises(ValueError, match="ids must lie between 0 and 22"):
        model(ids + 23)
    assert isinstance(model.model.config, ModelConfig)
