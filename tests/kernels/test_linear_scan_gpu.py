"""What is peculiar to the Triton scans: segments, finding a slot's sequence, 64-bit offsets, no synchronisation."""

from __future__ import annotations

import pytest
import torch

from seqzoo import ops
from seqzoo.kernels.dispatch import backend
from seqzoo.kernels.launch import Device
from seqzoo.testing import OpCase, boundaries, compare, gated_scan_case, linear_scan_case

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from seqzoo.kernels.linear_scan import gpu  # noqa: E402
from seqzoo.kernels.linear_scan.gpu_kernels import locate  # noqa: E402
from seqzoo.kernels.linear_scan.op import CHUNK  # noqa: E402

H200 = Device(processors=132, warp=32)
ONE_PASS = 64 * CHUNK
EMPTY_AMONG = (0,) * 9 + (64, 0, 0, 63, 65, 1) + (0,) * 5


def check(case: OpCase, device: torch.device, segment: int) -> None:
    with gpu.forced_segment(segment):
        worst = compare(case.to(device), "gpu")
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("segment", [CHUNK, 2 * CHUNK, ONE_PASS], ids=["segments", "long segments", "one pass"])
@pytest.mark.parametrize(
    "case",
    [
        linear_scan_case(torch.float32, (2, 200, 5)),
        linear_scan_case(torch.float32, (1, 200, 5), reverse=True, lengths=(130, 0, 70), time_invariant=True),
        linear_scan_case(torch.bfloat16, (1, 200, 70), a_dtype=torch.float32, time_invariant=True),
        linear_scan_case(torch.complex64, (1, 200, 3), reverse=True),
        gated_scan_case(torch.bfloat16, (1, 200, 5), cell="min_gru", reverse=True),
        gated_scan_case(torch.float32, (1, 200, 5), cell="min_lstm", lengths=(190, 10), gate_range=(-1.0, 1.0)),
    ],
    ids=lambda case: f"{case.op} {case.label}",
)
def test_segments_and_one_pass_agree_with_the_reference(case: OpCase, segment: int, device: torch.device):
    check(case, device, segment)


@pytest.mark.parametrize("segment", [CHUNK, ONE_PASS], ids=["segments", "one pass"])
@pytest.mark.parametrize("lengths", [EMPTY_AMONG, (0,), (0, 0, 0), (64, 64), (0, 200), (200, 0)], ids=str)
def test_slots_find_their_sequence_among_empty_ones(lengths: tuple[int, ...], segment: int, device: torch.device):
    check(linear_scan_case(torch.float32, (1, 0, 2), lengths=lengths), device, segment)


@pytest.mark.parametrize("total", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1])
def test_lengths_around_the_chunk(total: int, device: torch.device):
    check(linear_scan_case(torch.float32, (1, total, 2), time_invariant=True), device, CHUNK)


@pytest.mark.parametrize("segment", [CHUNK, ONE_PASS], ids=["segments", "one pass"])
def test_nothing_synchronises(segment: int, device: torch.device, unsynchronised):
    bounds = boundaries((70, 0, 10)).to(device)
    a, b, grad = (torch.rand(1, 80, 3, device=device) for _ in range(3))
    x, grad_state = torch.rand(1, 80, 6, device=device), torch.rand(3, 3, device=device)
    from seqzoo.kernels.gated_scan import gpu as gated

    with unsynchronised(), gpu.forced_segment(segment):
        _, _, states = gpu.forward(a, b, None, bounds, False)
        gpu.backward(grad, grad_state, a, b, None, None, states, bounds, False)
        _, _, states = gated.forward(x, None, bounds, "min_gru", 0.0, 1.0, False)
        gated.backward(grad, grad_state, x, None, None, states, bounds, "min_gru", 0.0, 1.0, False)


@pytest.mark.parametrize("segment", [CHUNK, ONE_PASS], ids=["segments", "one pass"])
@pytest.mark.parametrize("lengths", [EMPTY_AMONG, (64, 64), (0,)], ids=str)
def test_every_row_is_written(lengths: tuple[int, ...], segment: int, device: torch.device):
    a = torch.rand(3, device=device)
    b = torch.rand(1, sum(lengths), 3, device=device)
    bounds = boundaries(lengths).to(device)
    with gpu.forced_segment(segment):
        h, final, states = gpu.forward(a, b, None, bounds, False)
        gradients = gpu.backward(torch.ones_like(b), torch.ones_like(final), a, b, None, None, states, bounds, False)
    # memory is poisoned: what was left out would be NaN
    assert all(value.isfinite().all() for value in (h, final, states, *gradients))


