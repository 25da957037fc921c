"""G8: what comes later does not change what came before, to the bit; batch rows do not meet."""

from __future__ import annotations

import pytest
import torch

from seqzoo import SequenceMixer
from seqzoo.testing import FEW_LENGTHS, Subject, boundaries, fourier_leak, inputs


def unchanged(mixer: SequenceMixer, before: torch.Tensor, after: torch.Tensor, leak: float = 0.0) -> bool:
    """To the bit; where the shapes of matrix products depend on other tokens, to their rounding; or to ``leak``."""
    if leak > 0:
        return bool((before - after).abs().max() <= leak)
    if not mixer.discontinuous:
        return torch.equal(before, after)
    return torch.allclose(
        before, after, rtol=0, atol=64 * torch.finfo(before.dtype).eps * float(before.detach().abs().max())
    )


@pytest.mark.parametrize("at", [1, 7, 64, 69])
def test_the_future_leaves_the_past_as_it_was(subject: Subject, dtype, device, at):
    mixer = subject.make(dtype, device)
    x = inputs((2, 70, 16), dtype, device)
    changed = x.clone()
    changed[:, at:] = inputs((2, 70 - at, 16), dtype, device, seed=9)
    before, after = mixer(x)[0], mixer(changed)[0]
    assert not torch.equal(before[:, at:], after[:, at:])
    if "causal" in mixer.limits:
        assert not torch.equal(before[:, :at], after[:, :at])
    else:
        leak = max(fourier_leak(mixer, x), fourier_leak(mixer, changed))
        assert unchanged(mixer, before[:, :at], after[:, :at], leak)


def test_a_packed_sequence_leaves_the_others_as_they_were(subject: Subject, dtype, device):
    mixer = subject.make(dtype, device)
    bounds = boundaries(FEW_LENGTHS)
    x = inputs((1, int(bounds[-1]), 16), dtype, device)
    changed = x.clone()
    start, end = bounds[2], bounds[3]  # the long one
    changed[:, start:end] = float("nan")
    before, after = (mixer(value, cu_seqlens=bounds.to(device))[0] for value in (x, changed))
    assert unchanged(mixer, before[:, :start], after[:, :start])
    assert unchanged(mixer, before[:, end:], after[:, end:])


def test_batch_rows_are_independent(subject: Subject, dtype, device):
    mixer = subject.make(dtype, device)
    x = inputs((3, 9, 16), dtype, device)
    changed = x.clone()
    changed[1] = inputs((9, 16), dtype, device, seed=9)
    before, after = mixer(x)[0], mixer(changed)[0]
    assert unchanged(mixer, before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])
