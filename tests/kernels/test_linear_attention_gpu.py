"""What is peculiar to the Triton kernels of ``linear_attention``: segments, shares of a group, launches, tiles."""

from __future__ import annotations

import pytest
import torch

from seqzoo.kernels.launch import Device, assume
from seqzoo.testing import OpCase, compare, linear_attention_case

triton = pytest.importorskip("triton")

from seqzoo.kernels.linear_attention import gpu  # noqa: E402
from seqzoo.kernels.linear_attention.gpu import CHUNK, Call  # noqa: E402

H200 = Device(processors=132, warp=32)
FLOAT, HALF = torch.float32, torch.bfloat16


def check(case: OpCase, device: torch.device) -> None:
    worst = compare(case.to(device), "gpu")
    assert max(worst.values()) <= 1, worst


def slow_case(case: OpCase):
    return pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "case",
    [
        linear_attention_case(FLOAT, (1, 150), decay="token", strength=0.1, heads=1),
        linear_attention_case(FLOAT, decay="head", lengths=(130, 0, 70), heads=2, groups=1, strength=0.1),
        linear_attention_case(FLOAT, decay=None, causal=False, lengths=(130, 0, 70), heads=1),
        linear_attention_case(HALF, (1, 150), decay="key", strength=0.1, heads=1, key=3, value=2, decay_dtype=FLOAT),
        slow_case(linear_attention_case(HALF, (2, 150), decay=None, heads=4, groups=2)),
        slow_case(linear_attention_case(FLOAT, decay="key", lengths=(130, 0, 70), strength=0.1)),
        slow_case(linear_attention_case(HALF, (1, 150), decay="token", strength=0.1, decay_dtype=FLOAT)),
    ],
    ids=lambda case: case.label,
)
def test_segments_agree_with_the_reference(case: OpCase, device: torch.device):
    with gpu.forced_layout(CHUNK):
        check(case, device)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_shares_of_a_group_add_up(parts: int, device: torch.device):
    with gpu.forced_layout(4 * CHUNK, parts):
        check(linear_attention_case(FLOAT, (1, 40), decay="token", heads=4, groups=1), device)


@pytest.mark.parametrize(
    "case",
    [
        linear_attention_case(FLOAT, (1, 20), decay="token", heads=1, key=70, value=90),
        linear_attention_case(FLOAT, (1, 20), decay="head", heads=2, groups=1, key=70, value=33),
        slow_case(linear_attention_case(FLOAT, (1, 40), decay="key", heads=1, key=70, value=90)),
        slow_case(linear_attention_case(FLOAT, (1, 40), decay="token", heads=1, key=256, value=300)),
        slow_case(linear_attention_case(HALF, (1, 70), decay="token", heads=1, key=130, value=70, decay_dtype=FLOAT)),
        slow_case(linear_attention_case(HALF, (1, 70), decay=None, causal=False, heads=1, key=130, value=70)),
    ],
    ids=lambda case: case.label,
)
def test_keys_and_values_of_several_tiles(case: OpCase, device: torch.device):
    check(case, device)


@pytest.mark.parametrize("total", [CHUNK - 1, CHUNK + 1, pytest.param(2 * CHUNK, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_lengths_around_the_chunk(total: int, dtype: torch.dtype, device: torch.device):
    check(linear_attention_case(dtype, (1, total), heads=1, strength=0.05), device)


@pytest.mark.parametrize("form", ["head", "token", pytest.param("key", marks=pytest.mark.slow)])
def test_a_factor_of_zero_forgets_everything(form: str, device: torch.device):
    case = linear_attention_case(FLOAT, (1, 40), decay=form, heads=1, value=2)
    if form == "head":
        case.tensors["log_decay"].fill_(float("-inf"))
    else:
        case.tensors["log_decay"][:, 7] = float("-inf")
    actual, exact = case.to(device).run("gpu"), case.widened().run("reference")
    for name in (
        "output 0",
        "output 1",
        "gradient of q",
        "gradient of k",
        "gradient of v",
        "gradient of initial_state",
    ):
        torch.testing.assert_close(actual[name].cpu().double(), exact[name], atol=1e-5, rtol=1e-5)


def call(batch: int, total: int, sizes: tuple[int, int, int, int], decay: str, packed: bool = False) -> Call:
    groups, heads, size, values = sizes
    q = torch.empty((batch, total, groups, size), dtype=HALF, device="meta")
    v = torch.empty((batch, total, heads, values), dtype=HALF, device="meta")
    shape = {"head": (heads,), "token": (batch, total, heads), "key": (batch, total, heads, size)}.get(decay)
    log_decay = None if shape is None else torch.empty(shape, device="meta")
    bounds = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    return Call(q, q, v, log_decay, bounds, 1.0, True)


def launches(of: Call) -> tuple[int, int]:
    rows = of.layout(1).rows
    _, forward = gpu.plan_forward(of, None)
    _, backward = gpu.plan_backward(of, of.v, of.matrices(rows, FLOAT), None)
    return len(forward), len(backward)


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_launches_with_a_scalar_decay(decay: str, packed: bool):
    few, many = (1, 4096, (1, 2, 256, 64)), (64, 4096, (16, 16, 64, 64))
    with assume(H200):
        found = [launches(call(*shape, decay, packed and shape is few)) for shape in (few, many)]
    assert all(forward <= 3 and backward <= 5 for forward, backward in found)
    assert found[1] == ((2, 3) if decay == "none" else (2, 4))


def test_few_states_are_cut_into_segments_and_many_are_not():
    with assume(H200):
        cut, whole = (
            call(1, 65536, (4, 4, 64, 64), "token").layout(1),
            call(64, 4096, (16, 16, 64, 64), "token").layout(1),
        )
        packed = call(1, 65536, (4, 4, 64, 64), "token", packed=True).layout(1)
    assert cut.cut
    assert cut.segment % CHUNK == 0
    assert 4 * cut.slots >= gpu.FILLED * H200.processors or cut.slots == gpu.MOST_SEGMENTS
    assert not whole.cut
    assert packed.segment == cut.segment


@pytest.mark.parametrize(
    ("programs", "shared", "parts"), [(1000, 8, 1), (66, 8, 2), (50, 8, 4), (1, 8, 8), (100, 3, 3)]
)
def test_a_group_is_shared_until_the_device_is_full(programs: int, shared: int, parts: int):
    assert gpu.parts_of_group(programs, shared, H200) == parts


@pytest.mark.parametrize("tokens", [0, -CHUNK, CHUNK + 1])
def test_a_forced_segment_holds_whole_chunks(tokens: int):
    with pytest.raises(ValueError, match=f"positive multiple of {CHUNK}, got {tokens}"), gpu.forced_layout(tokens):
        pass
