"""Bidirectional against its definition, dense and packed."""

from __future__ import annotations

import pytest
import torch

from seqzoo import create
from seqzoo.layers import Bidirectional
from seqzoo.testing import FEW_LENGTHS, PlainMixer, boundaries, inputs


def merged(mixer: Bidirectional, f: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    if mixer.merge == "sum":
        return f + r
    both = torch.cat((f, r), -1) @ mixer.merge_proj.weight.T + mixer.merge_proj.bias
    if mixer.merge == "concat":
        return both
    g = 1 / (1 + torch.exp(-both))
    return g * f + (1 - g) * r


@pytest.mark.parametrize("merge", ["sum", "concat", "gate"])
def test_it_is_its_definition(merge: str):
    mixer = Bidirectional(create("min_gru", d_model=16), create("min_lstm", d_model=16), merge).double()
    x = inputs((2, 9, 16), torch.float64)
    f, r = mixer.mixer(x)[0], mixer.mixer_reverse(x.flip(1))[0].flip(1)
    torch.testing.assert_close(mixer(x)[0], merged(mixer, f, r), rtol=1e-12, atol=1e-12)
    x = inputs((1, sum(FEW_LENGTHS), 16), torch.float64)
    alone = [mixer(one)[0] for one in x.split(FEW_LENGTHS, dim=1)]
    torch.testing.assert_close(mixer(x, cu_seqlens=boundaries(FEW_LENGTHS))[0], torch.cat(alone, 1))


def test_the_copy_has_parameters_of_its_own_and_sharing_shares():
    one = create("min_gru", d_model=16)
    own = Bidirectional(one)
    assert not torch.equal(own.mixer.in_proj.weight, own.mixer_reverse.in_proj.weight)
    assert len(list(own.parameters())) == 2
    shared = Bidirectional(one, one)
    assert len(list(shared.parameters())) == 1


def test_the_auxiliary_losses_add_up():
    mixer = Bidirectional(PlainMixer(16))
    x = inputs((2, 9, 16), torch.float32)
    *_, loss = mixer(x, return_auxiliary=True)
    expected = mixer.mixer(x, return_auxiliary=True)[2] + mixer.mixer_reverse(x.flip(1), return_auxiliary=True)[2]
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("merge", ["sum", "concat", "gate"])
def test_parameters_kept_in_float32_inside_it(merge: str):
    mixer = Bidirectional(PlainMixer(16), merge=merge).to(torch.bfloat16)
    assert mixer.mixer.decay.dtype == torch.float32
    y, _ = mixer(inputs((2, 9, 16), torch.bfloat16))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda m: Bidirectional(m, merge="mean"), "merge must be sum, concat or gate, got 'mean'"),
        (lambda m: Bidirectional(m, create("min_gru", d_model=32)), "one d_model, got 16 and 32"),
        (lambda m: Bidirectional(Bidirectional(m)), "Bidirectional is not causal"),
    ],
)
def test_bad_options(build, words):
    with pytest.raises(ValueError, match=words):
        build(create("min_gru", d_model=16))
