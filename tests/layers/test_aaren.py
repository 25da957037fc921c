"""Aaren: a softmax over the tokens so far, whatever the scores, sequences and pieces."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo import Packing, create, parameter_groups
from seqzoo.kernels import dispatch
from seqzoo.layers.aaren import Aaren, running_maximum
from seqzoo.testing import boundaries, inputs, parameters_of

WIDTH = 16
LENGTHS = [5, 0, 1, 33, 2]


def build(dtype: torch.dtype = torch.float64, **options) -> Aaren:
    torch.manual_seed(0)
    mixer = create("aaren", d_model=WIDTH, **{"n_heads": 4, **options})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return mixer.to(dtype)


def by_softmax(mixer: Aaren, x: Tensor) -> Tensor:
    """The docstring for ``(B, T, D)``: all scores, a mask, a softmax."""
    kv = F.linear(x, mixer.in_proj.weight, mixer.in_proj.bias)
    if mixer.conv1d is not None:
        taps = mixer.conv1d.weight.shape[-1]
        kv = F.silu((F.pad(kv, (0, 0, taps - 1, 0)).unfold(1, taps, 1) * mixer.conv1d.weight[:, 0]).sum(-1))
    k, v = (part.unflatten(-1, mixer.query.shape) for part in kv.chunk(2, -1))
    scores = torch.einsum("bshk,hk->bhs", k, mixer.query) / mixer.head_dim**0.5
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    weights = scores[:, :, None].expand(-1, -1, x.shape[1], -1).masked_fill(hidden, -torch.inf).softmax(-1)
    o = torch.einsum("bhts,bshk->bthk", weights, v).flatten(2)
    return F.linear(o, mixer.out_proj.weight, mixer.out_proj.bias)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("options", [{}, {"d_conv": 3, "bias": True}, {"n_heads": None, "head_dim": 8}], ids=str)
def test_the_fold_is_a_softmax(options, backend):
    mixer = build(**options)
    x = inputs((2, 37, WIDTH), torch.float64).requires_grad_()
    with dispatch.backend(backend):
        y, _ = mixer(x)
    expected = by_softmax(mixer, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights = inputs(tuple(y.shape), torch.float64, seed=5)
    sources = [x, *parameters_of(mixer).values()]
    one, other = (torch.autograd.grad((value * weights).sum(), sources) for value in (y, expected))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def steep(dtype: torch.dtype, scale: float, shift: float = 0.0) -> Aaren:
    """Scores of ``scale`` times a token's first feature, and a shift; every head has the same."""
    mixer = build(dtype, bias=True)
    with torch.no_grad():
        mixer.query.fill_(mixer.head_dim**-0.5)
        weight, bias = mixer.in_proj.weight, mixer.in_proj.bias
        weight[:WIDTH], bias[:WIDTH] = 0, shift
        weight[:WIDTH, 0] = scale
    return mixer


