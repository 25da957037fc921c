"""What is peculiar to the Triton convolution: segments, a backward pass in one launch, the package beside it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from seqzoo.kernels.launch import Device
from seqzoo.testing import LENGTHS, boundaries, causal_conv_case, compare

pytest.importorskip("triton")

from seqzoo.kernels.causal_conv import gpu

H200 = Device(processors=132, warp=32)
EMPTY_AMONG = (0,) * 5 + (16, 0, 0, 15, 17, 1) + (0,) * 3
LAUNCH_OPTIONS = ("x", "weight", "bias", "initial_state")


def arguments(case) -> tuple:
    return (*(case.tensors[name] for name in LAUNCH_OPTIONS), case.options["cu_seqlens"], case.options["activation"])


# one shorter than what a token sees, one whole
@pytest.mark.parametrize("segment", [3, 16, 100], ids=lambda tokens: f"segments of {tokens}")
@pytest.mark.parametrize(
    "case",
    [
        causal_conv_case(torch.float32, (2, 20, 5)),
        causal_conv_case(torch.float32, (1, 17, 5), taps=8, activation=None, bias=False, state=False),
        causal_conv_case(torch.bfloat16, (1, 33, 70), taps=2, weight_dtype=torch.float32),
        causal_conv_case(torch.float32, (0, 0, 3), taps=8, lengths=EMPTY_AMONG),
        causal_conv_case(torch.float32, (0, 0, 3), taps=3, lengths=(0,)),
    ],
    ids=lambda case: case.label,
)
def test_segments_agree_with_the_reference(case, segment: int, device: torch.device):
    with gpu.forced_segment(segment):
        worst = compare(case.to(device), "gpu")
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("lengths", [EMPTY_AMONG, (16, 16), (0,), (0, 33)], ids=str)
def test_every_row_is_written(lengths: tuple[int, ...], device: torch.device):
    case = causal_conv_case(torch.float32, (0, 0, 3), lengths=lengths).to(device)
    with gpu.forced_segment(16):
        y, final = gpu.forward(*arguments(case))
        gradients = gpu.backward(torch.ones_like(y), torch.ones_like(final), *arguments(case))
    # memory is poisoned: what was left out would be NaN
    assert all(value.isfinite().all() for value in (y, final, *gradients))


def test_one_launch_each_way():
    case = causal_conv_case(torch.bfloat16, lengths=LENGTHS)
    (y, final), forward = gpu.plan_forward(*arguments(case))
    _, backward = gpu.plan_backward(y, final, *arguments(case))
    assert len(forward) == len(backward) == 1


def test_nothing_synchronises(device: torch.device, unsynchronised):
    case = causal_conv_case(torch.float32, lengths=(20, 0, 5)).to(device)
    with unsynchronised():
        y, final = gpu.forward(*arguments(case))
        gpu.backward(y, final, *arguments(case))


def layout(*shape: int) -> tuple[int, int, int]:
    return gpu.layout(torch.empty(shape, dtype=torch.bfloat16, device="meta"), None, H200)


def test_segments_are_long_where_the_device_is_full_and_short_where_it_is_not():
    assert layout(64, 4096, 2048)[0] == gpu.LONGEST
    assert layout(1, 4096, 256)[0] == gpu.SHORTEST
    segment, slots, block = layout(1, 65536, 1024)
    assert gpu.SHORTEST < segment < gpu.LONGEST
    assert slots * 1024 // block >= gpu.WANTED * H200.processors


def test_a_forced_segment_has_tokens():
    with pytest.raises(ValueError, match="tokens must be positive, got 0"), gpu.forced_segment(0):
        pass


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """The interface of the package ``causal_conv1d``, with the limits of its documentation, in PyTorch."""
    batch, width, total = x.shape
    taps = weight.shape[1]
    assert x.stride(1) == 1
    assert width % 8 == 0
    assert 2 <= taps <= 4
    assert weight.dtype == x.dtype
    if seq_idx is not None:
        assert initial_states is None
        assert seq_idx.shape == (batch, total)
        assert seq_idx.dtype == torch.int32
    if initial_states is not None:
        assert initial_states.shape == (batch, width, taps - 1)
        assert initial_states.stride(1) == 1
    before = x.new_zeros(batch, width, taps - 1) if initial_states is None else initial_states
    extended = torch.cat((before, x), 2).float()
    index = None if seq_idx is None else F.pad(seq_idx, (taps - 1, 0), value=-1)
    y = torch.zeros(x.shape, device=x.device) + (0 if bias is None else bias.float()[:, None])
    for j in range(taps):
        tap = extended[:, :, j : j + total] * weight[:, j, None].float()
        y += tap if index is None else torch.where((index[:, j : j + total] == seq_idx)[:, None], tap, 0.0)
    y = F.silu(y) if activation in ("silu", "swish") else y
    return y.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    module = ModuleType("causal_conv1d")
    module.causal_conv1d_fn = causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    gpu.package.cache_clear()
    yield
    gpu.package.cache_clear()


@pytest.mark.parametrize(
    "case",
    [
        causal_conv_case(torch.float32, (2, 9, 8), state=False),
        causal_conv_case(torch.bfloat16, (2, 9, 8), taps=3, activation=None, bias=False),
        causal_conv_case(torch.float32, (2, 2, 16)),
        causal_conv_case(torch.float32, (0, 0, 8), lengths=(3, 0, 1, 9, 0), taps=2, state=False),
    ],
    ids=lambda case: case.label,
)
def test_the_package_gives_what_our_kernel_gives(case, installed, device: torch.device):
    case = case.to(device)
    values = arguments(case)
    assert gpu.package_takes(*values[:5])
    results, launches = gpu.plan_forward(*values)
    gpu.run(launches, device)
    for actual, expected in zip(gpu.by_package(*values), results, strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.is_contiguous()


@pytest.mark.parametrize(
    "case",
    [
        causal_conv_case(torch.float32, (2, 9, 8), taps=5),
        causal_conv_case(torch.float32, (2, 9, 6)),
        causal_conv_case(torch.float32, (2, 0, 8)),
        causal_conv_case(torch.bfloat16, (2, 9, 8), weight_dtype=torch.float32),
        causal_conv_case(torch.float32, (0, 0, 8), lengths=(3, 4)),
    ],
    ids=lambda case: case.label,
)
def test_what_the_package_does_not_take_is_ours(case, installed):
    assert not gpu.package_takes(*arguments(case)[:5])


def test_a_missing_package_is_no_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    gpu.package.cache_clear()
    assert gpu.package() is None
    assert not gpu.package_takes(*arguments(causal_conv_case(torch.float32, (2, 9, 8)))[:5])
    gpu.package.cache_clear()


def test_the_packed_sequence_of_a_slot_is_found(device: torch.device):
    """The first output of every sequence is its own first input, whatever lies before it."""
    lengths = (5, 0, 16, 1, 40)
    case = causal_conv_case(torch.float32, (0, 0, 2), lengths=lengths, state=False, bias=False, activation=None)
    case = case.to(device)
    with gpu.forced_segment(16):
        y, _ = gpu.forward(*arguments(case))
    starts = [int(start) for start, length in zip(boundaries(lengths), lengths, strict=False) if length]
    first = case.tensors["x"][0, starts] * case.tensors["weight"][:, -1]
    torch.testing.assert_close(y[0, starts], first)
