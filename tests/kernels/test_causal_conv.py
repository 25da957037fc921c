"""What is peculiar to ``causal_conv``: PyTorch's convolution as a second oracle, cuts between segments and threads."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from seqzoo.kernels.causal_conv import cpu
from seqzoo.kernels.dispatch import backend
from seqzoo.kernels.numba_runtime import Kernel
from seqzoo.ops import causal_conv
from seqzoo.testing import backends, causal_conv_case, compare

ONE_FEWER, ONE_MORE = cpu.SEGMENT - 1, cpu.SEGMENT + 1


@pytest.mark.parametrize("taps", range(2, 9))
@pytest.mark.parametrize("activation", [None, "silu"])
def test_it_is_the_grouped_convolution_of_pytorch(taps: int, activation: str | None, device: torch.device):
    case = causal_conv_case(torch.float64, (2, 30, 5), taps=taps, activation=activation).to(device)
    x, weight, bias, state = case.tensors.values()
    extended = torch.cat((state, x), 1)
    expected = F.conv1d(extended.transpose(1, 2), weight[:, None], bias, groups=5).transpose(1, 2)
    expected = F.silu(expected) if activation == "silu" else expected
    for name in backends(device, True):
        with backend(name):
            y, final = case.call()
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(final, extended[:, -(taps - 1) :])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=6),
    width=st.integers(1, 70),
    taps=st.integers(2, 8),
    bias=st.booleans(),
    state=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_boundaries(lengths, width, taps, bias, state, activation, dtype, seed):
    case = causal_conv_case(
        dtype,
        (0, 0, width),
        taps=taps,
        bias=bias,
        activation=activation,
        lengths=lengths,
        state=state,
        seed=seed,
    )
    for name in ("chunked", "cpu"):
        worst = compare(case, name)
        assert max(worst.values()) <= 1, (name, worst)


@pytest.mark.parametrize(
    "case",
    [
        causal_conv_case(torch.float64, (2, 700, 3), taps=8),
        causal_conv_case(torch.float32, (3, ONE_MORE, 3)),
        causal_conv_case(torch.float32, (3, ONE_FEWER, 3), activation=None),
        causal_conv_case(torch.bfloat16, (1, 600, 40), taps=3, state=False),
        causal_conv_case(torch.float64, (0, 0, 3), taps=8, lengths=(ONE_FEWER, 2, 0, 1, ONE_MORE, 3, cpu.SEGMENT)),
        causal_conv_case(torch.float64, (0, 0, 3), taps=5, lengths=(1,) * (2 * cpu.SEGMENT)),
    ],
    ids=lambda case: case.label,
)
@pytest.mark.parametrize("tasks", [2, 3])
def test_cuts_fall_anywhere(case, tasks: int, cut):
    with cut(tasks):
        worst = compare(case, "cpu")
    assert max(worst.values()) <= 1, worst


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch):
    """Divides the work as for so many threads, on one."""

    @contextmanager
    def dividing(tasks: int):
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "threads_for", lambda elements: tasks)
            patch.setattr(Kernel, "__call__", lambda kernel, threads, *arguments: kernel.serial(*arguments))
            yield

    return dividing


def test_the_number_of_threads_changes_no_bit(cut):
    for case in (
        causal_conv_case(torch.float32, (2, 900, 70)),
        causal_conv_case(torch.float32, (0, 0, 70), taps=6, lengths=(ONE_MORE, 3, 0, 500)),
    ):
        found = [case.run("cpu")]
        for tasks in (1, 2, 5):
            with cut(tasks):
                found.append(case.run("cpu"))
        assert all(torch.equal(one[name], found[0][name]) for one in found[1:] for name in one)


@pytest.mark.parametrize("name", ["chunked", "cpu"])
def test_an_infinite_input_reaches_its_window_and_no_further(name: str):
    x = torch.ones(1, 9, 2)
    x[0, 3] = float("inf")
    with backend(name):
        y, _ = causal_conv(x, torch.ones(2, 3))
    assert y[0, :, 0].isinf().tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert not y.isnan().any()


def test_a_sequence_in_pieces_is_the_whole(device: torch.device):
    case = causal_conv_case(torch.float64, (2, 12, 3), taps=5).to(device)
    x, weight, bias, state = case.tensors.values()
    y, final = causal_conv(x, weight, bias, state, activation="silu")
    pieces = []
    for piece in x.split((1, 0, 2, 6, 3), dim=1):
        part, state = causal_conv(piece, weight, bias, state, activation="silu")
        pieces.append(part)
    torch.testing.assert_close(torch.cat(pieces, 1), y, rtol=1e-13, atol=1e-13)
    assert torch.equal(state, final)
