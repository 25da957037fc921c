"""Generation: greedy, sampled, streamed, of unequal prompts, for as long as one likes."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch

from seqzoo.models import LanguageModel, generate, stream
from seqzoo.models.generation import sample

Build = Callable[..., LanguageModel]
Tokens = Callable[..., torch.Tensor]


def slow_greedy(model: LanguageModel, prompt: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """The whole sequence read anew for every token."""
    ids = prompt[None]
    for _ in range(n_tokens):
        ids = torch.cat((ids, model(ids)[0][:, -1:].argmax(-1)), 1)
    return ids[0, len(prompt) :]


def prompts_of(tokens: Tokens, *lengths: int) -> list[torch.Tensor]:
    return [tokens(length, seed=seed) for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("options", [{}, {"max_positions": 19}])
def test_greedy_is_the_argmax_of_the_full_forward(mixer: str, options: dict[str, Any], build: Build, tokens: Tokens):
    # tied or large embeddings would make a fresh model repeat its last token, few tokens a short cycle of them
    model = build(mixer, tie_embeddings=False, vocab_size=197, **options)
    with torch.no_grad():
        model.embedding.weight.mul_(0.35)
    prompts = prompts_of(tokens, 5, 1, 12, 3, 8, 2)
    got = generate(model, prompts, 8, temperature=0)
    assert got.shape == (6, 8)
    assert got.dtype == torch.int64
    for row, prompt in zip(got, prompts, strict=True):
        assert torch.equal(row, slow_greedy(model, prompt, 8))
    assert len(got.unique()) > 4, "a model that repeats itself would hide errors"


def test_packed_prompts_continue_as_each_alone(mixer: str, build: Build, tokens: Tokens):
    model, prompts = build(mixer, tie_embeddings=False), prompts_of(tokens, 3, 7, 4)
    together = generate(model, prompts, 6, temperature=0)
    alone = torch.cat([generate(model, [prompt], 6, temperature=0) for prompt in prompts])
    assert torch.equal(together, alone)


def test_prompts_are_read_in_one_call(build: Build, tokens: Tokens):
    model, calls = build(), []
    model.backbone.register_forward_hook(lambda module, inputs, output: calls.append(tuple(inputs[0].shape)))
    next(stream(model, prompts_of(tokens, 3, 7, 4), 6))
    next(stream(model, prompts_of(tokens, 5, 5), 6))
    next(stream(model, tokens(2, 5).int(), 6))
    assert calls == [(1, 14, 16), (2, 5, 16), (2, 5, 16)]


def test_generate_is_the_stream(build: Build, tokens: Tokens):
    model, prompts = build(), prompts_of(tokens, 3, 7)
    pieces = list(stream(model, prompts, 5, seed=3))
    assert torch.equal(torch.stack(pieces, 1), generate(model, prompts, 5, seed=3))
    assert not torch.equal(torch.stack(pieces, 1), generate(model, prompts, 5, seed=4))
    source = torch.Generator().manual_seed(3)
    assert torch.equal(torch.stack(pieces, 1), generate(model, prompts, 5, generator=source))
    torch.manual_seed(3)
    assert torch.equal(torch.stack(pieces, 1), generate(model, prompts, 5))


def test_the_stream_leaves_the_caller_alone(build: Build, tokens: Tokens):
    model = build(dropout=0.5).train()
    model.backbone.blocks[0].eval()
    expected = generate(build(dropout=0.5), tokens(2, 4), 3, temperature=0)
    before = [module.training for module in model.modules()]
    seen = []
    for token in stream(model, tokens(2, 4), 3, temperature=0):
        assert [module.training for module in model.modules()] == before
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        model.loss(token[None], token[None]).backward()
        seen.append(token)
    assert torch.equal(torch.stack(seen, 1), expected), (
        "dropout was on, or a step wrote into a token that was given out"
    )


def test_mistakes_show_before_the_first_token(build: Build, tokens: Tokens):
    with pytest.raises(ValueError, match="top_k"):
        stream(build(), tokens(1, 2), 3, top_k=0)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (([],), {}, ValueError, "at least one prompt"),
        (([torch.tensor([1]), torch.tensor([], dtype=torch.int64)],), {}, ValueError, "at index 1 is empty"),
        ((torch.zeros(2, 0, dtype=torch.int64),), {}, ValueError, "at index 0 is empty"),
        ((torch.zeros(3, dtype=torch.int64),), {}, ValueError, r"shape \(B, T\) or be a list of \(T,\), got \(3,\)"),
        (([torch.zeros(1, 3, dtype=torch.int64)],), {}, ValueError, r"shape \(T,\), got \(1, 3\) at index 0"),
        (([torch.zeros(3)],), {}, TypeError, r"int64 or int32 Tensor, got torch.float32 at index 0"),
        (([[1, 2]],), {}, TypeError, "int64 or int32 Tensor, got list at index 0"),
        ((torch.ones(1, 3, dtype=torch.int64), 0), {}, ValueError, "max_new_tokens must be a positive integer, got 0"),
        ((torch.ones(1, 3, dtype=torch.int64), 2.0), {}, ValueError, r"max_new_tokens .* got 2.0"),
        ((torch.ones(1, 3, dtype=torch.int64), 7), {}, ValueError, "need 9 positions, the model has max_positions=8"),
        ((torch.full((1, 3), 23),), {}, ValueError, "ids must lie between 0 and 22"),
        ((), {"temperature": -0.1}, ValueError, "temperature .* got -0.1"),
        ((), {"temperature": float("nan")}, ValueError, "temperature .* got nan"),
        ((), {"top_k": 24}, ValueError, "top_k must be an integer from 1 to the 23 tokens there are, got 24"),
        ((), {"top_k": 2.0}, ValueError, r"top_k .* got 2.0"),
        ((), {"top_k": True, "temperature": 0}, ValueError, "top_k must be a number, got True"),
        ((), {"temperature": True}, ValueError, "temperature must be a number, got True"),
        ((), {"top_p": True}, ValueError, "top_p must be a number, got True"),
        ((), {"top_p": 0.0}, ValueError, r"top_p must be above 0 and at most 1, got 0.0"),
        ((), {"top_p": 1.1}, ValueError, r"top_p .* got 1.1"),
        ((), {"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator exclude each other"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], words: str, build: Build
):
    filled = [*arguments, *(torch.ones(1, 3, dtype=torch.int64), 2)[len(arguments) :]]
    with pytest.raises(error, match=words):
        generate(build(max_positions=8), *filled, **options)


PROBABILITIES = torch.tensor([0.08, 0.4, 0.02, 0.3, 0.2])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.08, 0.4, 0.02, 0.3, 0.2]),
        ({"top_k": 5}, [0.08, 0.4, 0.02, 0.3, 0.2]),
        ({"top_p": 1.0}, [0.08, 0.4, 0.02, 0.3, 0.2]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.75}, [0, 4 / 9, 0, 3 / 9, 2 / 9]),
        # of the two that are left the first alone holds 4 / 7
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 0.5}, [0.0064, 0.16, 0.0004, 0.09, 0.04]),
        ({"temperature": 2.0, "top_k": 2}, [0, 0.4**0.5, 0, 0.3**0.5, 0]),
        ({"temperature": 1e-30}, [0, 1, 0, 0, 0]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
    ],
)
def test_samples_have_the_distribution(options: dict[str, Any], expected: list[float]):
    n_draws = 40000
    # any constant may be added to logits
    logits = (PROBABILITIES.log() + 3).expand(n_draws, -1)
    drawn = sample(logits, **options, generator=torch.Generator().manual_seed(0))
    frequencies = drawn.bincount(minlength=5) / n_draws
    wanted = torch.tensor(expected) / sum(expected)
    # five standard deviations; none where the probability is 0 or 1
    deviation = (wanted * (1 - wanted) / n_draws).sqrt()
    assert ((frequencies - wanted).abs() <= 5 * deviation + 1e-7).all(), frequencies


def test_half_precision_logits_are_sampled_in_float32():
    """exp of a spread of 20 in bfloat16 would round the probabilities to 8 bits; float16 logits reach 65504."""
    logits = torch.tensor([[60000.0, 59980.0, -60000.0]], dtype=torch.float16).expand(1000, -1)
    assert sample(logits, temperature=0.1, generator=torch.Generator().manual_seed(0)).eq(0).all()


def peak_memory() -> int:
    """Of the process, in KiB."""
    gc.collect()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.slow
def test_a_token_costs_the_same_at_position_1000_and_100000(build: Build, tokens: Tokens):
    model = build(dtype=torch.float32, n_layers=1)
    old, young = (stream(model, tokens(1, 4), 101_000, temperature=0) for _ in range(2))
    deque(islice(old, 1000), maxlen=0)
    before = peak_memory()
    deque(islice(old, 99_000), maxlen=0)
    # a cache of 16 numbers a token, doubled when full, would reach 12 MB
    assert peak_memory() - before < 4 * 1024
    deque(islice(young, 1000), maxlen=0)
    times: dict[int, list[float]] = {0: [], 1: []}
    # in turns, so that what else the machine does meets both alike
    for _ in range(400):
        for which, tokens_of in enumerate((old, young)):
            start = time.perf_counter()
            next(tokens_of)
            times[which].append(time.perf_counter() - start)
    assert statistics.median(times[0]) < 1.25 * statistics.median(times[1])


def test_a_state_keeps_its_size(mixer: str, build: Build, tokens: Tokens):
    from seqzoo import create

    if create(mixer, d_model=16).state_size(1) != create(mixer, d_model=16).state_size(1000):
        pytest.skip(f"{mixer} keeps a cache that grows")
    model = build(mixer)
    _, state = model.prefill(tokens(2, 3))
    sizes = {key: value.shape for one in state for key, value in one.items()}
    for _ in range(20):
        _, state = model.step(tokens(2), state)
    assert {key: value.shape for one in state for key, value in one.items()} == sizes
