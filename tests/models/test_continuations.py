"""Continuations behind a prompt that is read once, against each sequence read as a whole."""

from __future__ import annotations

import pytest
import torch

from seqzoo.models import log_likelihoods

LENGTHS = (5, 1, 9)
CONTINUED = ((3, 1), (4,), (1, 6, 2))


def drawn(tokens):
    prompts = [tokens(length, seed=index) for index, length in enumerate(LENGTHS)]
    several = [
        [tokens(length, seed=10 * row + index + 7) for index, length in enumerate(lengths)]
        for row, lengths in enumerate(CONTINUED)
    ]
    return prompts, several


def whole(model, prompt, continuation):
    ids = torch.cat((prompt, continuation))
    scores = model(ids[None, :-1])[0][0].log_softmax(-1)[len(prompt) - 1 :]
    return scores.gather(1, continuation[:, None]).sum()


def test_it_is_what_whole_sequences_give(mixer, build, tokens):
    model = build(mixer)
    prompts, several = drawn(tokens)
    found = torch.cat(log_likelihoods(model, prompts, several))
    expected = torch.stack(
        [whole(model, prompt, one) for prompt, rows in zip(prompts, several, strict=True) for one in rows]
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(-1, 1, len(found)).double()
    sources = list(model.parameters())
    gradients = [torch.autograd.grad((value * weights).sum(), sources) for value in (found, expected)]
    for actual, wanted in zip(*gradients, strict=True):
        assert (actual - wanted).abs().max() <= 1e-8 * max(wanted.abs().max().item(), 1e-3)


def test_the_prompts_are_read_once(build, tokens):
    model = build()
    rows = []
    model.embedding.register_forward_hook(lambda _, given, out: rows.append(given[0].numel()))
    prompts, several = drawn(tokens)
    log_likelihoods(model, prompts, several)
    continued = sum(length - 1 for lengths in CONTINUED for length in lengths)
    assert sum(rows) == sum(LENGTHS) + continued


def test_nothing_to_continue_with(build, tokens):
    found = log_likelihoods(build(), [tokens(3), tokens(2)], [[], []])
    assert [tuple(one.shape) for one in found] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (([3], []), "a list of continuations for each of 1 prompts, got 0"),
        (([0], [[2]]), r"a prompt must be tokens of shape \(T,\), T at least 1, got \(0,\) at 0"),
        (([3], [[2, 0]]), r"a continuation must be tokens .* got \(0,\) at 1"),
    ],
)
def test_bad_input(lengths, words, build, tokens):
    prompts = [tokens(length) for length in lengths[0]]
    several = [[tokens(length) for length in row] for row in lengths[1]]
    with pytest.raises(ValueError, match=words):
        log_likelihoods(build(), prompts, several)


@pytest.mark.parametrize("wrong", [23, -1])
@pytest.mark.parametrize("place", [0, 1])
def test_tokens_outside_the_vocabulary(wrong, place, build, tokens):
    # the last token of a continuation is predicted alone, and so is the only one of another
    for length in (2, 1):
        row = tokens(length)
        row[min(place, length - 1)] = wrong
        with pytest.raises(ValueError, match="ids must lie between 0 and 22, got"):
            log_likelihoods(build(), [tokens(3)], [[row]])


def test_tokens_that_are_no_integers(build, tokens):
    with pytest.raises(TypeError, match=r"continuation 1 must be int64 or int32, got torch.float32"):
        log_likelihoods(build(), [tokens(3)], [[tokens(2), torch.tensor([1.7])]])
    with pytest.raises(TypeError, match=r"prompt 0 must be a Tensor, got list"):
        log_likelihoods(build(), [[1, 2]], [[tokens(2)]])  # pyright: ignore - that is refused
