"""What is peculiar to ``long_conv``: NumPy as a second oracle, transforms and their lengths, what is kept, compiled."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqzoo.kernels.dispatch import backend
from seqzoo.kernels.long_conv import chunked
from seqzoo.kernels.long_conv import op as long_conv_op
from seqzoo.kernels.long_conv.op import kept_length, transform_length
from seqzoo.ops import long_conv
from seqzoo.testing import backends, compare, fft_errors, inputs, long_conv_case


def one_side(u: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """``(B, T, D)``, one channel at a time."""
    rows = [[np.convolve(row, taps)[: len(row)] for row, taps in zip(one.T, kernel, strict=True)] for one in u]
    return np.array(rows).swapaxes(1, 2)


@pytest.mark.parametrize(("taps", "taps_reverse"), [(50, 50), (1, 80), (120, 3)])
def test_it_is_the_convolution_of_numpy(taps: int, taps_reverse: int, device: torch.device):
    case = long_conv_case(torch.float64, (2, 50, 3), taps=taps, taps_reverse=taps_reverse).to(device)
    u, kernel, kernel_reverse = (value.cpu().numpy() for value in case.tensors.values())
    expected = one_side(u, kernel) + one_side(u[:, ::-1], kernel_reverse)[:, ::-1]
    for name in backends(device, True):
        with backend(name):
            (y,) = case.call()
        np.testing.assert_allclose(y.cpu().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_two_sides_are_two_convolutions(device: torch.device):
    u, kernel, kernel_reverse = long_conv_case(torch.float64, taps_reverse=30).to(device).tensors.values()
    y = long_conv(u, kernel) + long_conv(u.flip(1), kernel_reverse).flip(1)
    torch.testing.assert_close(long_conv(u, kernel, kernel_reverse=kernel_reverse), y, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 150), st.integers(1, 40)),
    taps=st.integers(0, 200),
    taps_reverse=st.none() | st.integers(0, 200),
    recompute=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_shape(shape, taps, taps_reverse, recompute, dtype, seed):
    case = long_conv_case(dtype, shape, taps=taps, taps_reverse=taps_reverse, recompute=recompute, seed=seed)
    worst = compare(case, "chunked")
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_are_cut_anywhere(dtype: torch.dtype, recompute: bool, monkeypatch: pytest.MonkeyPatch):
    case = long_conv_case(dtype, (5, 40, 37), taps_reverse=11, recompute=recompute)
    # blocks of 13 channels of one sequence, and of all channels of 3 sequences
    for rows, channels in ((13, 13), (111, 16)):
        monkeypatch.setattr(chunked, "BLOCK_CPU", rows * transform_length(79) * (8 if dtype == torch.float64 else 4))
        monkeypatch.setattr(chunked, "CHANNELS", channels)
        worst = compare(case, "cpu")
        assert max(worst.values()) <= 1, (rows, worst)


@pytest.mark.parametrize("name", ["chunked", "cpu"])
def test_a_change_leaves_earlier_outputs_to_rounding(name: str, device: torch.device):
    case = long_conv_case(torch.float32, (2, 200, 3)).to(device)
    u, kernel, _ = case.tensors.values()
    later = u.clone()
    later[:, 120:] = -1
    bound = fft_errors(case.tensors, [torch.ones_like(u)], {})["output 0"]
    with backend(name):
        first, second = long_conv(u, kernel), long_conv(later, kernel)
    assert (first - second)[:, :120].abs().max() <= bound
    assert (first - second)[:, 120:].abs().max() > 1e3 * bound


def test_a_reverse_kernel_sees_what_follows_alone(device: torch.device):
    u, kernel, _ = long_conv_case(torch.float64, (1, 30, 2)).to(device).tensors.values()
    earlier = u.clone()
    earlier[:, :10] = 5
    nothing = torch.zeros_like(kernel)
    first, second = (long_conv(one, nothing, kernel_reverse=kernel) for one in (u, earlier))
    torch.testing.assert_close(first[:, 10:], second[:, 10:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("recompute", "transforms"), [(False, 3), (True, 5)])
@pytest.mark.parametrize("taps_reverse", [None, 64])
def test_transforms_are_no_more_than_needed(
    recompute: bool, transforms: int, taps_reverse: int | None, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def counted(name: str):
        function = getattr(torch.fft, name)
        return lambda *arguments, **options: calls.append(name) or function(*arguments, **options)

    for name in ("rfft", "irfft"):
        monkeypatch.setattr(torch.fft, name, counted(name))
    case = long_conv_case(torch.float32, (2, 64, 5), taps_reverse=taps_reverse)
    case.call()
    # of u and of the kernels, and back
    assert calls == ["rfft", "rfft", "irfft"]
    del calls[:]
    long_conv_case(torch.float32, (2, 64, 5), taps_reverse=taps_reverse, recompute=recompute).run("chunked")
    assert len(calls) == 3 + transforms


def test_lengths_are_fast_ones_and_what_is_kept_has_room():
    previous = 0
    for wanted in itertools.chain(range(3000), range(3000, 200_000, 97), (2**20 - 1, 2**20 + 1, 14_155_777)):
        length = transform_length(wanted)
        assert length >= max(wanted, previous)
        assert length % 8 == 0
        previous, rest = length, length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        assert rest == 1, length
        assert length // 2 + 1 <= kept_length(wanted) <= (wanted + wanted // 8 + 11) // 2 + 1
    # a power of two of tokens is convolved in one of twice as many
    assert [transform_length(2 * total - 1) for total in (64, 4096, 65536)] == [128, 8192, 131072]


def test_a_short_kernel_is_convolved_in_a_short_transform():
    u = torch.zeros(2, 4000, 3)
    assert long_conv_op.lags(u, torch.zeros(3, 97)) == 4096
    assert long_conv_op.lags(u, torch.zeros(3, 1), torch.zeros(3, 9000)) == 7999


def held(recompute: bool) -> int:
    """Numbers that the graph of a call holds for its backward pass."""
    u, kernel = torch.zeros(2, 100, 3, requires_grad=True), torch.zeros(3, 100, requires_grad=True)
    found: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: found.append(value.numel()) or value, lambda x: x):
        long_conv(u, kernel, recompute=recompute)
    return sum(found)


def test_only_the_inputs_are_held_when_spectra_are_made_again():
    assert held(recompute=True) == 2 * 100 * 3 + 3 * 100
    # complex numbers of all sequences and of the kernel, in room for a few more
    spectra = (2 + 1) * 3 * 2 * (transform_length(199) // 2 + 1)
    assert held(recompute=True) + spectra <= held(recompute=False) <= held(recompute=True) + 1.2 * spectra


def test_same_bits_twice_at_a_length_of_many_blocks(device: torch.device):
    torch.use_deterministic_algorithms(False)
    case = long_conv_case(torch.float32, (3, 1000, 70), taps_reverse=500).to(device)
    first, second = case.run(), case.run()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
def test_compiled_code_takes_every_length(recompute: bool, two_sided: bool, device: torch.device):
    torch._dynamo.reset()
    compiles = []

    def counting(graph, examples):
        compiles.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, examples)

    def call(u, kernel, kernel_reverse):
        return long_conv(u, kernel, kernel_reverse=kernel_reverse, recompute=recompute) * 2

    compiled = torch.compile(call, fullgraph=True, backend=counting, dynamic=True)
    for total in (20, 33, 64, 65, 700, 1500):
        u = inputs((2, total, 3), torch.float32, device).requires_grad_()
        kernel = inputs((3, total), torch.float32, device, seed=2).requires_grad_()
        kernel_reverse = inputs((3, total // 2), torch.float32, device, seed=3).requires_grad_() if two_sided else None
        sources = [x for x in (u, kernel, kernel_reverse) if x is not None]
        expected, actual = call(u, kernel, kernel_reverse), compiled(u, kernel, kernel_reverse)
        torch.testing.assert_close(actual, expected)
        for one, other in zip(*(torch.autograd.grad(y.sum(), sources) for y in (actual, expected)), strict=True):
            torch.testing.assert_close(one, other)
    assert len(compiles) == 1


def test_it_exports_with_any_batch_and_length(device: torch.device):
    class Convolution(torch.nn.Module):
        def forward(self, u, kernel):
            return long_conv(u, kernel)

    batch, total = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("total", min=2, max=1 << 20)
    u, kernel, _ = long_conv_case(torch.float32, (2, 40, 3)).to(device).tensors.values()
    exported = torch.export.export(
        Convolution(), (u, kernel), dynamic_shapes={"u": {0: batch, 1: total}, "kernel": {1: total}}
    ).module()
    for shape in ((3, 40, 3), (1, 77, 3)):
        u, kernel, _ = long_conv_case(torch.float32, shape).to(device).tensors.values()
        torch.testing.assert_close(exported(u, kernel), long_conv(u, kernel))
