"""What is peculiar to the Triton selective scan: segments, tiles and groups, partial sums, its own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqzoo.kernels.launch import Device, Launch, assume
from seqzoo.testing import OpCase, compare, selective_scan_case

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from seqzoo.kernels.linear_scan.gpu import forced_segment  # noqa: E402
from seqzoo.kernels.selective_scan import gpu  # noqa: E402
from seqzoo.kernels.selective_scan.gpu_kernels import exponential, sine_cosine, softplus  # noqa: E402
from seqzoo.kernels.selective_scan.op import CHUNK  # noqa: E402

H200 = Device(processors=132, warp=32)
EMPTY_AMONG = (0,) * 5 + (64, 0, 0, 65, 1, 0)


def segmented(transition: str = "exponential", lengths: tuple[int, ...] = (65, 0, 1), **options) -> OpCase:
    return selective_scan_case(torch.float32, (1, 0, 3), lengths=lengths, transition=transition, **options)


def arguments(case: OpCase) -> list[Any]:
    return [*case.tensors.values(), case.options["cu_seqlens"], case.options["delta_softplus"]]


def run(case: OpCase) -> tuple[torch.Tensor, ...]:
    given = arguments(case)
    y, final_state, chunk_states = gpu.forward(*given)
    backward_arguments: list[Any] = [torch.ones_like(y), torch.ones_like(final_state), *given[:9], chunk_states]
    gradients = gpu.backward(*backward_arguments, *given[9:])
    return y, final_state, chunk_states, *gradients


@pytest.mark.parametrize(
    "case",
    [
        segmented(lengths=(129, 0, 3), size=1),
        segmented("longhorn", size=2, optional=False, softplus=False),
        segmented(size=1, complex_decay=True),
        # the rest of what segments meet: other dtypes and tiles that a group leaves partly empty
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (
                selective_scan_case(torch.bfloat16, (2, 200, 6), groups=3, size=3),
                selective_scan_case(torch.float16, (1, 200, 40), transition="longhorn", size=2),
                selective_scan_case(torch.float32, (1, 200, 66), groups=2, softplus=False, optional=False),
                selective_scan_case(torch.float32, (1, 0, 34), lengths=EMPTY_AMONG, complex_decay=True),
            )
        ),
    ],
    ids=lambda case: case.label,
)
def test_segments_agree_with_the_reference(case: OpCase, device: torch.device):
    with forced_segment(CHUNK):
        worst = compare(case.to(device), "gpu")
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("segment", [CHUNK, 64 * CHUNK], ids=["segments", "one pass"])
@pytest.mark.parametrize("lengths", [(66, 0, 1), pytest.param(EMPTY_AMONG, marks=pytest.mark.slow), (0,)], ids=str)
def test_every_row_is_written(lengths: tuple[int, ...], segment: int, device: torch.device):
    case = selective_scan_case(torch.float32, (0, 0, 2), size=1, groups=1, lengths=lengths).to(device)
    with forced_segment(segment):
        results = run(case)
    # memory is poisoned: what was left out would be NaN
    assert all(value.isfinite().all() for value in results)


@pytest.mark.slow
def test_any_state_size_and_width(device: torch.device):
    for size, width in ((1, 1), (17, 65), (130, 2)):
        worst = compare(selective_scan_case(torch.float32, (1, 20, width), size=size).to(device), "gpu")
        assert max(worst.values()) <= 1, (size, width, worst)


def test_two_runs_give_the_same_bits_without_synchronising(device: torch.device, unsynchronised):
    case = segmented(size=1, groups=1).to(device)
    with unsynchronised(), forced_segment(CHUNK):
        first, second = run(case), run(case)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_negative_steps_grow(device: torch.device):
    case = selective_scan_case(torch.float32, (1, 9, 3), size=2, softplus=False)
    delta = case.tensors["delta"]
    assert delta is not None
    grown = OpCase(case.op, case.label, case.tensors | {"delta": -delta}, case.options)
    worst = compare(grown.to(device), "gpu")
    assert max(worst.values()) <= 1, worst


@triton.jit
def functions_kernel(p_x, p_sine, p_cosine, p_softplus, p_exponential, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(p_x + o)
    sine, cosine = sine_cosine(x, 0.0)
    tl.store(p_sine + o, sine)
    tl.store(p_cosine + o, cosine)
    tl.store(p_exponential + o, exponential(x, 0.0))
    tl.store(p_softplus + o, softplus(x))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of infinite angles
def test_the_exponential_at_its_ends(device: torch.device):
    ends = [-float("inf"), -200.0, -87.3, 0.0, 88.7, 88.73, 200.0, float("inf"), float("nan")]
    x = torch.tensor(ends + [0.0] * (16 - len(ends)), device=device)
    found = [torch.empty_like(x) for _ in range(4)]
    functions_kernel[(1,)](x, *found, BLOCK=16)
    torch.testing.assert_close(found[3], x.exp(), equal_nan=True)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 50.0])
def test_functions_are_exact_to_a_few_roundings(scale: float, device: torch.device):
    x = scale * torch.linspace(-1, 1, 4096, device=device)
    found = [torch.empty_like(x) for _ in range(4)]
    functions_kernel[(1,)](x, *found, BLOCK=4096)
    exact = x.double()
    eps = torch.finfo(torch.float32).eps
    assert (found[0] - exact.sin()).abs().max() <= eps
    assert (found[1] - exact.cos()).abs().max() <= eps
    assert (found[3] / exact.exp() - 1).abs().max() <= 0.85 * eps
    logarithm = torch.logaddexp(exact, torch.zeros_like(exact))
    assert (found[2] / logarithm - 1).abs().max() <= 1.5 * eps


def inputs(
    batch: int, total: int, width: int, groups: int = 1, form: str = "exponential", packed: bool = False
) -> gpu.Inputs:
    return gpu.example_inputs(form, torch.bfloat16, torch.bfloat16, (batch, total, width), packed, True, groups)


def planned(given: gpu.Inputs) -> tuple[list[Launch], list[Launch]]:
    with assume(H200):
        (y, final_state, chunk_states), forward = gpu.plan_forward(given, None)
        _, backward = gpu.plan_backward(given, y, final_state, chunk_states)
    return forward, backward


def test_launches_are_few():
    assert [len(launches) for launches in planned(inputs(64, 4096, 2048))] == [1, 2]
    assert [len(launches) for launches in planned(inputs(1, 65536, 1024))] == [3, 4]


def test_no_tensor_has_a_state_a_token():
    forward, backward = planned(inputs(64, 4096, 2048))
    u = forward[0].arguments["p_u"]
    for launch in forward + backward:
        for name, value in launch.arguments.items():
            assert not isinstance(value, torch.Tensor) or value.numel() <= u.numel(), name


def test_a_tile_stays_in_its_group():
    plan = gpu.layout(inputs(64, 4096, 2048, 32), H200)
    assert plan.block == 2 * H200.warp
    # a group of 16 channels has a tile of its own
    (forward,), _ = planned(inputs(64, 4096, 2048, 128))
    assert forward.grid == (64 * 128,)
    assert forward.arguments["BD"] == H200.warp


def test_few_sequences_are_cut():
    plan = gpu.layout(inputs(1, 65536, 1024), H200)
    assert plan.split
    assert plan.slots * 1024 // plan.block >= gpu.FILLED * H200.processors
    assert gpu.layout(inputs(1, 65536, 1024, packed=True), H200).segment == plan.segment
    assert not gpu.layout(inputs(64, 4096, 2048), H200).split