@pytest.mark.parametrize("segment", [CHUNK, ONE_PASS], ids=["segments", "one pass"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of arithmetic with infinities
def test_no_value_crosses_a_boundary(poison: float, segment: int, device: torch.device):
    lengths, inner = (30, 100, 3), slice(30, 130)
    bounds = boundaries(lengths).to(device)

    def run(value: float) -> list[torch.Tensor]:
        a, b = (torch.linspace(0.1, 0.9, 266, device=device).reshape(1, 133, 2).clone() for _ in range(2))
        b[0, inner] = value
        leaves = [a.requires_grad_(), b.requires_grad_()]
        with backend("gpu"), gpu.forced_segment(segment):
            h, final = ops.linear_scan(*leaves, cu_seqlens=bounds)
            return [h, final[::2], *torch.autograd.grad((h * h).sum() + final.sum(), leaves)]

    clean, dirty = run(1.0), run(poison)
    assert not dirty[0][0, inner].isfinite().all()
    for left, right in zip(clean, dirty, strict=True):
        keep = [0, *range(30), *range(130, 133)] if left.dim() == 3 else None
        left, right = (left, right) if keep is None else (left[0, keep], right[0, keep])
        assert torch.equal(left, right)


def test_two_runs_give_the_same_bits(device: torch.device):
    for case in (linear_scan_case(torch.bfloat16, (2, 150, 5), time_invariant=True), gated_scan_case(torch.float32)):
        with gpu.forced_segment(CHUNK):
            first, second = (case.to(device).run("gpu") for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of the overflow
def test_a_product_that_overflows_leaves_a_zero_state_alone(device: torch.device):
    a, b = torch.full((1, 4 * CHUNK, 2), 16.0, device=device), torch.zeros(1, 4 * CHUNK, 2, device=device)
    with backend("gpu"), gpu.forced_segment(CHUNK):
        h, final = ops.linear_scan(a, b)
    assert not h.any()
    assert not final.any()


@triton.jit
def locate_kernel(p_found, p_cu, T, S, D, segment, slot, CHUNK: tl.constexpr):
    i_s, i_g, n_segments, start, length, chunk, n_chunks = locate(slot, p_cu, T, S, segment, CHUNK)
    tl.store(p_found, i_s)
    tl.store(p_found + 1, i_g)
    tl.store(p_found + 2, n_segments)
    tl.store(p_found + 3, start * D)
    tl.store(p_found + 4, length)
    tl.store(p_found + 5, chunk * D)
    tl.store(p_found + 6, n_chunks)


def test_offsets_are_64_bit(device: torch.device):
    found = torch.zeros(7, dtype=torch.int64, device=device)
    total, segment, width = 2**30, 2**29, 2**20
    locate_kernel[(1,)](found, None, total, 0, width, segment, 11, CHUNK=CHUNK)
    chunks = total // CHUNK
    assert found.tolist() == [5, 1, 2, 5 * total * width, total, 5 * chunks * width, chunks]


def test_packed_offsets_are_64_bit(device: torch.device):
    found = torch.zeros(7, dtype=torch.int64, device=device)
    last, width = 2**31 - 1, 2**20
    bounds = torch.tensor([0, 5, 5, last], dtype=torch.int32, device=device)
    segment = 2**29
    # the sequences own the slots 0; 1; 2 to 5
    locate_kernel[(1,)](found, bounds, last, 3, width, segment, 4, CHUNK=CHUNK)
    assert found.tolist() == [2, 2, 4, 5 * width, last - 5, 2 * width, last // CHUNK + 1]


def plan(batch: int, total: int, width: int, sequences: int | None = None, device: Device = H200) -> gpu.Layout:
    return gpu.layout(batch, total, width, sequences, torch.bfloat16, False, device)


def test_a_full_device_walks_sequences_whole():
    assert not plan(64, 4096, 2048).split
    assert not plan(1, 2 * CHUNK, 64).split


def test_few_sequences_are_cut_until_the_device_is_full():
    found = plan(1, 65536, 1024)
    assert found.split
    assert found.segment % CHUNK == 0
    assert found.slots * 1024 // found.block >= gpu.FILLED * H200.processors


def test_segments_of_a_sequence_have_a_limit():
    assert plan(1, 2**24, 64).slots <= gpu.MOST_SEGMENTS


def test_one_packed_sequence_may_hold_every_token():
    assert plan(1, 65536, 1024, sequences=64).segment == plan(1, 65536, 1024).segment


@pytest.mark.parametrize("tokens", [0, -CHUNK, CHUNK + 1])
def test_a_forced_segment_holds_whole_chunks(tokens: int):
    with pytest.raises(ValueError, match=f"positive multiple of {CHUNK}, got {tokens}"), gpu.forced_segment(tokens):
        pass
