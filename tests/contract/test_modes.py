"""G1 and G2: the whole sequence is its pieces with the state handed on, token by token too; with all gradients."""

from __future__ import annotations

import functools

import pytest
import torch

from seqzoo import LimitError, SequenceMixer
from seqzoo.kernels import dispatch
from seqzoo.kernels.checks import COMPLEX_OF
from seqzoo.testing import Subject, differentiable, excess, inputs, nearby, parameters_of, random_state

LENGTH = 11
CUTS = ((11,), (4, 7), (1, 1, 9), (3, 0, 5, 3))


def skip_stateless(mixer: SequenceMixer) -> None:
    if "state" in mixer.limits or "step" in mixer.limits:
        pytest.skip("test_limits asserts the error")


def run(mixer: SequenceMixer, x: torch.Tensor, state: dict, cuts: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    """Outputs, final state and all gradients; ``cuts`` None decodes token by token."""
    x = x.clone().requires_grad_()
    entering = {k: v.clone().requires_grad_(differentiable(v)) for k, v in state.items()}
    pieces, current = [], entering
    if cuts is None:
        for token in x.unbind(1):
            y, current = mixer.step(token, current)
            pieces.append(y[:, None])
    else:
        for piece in x.split(cuts, dim=1):
            y, current = mixer(piece, current, return_state=True)
            pieces.append(y)
    y = torch.cat(pieces, dim=1)
    outputs = {"y": y} | {f"state {k}": v for k, v in current.items() if differentiable(v)}
    weights = [inputs(tuple(out.shape), out.dtype, out.device, seed=3 + i) for i, out in enumerate(outputs.values())]
    loss = sum((out * weight).sum().real for out, weight in zip(outputs.values(), weights, strict=True))
    sources = {"x": x} | {f"initial {k}": v for k, v in entering.items() if v.requires_grad} | parameters_of(mixer)
    gradients = torch.autograd.grad(loss, list(sources.values()))
    return {k: v.detach() for k, v in outputs.items()} | {
        f"gradient of {k}": g for k, g in zip(sources, gradients, strict=True)
    }


@functools.cache
def reference(subject: Subject, dtype: torch.dtype) -> tuple[dict, dict, dict]:
    """A state, the whole sequence from it in float64, and every result in ``dtype`` at neighbouring inputs."""
    with dispatch.backend("reference"):
        x = inputs((2, LENGTH, 16), dtype)
        state = random_state(subject.make(dtype), 2, x)
        kinds = {True: COMPLEX_OF[torch.float64], False: torch.float64}
        wide = {k: v.to(kinds[v.is_complex()]) if differentiable(v) else v for k, v in state.items()}
        exact = run(subject.make(torch.float64), x.double(), wide, (LENGTH,))
        if dtype is torch.float64:
            return state, exact, {name: [value] for name, value in exact.items()}
        mixer = subject.make(dtype)
        lows = [run(mixer, value, state, (LENGTH,)) for value in (x, *(nearby(x, seed) for seed in range(3)))]
        return state, exact, {name: [low[name] for low in lows] for name in exact}


@pytest.mark.parametrize("cuts", [*CUTS, None], ids=str)
def test_pieces_and_steps_give_the_whole(subject: Subject, dtype, device, cuts):
    mixer = subject.make(dtype, device)
    skip_stateless(mixer)
    state, exact, low = reference(subject, dtype)
    state = {key: value.to(device) for key, value in state.items()}
    actual = run(mixer, inputs((2, LENGTH, 16), dtype, device), state, cuts)
    for name, value in actual.items():
        assert excess(value.cpu(), low[name], exact[name]) <= 1, name


def test_no_state_means_the_initial_one(subject: Subject, dtype, device):
    mixer = subject.make(dtype, device)
    skip_stateless(mixer)
    x = inputs((2, LENGTH, 16), dtype, device)
    y, state = mixer(x, return_state=True)
    other, final = mixer(x, mixer.init_state(2, dtype=dtype), return_state=True)
    assert torch.equal(y, other)
    assert all(torch.equal(state[key], final[key]) for key in state)
    assert mixer(x)[1] is None


def test_an_empty_piece_hands_the_state_on(subject: Subject, dtype, device):
    mixer = subject.make(dtype, device)
    skip_stateless(mixer)
    x = inputs((2, 0, 16), dtype, device)
    state = random_state(mixer, 2, x)
    y, final = mixer(x, state, return_state=True)
    assert y.shape == (2, 0, 16)
    assert all(torch.equal(state[key], final[key]) for key in state)


def test_gradcheck(subject: Subject, device):
    mixer = subject.make(torch.float64, device)
    x = inputs((1, 4, 16), torch.float64, device).requires_grad_()
    if "state" in mixer.limits:
        assert torch.autograd.gradcheck(lambda x: mixer(x)[0], (x,))
        return
    state = random_state(mixer, 1, x)
    keys = [key for key, value in state.items() if differentiable(value)]
    values = [state[key].requires_grad_() for key in keys]

    def call(x, *values):
        y, final = mixer(x, state | dict(zip(keys, values, strict=True)), return_state=True)
        return y, *(final[key] for key in keys)

    # of a large state random combinations stand for its numbers
    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=sum(value.numel() for value in values) > 1000)


def test_limits(subject: Subject, device):
    mixer = subject.make(torch.float64, device)
    x = inputs((2, 3, 16), torch.float64, device)
    calls = {
        "step": lambda: mixer.step(x[:, 0], {}),
        "state": lambda: mixer(x, return_state=True),
        "packing": lambda: mixer(x[:1], cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)),
    }
    for ability, call in calls.items():
        if ability in mixer.limits:
            with pytest.raises(LimitError, match=f"{type(mixer).__name__} has no {ability}: {mixer.limits[ability]}"):
                call()
    if "state" in mixer.limits:
        with pytest.raises(LimitError, match="has no state"):
            mixer.init_state(2)
        with pytest.raises(LimitError, match="has no state"):
            mixer(x, {})
