"""What is peculiar to the Triton kernels of ``delta_rule``: tiles, kept states, segments, shares, launches."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from seqzoo.kernels.launch import Device, assume
from seqzoo.testing import OpCase, compare, linear_attention_case

triton = pytest.importorskip("triton")

from seqzoo.kernels.delta_rule import gpu  # noqa: E402
from seqzoo.kernels.delta_rule.gpu import ROWS, SUB, Call, segment_length  # noqa: E402
from seqzoo.kernels.linear_attention.gpu import forced_layout  # noqa: E402

H200 = Device(processors=132, warp=32)
FLOAT, HALF = torch.float32, torch.bfloat16
delta_rule_case = partial(linear_attention_case, op="delta_rule")


def check(case: OpCase, device: torch.device) -> None:
    worst = compare(case.to(device), "gpu")
    assert max(worst.values()) <= 1, worst


def slow_case(case: OpCase):
    return pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "case",
    [
        delta_rule_case(FLOAT, (1, 20), heads=1, key=70, value=33),
        delta_rule_case(HALF, (1, 20), decay="key", heads=1, key=33, value=17, decay_dtype=FLOAT),
        slow_case(delta_rule_case(FLOAT, (1, 40), decay="key", heads=1, key=70, value=90)),
        # of so many keys the parts of a state are not unrolled where products are exact
        delta_rule_case(FLOAT, (1, 20), heads=1, key=150, value=3),
        slow_case(delta_rule_case(FLOAT, (1, 40), decay=None, heads=1, key=256, value=40)),
        slow_case(delta_rule_case(FLOAT, (1, 40), decay="key", heads=1, key=140, value=20)),
        slow_case(delta_rule_case(HALF, (1, 70), heads=1, key=130, value=70, decay_dtype=FLOAT)),
        slow_case(delta_rule_case(HALF, (1, 70), decay=None, heads=1, key=70, value=70)),
    ],
    ids=lambda case: case.label,
)
def test_keys_and_values_of_several_tiles(case: OpCase, device: torch.device):
    check(case, device)


@pytest.mark.parametrize(
    "case",
    [
        delta_rule_case(FLOAT, (1, ROWS + 1), heads=1, strength=0.05),
        slow_case(delta_rule_case(FLOAT, (1, ROWS - 1), heads=1, strength=0.0)),
        slow_case(delta_rule_case(FLOAT, (1, 2 * ROWS), decay="key", heads=1, strength=0.05)),
        slow_case(delta_rule_case(FLOAT, (1, 5 * ROWS + 3), decay=None, heads=1)),
        slow_case(delta_rule_case(HALF, (1, 5 * ROWS + 3), heads=1, strength=0.01, decay_dtype=FLOAT)),
    ],
    ids=lambda case: case.label,
)
def test_lengths_around_the_kept_states(case: OpCase, device: torch.device):
    check(case, device)


@pytest.mark.parametrize(
    "case",
    [
        delta_rule_case(FLOAT, (1, 2 * ROWS + 3), heads=1, strength=0.05),
        delta_rule_case(FLOAT, decay=None, lengths=(ROWS, 0, 2 * ROWS + 1, 5), heads=2, groups=1, key=12, value=9),
        delta_rule_case(HALF, (1, 2 * ROWS + 3), decay="key", heads=1, strength=0.05, key=4, decay_dtype=FLOAT),
        slow_case(delta_rule_case(FLOAT, (2, 2 * ROWS), decay=None, heads=2, groups=1, state=False)),
        slow_case(delta_rule_case(FLOAT, (1, 3 * ROWS + 9), decay="key", heads=1, strength=0.02, key=70, value=33)),
        slow_case(delta_rule_case(FLOAT, lengths=(130, 0, 70, 1), decay="key", strength=0.05, heads=4, groups=2)),
        slow_case(delta_rule_case(FLOAT, (1, 3 * ROWS), decay=None, heads=1, key=256, value=20)),
        slow_case(delta_rule_case(HALF, (1, 5 * ROWS + 3), decay=None, heads=1, key=70, value=20)),
        slow_case(delta_rule_case(HALF, (1, 5 * ROWS + 3), heads=1, strength=0.01, decay_dtype=FLOAT)),
        slow_case(delta_rule_case(FLOAT, (1, 20 * ROWS + 5), heads=1, strength=0.001, key=16, value=16)),
    ],
    ids=lambda case: case.label,
)
def test_segments_agree_with_the_reference(case: OpCase, device: torch.device):
    with forced_layout(ROWS):
        check(case, device)


def test_segments_of_several_kept_states(device: torch.device):
    with forced_layout(2 * ROWS):
        check(delta_rule_case(FLOAT, lengths=(5 * ROWS - 7, ROWS), heads=1, strength=0.02), device)


@pytest.mark.parametrize("total", [2, pytest.param(SUB, marks=pytest.mark.slow)])
@pytest.mark.parametrize("decay", [None, "token", pytest.param("key", marks=pytest.mark.slow)])
def test_shares_of_a_group_add_up(total: int, decay: str | None, device: torch.device):
    check(delta_rule_case(FLOAT, (1, total), decay=decay, heads=4, groups=1, key=20), device)


@pytest.mark.parametrize("decay", ["token", pytest.param("key", marks=pytest.mark.slow)])
def test_a_factor_of_zero_forgets_everything(decay: str, device: torch.device):
    case = delta_rule_case(FLOAT, (1, 20), decay=decay, heads=1, value=2)
    case.tensors["log_decay"][:, 7] = float("-inf")
    actual, exact = case.to(device).run("gpu"), case.widened().run("reference")
    for name in ("output 0", "output 1", *(f"gradient of {one}" for one in ("q", "k", "v", "beta", "initial_state"))):
        torch.testing.assert_close(actual[name].cpu().double(), exact[name], atol=1e-5, rtol=1e-5)


def test_betas_of_zero_and_two_write_nothing_and_reflect(device: torch.device):
    case = delta_rule_case(FLOAT, (1, 20), heads=1)
    case.tensors["beta"][:, ::3] = 0
    case.tensors["beta"][:, 1::3] = 2
    check(case, device)


def test_float32_betas_of_bfloat16_keep_their_gradients(device: torch.device):
    case = delta_rule_case(HALF, (1, 20), decay=None, heads=1)
    case.tensors["beta"] = case.tensors["beta"].float()
    check(case, device)


def call(batch: int, total: int, sizes: tuple[int, int, int, int], decay: str, packed: bool = False) -> Call:
    groups, heads, size, values = sizes
    q = torch.empty((batch, total, groups, size), dtype=HALF, device="meta")
    v = torch.empty((batch, total, heads, values), dtype=HALF, device="meta")
    beta = v[..., 0]
    log_decay = {"none": None, "token": beta, "key": v.new_empty((batch, total, heads, size))}[decay]
    bounds = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    return Call(q, q, v, beta, log_decay, bounds, 1.0)


@pytest.mark.parametrize("decay", ["none", "token", "key"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_launches(decay: str, packed: bool):
    found = []
    with assume(H200):
        for sizes in ((2, 4, 256, 64), (16, 16, 16, 64)):
            of = call(1, 4096, sizes, decay, packed)
            _, forward = gpu.plan_forward(of, None)
            _, backward = gpu.plan_backward(of, of.v, of.matrices(of.rows, FLOAT), None)
            found.append((len(forward), len(backward)))
    assert found == [(2, 5), (2, 4)]


@pytest.mark.parametrize("decay", ["none", "token", "key"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_segments_take_two_launches_more_each_way(decay: str, packed: bool):
    with assume(H200):
        of = call(1, 65536, (2, 2, 64, 64), decay, packed)
        _, forward = gpu.plan_forward(of, None)
        _, backward = gpu.plan_backward(of, of.v, of.matrices(of.rows, FLOAT), None)
    # the keys of a scalar decay are in two programs here, whose shares are added up
    assert (len(forward), len(backward)) == (4, 7 if decay == "token" else 6)


def segments(batch: int, total: int, heads: int, size: int, values: int, directions: int = 1, packed: bool = False):
    with assume(H200):
        length = call(batch, total, (heads, heads, size, values), "none", packed).segment(directions)
    assert length > total or length % ROWS == 0
    return -(-total // length)


@pytest.mark.parametrize("directions", [1, 2])
def test_few_long_walks_are_cut_and_others_are_not(directions: int):
    assert segments(4, 4096, 16, 128, 128, directions) == 1
    assert segments(1, 65536, 16, 128, 128, directions) == 1
    assert segments(1, 65536, 2, 64, 64, directions) >= 8
    assert segments(1, 65536, 2, 64, 64, directions, packed=True) == segments(1, 65536, 2, 64, 64, directions)
    assert segments(1, 2048, 2, 64, 64, directions) == 1


def test_segments_pay_for_the_columns_of_the_transition():
    # as many walks, each with its part of a transition 8 times as wide as the values
    assert segments(1, 65536, 32, 16, 16) == 8
    assert segments(1, 65536, 32, 128, 16) == 1


@pytest.mark.parametrize("walks", [1, 8, 32])
@pytest.mark.parametrize("total", [8192, 2**20])
@pytest.mark.parametrize("size", [16, 128])
def test_segments_fill_the_device_and_outlast_their_composition(walks: int, total: int, size: int):
    segment = segment_length(walks, 2 * walks, total, size, H200)
    found = -(-total // segment)
    assert found > 1
    assert found * walks <= gpu.FILLED * H200.processors
    assert found * size <= segment
    assert segment >= gpu.SHORTEST
    # the summaries, twice as many programs, the composition and the walks
    assert 4 * segment <= total / gpu.WORTH


def test_nothing_is_cut_where_there_is_nothing():
    assert segment_length(0, 4, 65536, 64, H200) == 65537
    assert segment_length(8, 16, 0, 64, H200) == 1


def test_the_forward_pass_stores_no_states():
    with assume(H200):
        of = call(4, 4096, (16, 16, 128, 128), "token")
        (o, final_state), launches = gpu.plan_forward(of, None)
    # a matrix of SUB tokens by SUB for the scores and one for the systems, written once and read once
    passed = 2 * 2 * 4 * SUB
    inputs = 3 * 2 * 128 + 2 * 2
    # the systems read all of the inputs but v
    read = 2 * 2 * 128 + 2 * 2
    total = sum(launch.traffic() for launch in launches) - final_state.numel() * 4
    assert total / (o.numel() // 128) == passed + inputs + read + 2 * 128