@pytest.mark.parametrize("order", ["mixed", "rising", "falling"])
@pytest.mark.parametrize(("scale", "shift"), [(80.0, 0.0), (1000.0, 0.0), (1.0, -500.0), (1.0, 3000.0)])
def test_scores_of_any_size(scale, shift, order):
    x = inputs((1, sum(LENGTHS), WIDTH), torch.float32)
    if order != "mixed":
        x = x[:, x[0, :, 0].argsort(descending=order == "falling")]
    mixer, wide = steep(torch.float32, scale, shift), steep(torch.float64, scale, shift)
    expected = torch.cat([by_softmax(wide, one) for one in x.double().split(LENGTHS, 1)], 1)
    y, state = mixer(x, cu_seqlens=boundaries(LENGTHS), return_state=True)
    # a score's rounding is a relative error of its weight
    size = scale * x[..., 0].abs().max() + abs(shift)
    torch.testing.assert_close(
        y.double(), expected, rtol=0, atol=float(4 * torch.finfo(torch.float32).eps * size) + 1e-5
    )
    assert all(torch.isfinite(value).all() for value in state.values())
    decoded, now = [], mixer.init_state(1)
    for token in x[:, 6:39].unbind(1):
        out, now = mixer.step(token, now)
        decoded.append(out)
    torch.testing.assert_close(torch.stack(decoded, 1), y[:, 6:39], rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(
        mixer(x, cu_seqlens=boundaries(LENGTHS))[0].square().sum(), list(mixer.parameters())
    )
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_errors_do_not_grow_with_the_length():
    x = inputs((1, 8192, WIDTH), torch.float32)
    mixer, wide = build(torch.float32), build()
    wide.load_state_dict(mixer.double().state_dict())
    mixer.float()
    y, expected = mixer(x)[0].double(), wide(x.double())[0]
    errors = [
        (one - other).abs().max().item() for one, other in zip(y.split(2048, 1), expected.split(2048, 1), strict=True)
    ]
    assert max(errors) <= 1e-5
    assert errors[-1] <= 2 * errors[0]


@pytest.mark.parametrize("given", [False, True])
def test_the_running_maximum_is_exact(given):
    scores = inputs((1, sum(LENGTHS), 3), torch.float32).requires_grad_()
    state = None
    if given:
        state = {"m": inputs((len(LENGTHS), 3), torch.float32, seed=7), "u": torch.ones(len(LENGTHS), 3)}
        # a sequence that has seen nothing, whose m says nothing
        state["u"][3] = 0
        state["m"][3] = 9.0
    packing = Packing.from_lengths(LENGTHS)
    before, m, last = running_maximum(scores, state, packing)
    for row, (start, end) in enumerate(itertools.pairwise(packing.bounds())):
        greatest = torch.full((3,), -torch.inf)
        if state is not None and row != 3:
            greatest = state["m"][row]
        for t in range(start, end):
            assert torch.equal(before[0, t], greatest)
            greatest = torch.maximum(greatest, scores[0, t])
            assert torch.equal(m[0, t], greatest)
        if end > start:
            assert torch.equal(last[row], greatest)
        elif state is not None:
            assert torch.equal(last[row], state["m"][row])
        if state is None or row == 3:
            dense = running_maximum(scores[:, start:end], None, None)
            assert torch.equal(dense[0], before[:, start:end])
            assert torch.equal(dense[1], m[:, start:end])
    gradient = torch.autograd.grad(m.sum(), scores)[0]
    assert gradient.sum() == sum(LENGTHS) * 3 - (
        0 if state is None else (m == state["m"][packing.sequence_index]).sum()
    )


def test_new_and_continued_sequences_run_together():
    mixer = build()
    x = inputs((2, 9, WIDTH), torch.float64)
    _, state = mixer(x[:1, :4], return_state=True)
    both = {key: torch.cat((value, mixer.init_state(1)[key])) for key, value in state.items()}
    y, _ = mixer(torch.stack((x[0, 4:], x[1, :5])), both)
    torch.testing.assert_close(y[0], mixer(x[:1])[0][0, 4:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y[1], mixer(x[1:, :5])[0][0], rtol=1e-10, atol=1e-10)


def test_it_pools():
    """The last output is that of any order of the tokens, because the query is none of theirs."""
    mixer = build()
    x = inputs((1, 9, WIDTH), torch.float64)
    order = torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])
    torch.testing.assert_close(mixer(x[:, order])[0][:, -1], mixer(x)[0][:, -1], rtol=1e-10, atol=1e-10)


def test_options():
    groups = parameter_groups(build(), 1.0, 0.1)
    assert "query" in {name for group in groups if group["weight_decay"] == 0 for name in group["names"]}
    assert build(n_heads=2).query.shape == (2, 8)
    for options, words in (
        ({"n_heads": 3}, "n_heads must divide the width 16, got 3"),
        ({"bias": 1}, "bias must be True or False, got 1"),
        ({"d_conv": 1}, "d_conv must be an integer from 2 to 8, got 1"),
    ):
        with pytest.raises(ValueError, match=words):
            build(**options)
