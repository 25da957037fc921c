"""G3: packed sequences give what each gives alone: outputs, final states, gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from seqzoo import Packing, join
from seqzoo.testing import FEW_LENGTHS, Subject, boundaries, differentiable, inputs, parameters_of, random_state

TOTAL, ROWS = sum(FEW_LENGTHS), len(FEW_LENGTHS)


def gradients(loss: torch.Tensor, sources: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(sources.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(sources, found, strict=True))


def packed(mixer, x, state, cu_seqlens):
    y, final = mixer(x, state, cu_seqlens=cu_seqlens, return_state="state" not in mixer.limits)
    return y, final or {}


def separate(mixer, x, state, cu_seqlens):
    outputs, states = [], []
    for index, (start, end) in enumerate(itertools.pairwise(boundaries(FEW_LENGTHS).tolist())):
        one = None if state is None else {key: value[index : index + 1] for key, value in state.items()}
        y, final = mixer(x[:, start:end], one, return_state="state" not in mixer.limits)
        outputs.append(y)
        states.append(final or {})
    return torch.cat(outputs, 1), join(states)


@pytest.mark.parametrize("given", [False, True], ids=["no state", "states given"])
@pytest.mark.parametrize("one_by_one", [False, True], ids=["own", "split and reassembled"])
def test_packed_is_separate(subject: Subject, dtype, device, given, one_by_one):
    mixer = subject.make(dtype, device)
    if given and "state" in mixer.limits:
        pytest.skip("test_limits asserts the error")
    if one_by_one:
        mixer.packs = False
    x = inputs((1, TOTAL, 16), dtype, device).requires_grad_()
    state = random_state(mixer, ROWS, x) if given else None
    leaves = {} if state is None else {k: v.requires_grad_() for k, v in state.items() if differentiable(v)}
    results = []
    for way in (packed, separate):
        y, final = way(mixer, x, state, boundaries(FEW_LENGTHS).to(device))
        loss = (y * inputs(tuple(y.shape), dtype, device, 5)).sum()
        for _key, value in final.items():
            if differentiable(value):
                loss = loss + (value * inputs(tuple(value.shape), value.dtype, device, 6)).sum().real
        grads = gradients(loss, {"x": x} | leaves | parameters_of(mixer))
        results.append({"y": y.detach()} | {f"state {k}": v.detach() for k, v in final.items()} | grads)
    tolerance = 1e-9 if dtype is torch.float64 else 2e-5
    for name, expected in results[1].items():
        scale = expected.abs().max().item() or 1.0
        assert (results[0][name] - expected).abs().max().item() <= tolerance * scale, name


def test_an_empty_sequence_returns_the_state_it_was_given(subject: Subject, dtype, device):
    mixer = subject.make(dtype, device)
    if "state" in mixer.limits:
        pytest.skip("test_limits asserts the error")
    x = inputs((1, TOTAL, 16), dtype, device)
    state = random_state(mixer, ROWS, x)
    _, final = mixer(x, state, cu_seqlens=boundaries(FEW_LENGTHS).to(device), return_state=True)
    for row, length in enumerate(FEW_LENGTHS):
        # side by side, since a cache has room for the longest sequence
        pair = join([{key: value[row : row + 1] for key, value in one.items()} for one in (state, final)])
        assert all(torch.equal(given, found) for given, found in pair.values()) == (length == 0)


def test_a_packing_and_its_tensor_give_the_same_bits(subject: Subject, dtype, device):
    mixer = subject.make(dtype, device)
    x = inputs((1, TOTAL, 16), dtype, device)
    bare, _ = mixer(x, cu_seqlens=boundaries(FEW_LENGTHS).to(device))
    for packing in (
        Packing.from_lengths(FEW_LENGTHS, device=device),
        Packing.from_cu_seqlens(boundaries(FEW_LENGTHS).to(device), TOTAL),
    ):
        assert torch.equal(bare, mixer(x, cu_seqlens=packing)[0])


def test_what_a_mixer_does_not_know_is_not_swallowed(subject: Subject, device):
    mixer = subject.make(torch.float64, device)
    x = inputs((1, 4, 16), torch.float64, device)
    for word in ("seq_idx", "attention_mask", "cu_seqlen"):
        with pytest.raises(TypeError, match=word):
            mixer(x, **{word: None})
