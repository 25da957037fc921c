"""The short convolution that layers share, against ``torch.nn.Conv1d`` with a group a channel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqzoo import Packing
from seqzoo.modules.short_conv import ShortConv
from seqzoo.testing import inputs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", None])
def test_it_is_the_module_of_pytorch(bias: bool, activation: str | None):
    theirs = torch.nn.Conv1d(6, 6, 4, padding=3, groups=6, bias=bias).double()
    ours = ShortConv(6, 4, bias=bias, activation=activation).double()
    ours.load_state_dict({name: value.view_as(getattr(ours, name)) for name, value in theirs.state_dict().items()})
    x = inputs((2, 9, 6), torch.float64)
    expected = theirs(x.transpose(1, 2))[..., :9].transpose(1, 2)
    y, state = ours(x)
    torch.testing.assert_close(y, expected if activation is None else F.silu(expected), rtol=1e-12, atol=1e-12)
    assert torch.equal(state, x[:, -3:])


def test_state_and_packing():
    conv = ShortConv(4, 3).double()
    x, packing = inputs((1, 9, 4), torch.float64), Packing.from_lengths((1, 0, 8))
    shape, dtype = conv.state_spec(3, torch.float64)
    given = inputs(shape, dtype, seed=3)
    y, state = conv(x, given, packing)
    assert state.shape == shape
    assert torch.equal(state[1], given[1])
    for index, (start, end) in enumerate(((0, 1), (1, 1), (1, 9))):
        one, final = conv(x[:, start:end], given[index : index + 1])
        torch.testing.assert_close(y[:, start:end], one)
        assert torch.equal(state[index : index + 1], final)


def test_initialisation():
    torch.manual_seed(0)
    with torch.device("meta"):
        conv = ShortConv(4096, 4)
    conv.to_empty(device="cpu")
    conv.reset_parameters()
    for parameter in (conv.weight.detach(), conv.bias.detach()):
        assert 0.49 < float(parameter.abs().max()) <= 0.5
        assert abs(float(parameter.mean())) < 0.02


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_conv": 1}, "d_conv must be an integer from 2 to 8, got 1"),
        ({"d_conv": 2.0}, "d_conv must be an integer from 2 to 8, got 2.0"),
        ({"d_conv": 9}, "from 2 to 8, got 9"),
        ({"d_conv": 4, "activation": "relu"}, "activation must be one of None, 'silu', got 'relu'"),
    ],
)
def test_bad_options(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        ShortConv(8, **options)


def test_it_shows_its_options():
    assert repr(ShortConv(8, 4, bias=False)) == "ShortConv(8, d_conv=4, bias=False, activation='silu')"
