"""minGRU and minLSTM against the paper's formulas, written out token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqzoo import create
from seqzoo.testing import inputs

VARIANTS = ({}, {"gate_range": (-1.0, 1.0)}, {"expand": 1.5, "bias": True, "gate_range": (-0.25, 0.75)}, {"d_conv": 3})


def by_hand(name: str, mixer, x: torch.Tensor, lo: float, hi: float) -> torch.Tensor:
    if mixer.conv1d is not None:
        taps = mixer.conv1d.weight.shape[-1]
        windows = F.pad(x, (0, 0, taps - 1, 0)).unfold(1, taps, 1)  # (B, T, D, W)
        x = F.silu((windows * mixer.conv1d.weight.reshape(-1, taps)).sum(-1) + mixer.conv1d.bias)
    projected = x @ mixer.in_proj.weight.T
    if mixer.in_proj.bias is not None:
        projected = projected + mixer.in_proj.bias
    h, found = torch.zeros(x.shape[0], mixer.width, dtype=x.dtype), []
    for token in projected.unbind(1):
        if name == "min_gru":
            gate, value = token.chunk(2, -1)
            new = 1 / (1 + torch.exp(-gate))
            old = 1 - new
        else:
            forget, enter, value = token.chunk(3, -1)
            f, i = 1 / (1 + torch.exp(-forget)), 1 / (1 + torch.exp(-enter))
            old, new = f / (f + i), i / (f + i)
        h = (lo + (hi - lo) * old) * h + new * value
        found.append(h)
    y = torch.stack(found, 1)
    if isinstance(mixer.out_proj, torch.nn.Linear):
        y = y @ mixer.out_proj.weight.T + (0 if mixer.out_proj.bias is None else mixer.out_proj.bias)
    return y


@pytest.mark.parametrize("name", ["min_gru", "min_lstm"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_it_is_the_formula_of_the_paper(name: str, options: dict):
    torch.manual_seed(0)
    mixer = create(name, d_model=16, **options).double()
    if mixer.in_proj.bias is not None:
        torch.nn.init.normal_(mixer.in_proj.bias)
        torch.nn.init.normal_(mixer.out_proj.bias)
    x = inputs((2, 70, 16), torch.float64)
    expected = by_hand(name, mixer, x, *options.get("gate_range", (0.0, 1.0)))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_gate_range_from_minus_one_can_count_parity():
    """With factors of -1 and nothing added the state flips its sign at every one, which factors in (0, 1) cannot do."""
    mixer = create("min_gru", d_model=16, gate_range=(-1.0, 1.0)).double()
    with torch.no_grad():
        mixer.in_proj.weight.zero_()
        mixer.in_proj.weight[0, 0] = 80.0  # the gate of channel 0 is open where the input is 1, shut where it is -1
    bits = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.float64)
    x = torch.zeros(1, 7, 16, dtype=torch.float64)
    x[0, :, 0] = 2 * bits - 1
    y, _ = mixer(x, {"h": torch.ones(1, 16, dtype=torch.float64)})
    torch.testing.assert_close(y[0, :, 0], 1 - 2 * (bits.cumsum(0) % 2))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"d_model": 0}, ValueError, "d_model must be a positive integer, got 0"),
        ({"expand": 1.03}, ValueError, r"expand \* d_model must be a positive integer"),
        ({"gate_range": (1, 0)}, ValueError, "-1 <= lo < hi <= 1"),
        ({"gate_range": 0.5}, TypeError, "gate_range must be two numbers, got 0.5"),
        ({"expand": 2, "output_projection": False}, ValueError, "output_projection=False needs expand=1"),
        ({"d_conv": 1}, ValueError, "d_conv must be an integer from 2 to 8, got 1"),
        ({"expnd": 2}, TypeError, "min_gru has no option 'expnd'; did you mean expand?"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        create("min_gru", **({"d_model": 16} | options))


def test_an_unknown_mixer_gives_the_nearest():
    with pytest.raises(ValueError, match="there is no mixer 'mingru'; did you mean min_gru"):
        create("mingru", d_model=16)
