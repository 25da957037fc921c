"""TransMamba: Mamba-2 on one side of its transition point, attention on the other, and nothing lost between them."""

from __future__ import annotations

import pytest
import torch

from seqzoo import Packing, create
from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.testing import inputs

OPTIONS = {"d_state": 6, "n_heads": 4, "n_groups": 2}


def build(point: int, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    mixer = create("transmamba", d_model=16, transition_point=point, **OPTIONS, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def test_without_attention_it_is_mamba2():
    mixer = build(0)
    other = create("mamba2", d_model=16, **OPTIONS).double()
    other.load_state_dict(mixer.state_dict())
    x = inputs((2, 20, 16), torch.float64)
    (y, state), (expected, wanted) = mixer(x, return_state=True), other(x, return_state=True)
    assert torch.equal(y, expected)
    assert torch.equal(state["S"], wanted["S"])
    assert state["k"].numel() == 0
    token = inputs((2, 16), torch.float64)
    assert torch.equal(mixer.step(token, state)[0], other.step(token, wanted)[0])


@pytest.mark.parametrize("point", [1, 7, 20, 31])
def test_tokens_from_the_transition_point_on_are_those_of_mamba2(point):
    mixer = build(point)
    other = create("mamba2", d_model=16, **OPTIONS).double()
    other.load_state_dict(mixer.state_dict())
    x = inputs((2, 20, 16), torch.float64)
    y, expected = mixer(x)[0], other(x)[0]
    assert torch.equal(y[:, point:], expected[:, point:])
    assert not torch.isclose(y[:, 1:point], expected[:, 1:point]).any() or point == 1


def test_tokens_before_it_attend():
    mixer = build(64)
    x = inputs((1, 12, 16), torch.float64)
    seen = {}
    mixer.norm.register_forward_pre_hook(lambda _, given: seen.update(y=given[0]))
    mixer.conv1d.register_forward_hook(lambda _, given, out: seen.update(xBC=out[0]))
    mixer(x)
    u, B, C = seen["xBC"].split((32, 12, 12), -1)
    u, B, C = u.unflatten(-1, (4, 8)), B.unflatten(-1, (2, 6)), C.unflatten(-1, (2, 6))
    for head in range(4):
        scores = torch.einsum("btk,bsk->bts", C[:, :, head // 2], B[:, :, head // 2]) / 6**0.5
        weights = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
        expected = weights @ u[:, :, head] + mixer.D[head] * u[:, :, head]
        torch.testing.assert_close(seen["y"].unflatten(-1, (4, 8))[:, :, head], expected)


def test_the_memory_that_is_handed_over_is_the_converters_sum():
    mixer = build(9)
    u, B = inputs((1, 9, 4, 8), torch.float64), inputs((1, 9, 2, 6), torch.float64, seed=3)
    step = inputs((1, 9, 4), torch.float64, seed=4).exp()
    log_decay = -step
    values = u * step[..., None]
    _, S = linear_attention(B, B, values, log_decay, scale=1.0)
    after = log_decay.flip(1).cumsum(1).flip(1) - log_decay
    expected = torch.einsum("bth,bthk,bthv->bhkv", after.exp(), B.repeat_interleave(2, 2), values)
    torch.testing.assert_close(S, expected)
    o, state = mixer.recur(B, B, values, log_decay, u, None, None)
    torch.testing.assert_close(state["S"], expected)
    assert o.shape == (1, 9, 4, 8)


def test_sequences_on_both_sides_of_their_points_go_on_together():
    mixer = build(6)
    lengths = (3, 6, 11, 0)
    x = inputs((1, sum(lengths), 16), torch.float64)
    _, state = mixer(x, cu_seqlens=Packing.from_lengths(lengths), return_state=True)
    more = (5, 1, 2, 8)
    tokens = inputs((1, sum(more), 16), torch.float64, seed=7)
    y, _ = mixer(tokens, state, cu_seqlens=Packing.from_lengths(more))
    for before, after, found in zip(x.split(lengths, 1), tokens.split(more, 1), y.split(more, 1), strict=True):
        expected = mixer(torch.cat((before, after), 1))[0][:, before.shape[1] :]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cuts", [(3, 9), (1, 2, 4, 5), (7, 5), (1,) * 12], ids=str)
def test_gradients_go_back_through_the_first_keys_and_values(cuts):
    mixer = build(7)
    sources = [inputs((2, 12, 16), torch.float64).requires_grad_(), *mixer.parameters()]
    expected, _ = mixer(sources[0])
    weight = inputs((2, 12, 16), torch.float64, seed=1)
    outputs, state = [], None
    for piece in sources[0].split(cuts, 1):
        y, state = mixer(piece, state, return_state=True)
        outputs.append(y)
    actual = torch.cat(outputs, 1)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad((weight * actual).sum(), sources), torch.autograd.grad((weight * expected).sum(), sources)
    )


def test_a_batch_of_no_sequences():
    mixer = build(3)
    for total in (0, 5):
        x = inputs((0, total, 16), torch.float64).requires_grad_()
        y, state = mixer(x, return_state=True)
        y, state = mixer(y, state, return_state=True)
        assert y.shape == (0, total, 16)
        assert mixer.step(x.new_zeros(0, 16), state)[0].shape == (0, 16)
        y.sum().backward()


@pytest.mark.parametrize("point", [-1, 2.5, True, "8"])
def test_bad_transition_points(point):
    with pytest.raises(ValueError, match="transition_point must be an integer from 0 on"):
        create("transmamba", d_model=16, transition_point=point)
