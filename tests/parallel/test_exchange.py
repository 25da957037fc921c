"""What goes from rank to rank, and what happens where little or nothing does."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqzoo.parallel.exchange import message_bytes, pack, unpack

ranks = runpy.run_path(str(Path(__file__).with_name("ranks.py")))


def test_messages_keep_every_bit():
    values = [
        torch.tensor([[1.5, float("nan"), -0.0]], dtype=torch.float64),
        torch.tensor([3], dtype=torch.int64),
        torch.randn(2, 3, dtype=torch.complex64).conj(),
        torch.randn(5).bfloat16()[::2],
        torch.zeros(0, 4),
    ]
    forms = [(tuple(value.shape), value.dtype) for value in values]
    message = pack(values)
    assert message.numel() == message_bytes(forms)
    for value, found in zip(values, unpack(message, forms), strict=True):
        assert found.dtype == value.dtype
        assert found.shape == value.shape
        assert torch.equal(pack([found]), pack([value]))
    first = unpack(message, forms)[0]
    assert first.tolist()[0][0] == 1.5
    assert first.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("exchange", ["chain", "allgather"])
@pytest.mark.parametrize(
    ("name", "options", "same"),
    [
        ("s4d", {"d_state": 4}, False),
        ("long_conv", {"kernel_length": 20, "chunk_size": 4}, False),
        ("attention", {"n_heads": 2}, False),
        ("min_gru", {}, True),
    ],
    ids=str,
)
def test_both_directions(pool, name: str, options: dict[str, Any], same: bool, exchange: str):
    cases = [((5, 0, 8), None), ((5, 0, 8), (0, 1, 9, 0, 3, 0)), ((0, 6, 7), (6, 7)), ((13, 0, 0), None)]
    found = pool.call("both_ways", 3, mixer_name=name, options=options, same=same, cases=cases, exchange=exchange)
    for index, one in enumerate(cases):
        compare([answer[index] for answer in found], ranks["both"](None, 0, name, options, same, *one))


def compare(parts: list[dict[str, Any]], exact: dict[str, Any], whole: tuple[str, ...] = ("gradient of x",)) -> None:
    """What the ranks have of outputs and of ``whole`` beside one another; final states alike; else shares."""
    for key, value in exact.items():
        joined = [part[key] for part in parts]
        if key.startswith("final"):
            found = joined
        else:
            found = [np.concatenate(joined, 1) if key == "y" or key in whole else sum(joined)]
        for one in found:
            assert np.abs(one - value).max() <= 1e-10 * np.abs(value).max(), key


CASES = [
    ((5, 0, 8), None),
    ((5, 0, 8), (0, 1, 9, 0, 3, 0)),
    ((0, 6, 7), (6, 7)),
    ((1, 11, 1), None),
    ((13, 0, 0), None),
]


@pytest.mark.parametrize("exchange", ["chain", "allgather"])
def test_mixers_side_by_side_exchange_each_in_its_way(pool, exchange: str):
    found = pool.call("side_by_side", 3, exchange=exchange, cases=CASES)
    for index, one in enumerate(CASES):
        compare([answer[index] for answer in found], ranks["beside"](None, 0, *one))


@pytest.mark.parametrize("exchange", ["allgather", "hillis_steele", "pipelined"])
def test_scans_from_the_last_token(pool, exchange: str):
    found = pool.call("turned_scan", 3, exchange=exchange, cases=CASES)
    for index, one in enumerate(CASES):
        exact = ranks["reverse_scan"](None, 0, *one)
        compare([answer[index] for answer in found], exact, ("gradient of a", "gradient of b"))


PAYLOADS = {
    # fp64 numbers a channel of 16, padded to 16 bytes: state, transition; gradient
    "min_gru": ({}, 2 * (16 + 16) * 8, 2 * 16 * 8),
    # of K = 4, V = 8, 2 heads; a log decay for every key
    "gla": ({"n_heads": 2}, 2 * 2 * (4 * 8 + 4) * 8, 2 * 2 * 4 * 8 * 8),
    # nothing but the state where the decay is a constant
    "retnet": ({"n_heads": 2, "expand_v": 1}, 2 * 2 * 8 * 8 * 8, 2 * 2 * 8 * 8 * 8),
    # 32 channels of 4, and a sum of steps for each; the convolution's 3 inputs
    "mamba": ({"d_state": 4}, 2 * 8 * (32 * 4 + 32 + 3 * 32), 2 * 8 * (32 * 4 + 3 * 32)),
    # a matrix of 8 x 8 a head beside the state
    "deltanet": ({"n_heads": 2, "d_conv": None}, 2 * 2 * (8 * 8 + 8 * 8) * 8, 2 * 2 * 8 * 8 * 8),
    # complex, and no transition
    "s4d": ({"d_state": 4}, 2 * 16 * 2 * 16, 2 * 16 * 2 * 16),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_one_gather_an_op_each_way_of_the_size_that_is_said(pool, name: str):
    options, forward, backward = PAYLOADS[name]
    given = {"mixer_name": name, "options": options, "exchange": "allgather"}
    ops = 2 if name == "mamba" else 1
    for sent, formula, collectives in pool.call("payload", 3, counts=(5, 4, 8), lengths=None, final=False, **given):
        assert formula == (forward, backward)
        assert collectives == [{"allgather_": ops}] * 2
        assert sent == {
            "calls forward": ops,
            "bytes forward": forward,
            "calls backward": ops,
            "bytes backward": backward,
        }


@pytest.mark.parametrize("exchange", ["allgather", "hillis_steele", "pipelined"])
def test_sent_bytes_are_those_of_the_formula(pool, exchange: str):
    layouts = [((5, 4, 2, 6), None), ((4, 1, 5, 2), (1, 9, 0, 2)), ((4, 0, 6, 2), (4, 8)), ((4, 0, 6, 2), (4, 6, 2))]
    for (counts, lengths), final, name in itertools.product(layouts, (False, True), ("mamba", "deltanet")):
        options = {"d_state": 4} if name == "mamba" else {"n_heads": 2}
        given = {"mixer_name": name, "options": options, "exchange": exchange, "final": final}
        for sent, formula, collectives in pool.call("payload", 4, counts=counts, lengths=lengths, **given):
            assert (sent.get("bytes forward", 0), sent.get("bytes backward", 0)) == formula, (counts, lengths, final)
            # what goes from rank to rank is no collective; final states are gathered
            calls = [sent.get(f"calls {way}", 0) for way in ("forward", "backward")]
            if exchange == "allgather":
                assert collectives == [{"allgather_": number} if number else {} for number in calls]
            else:
                # messages to single ranks, and a gather of the final states alone
                posted = [one.get("send", 0) + one.get("allgather_", 0) for one in collectives]
                assert posted == calls
                assert [one.get("allgather_", 0) > 0 for one in collectives] == [final] * 2
                assert {name for one in collectives for name in one} <= {"send", "recv_", "allgather_"}


@pytest.mark.parametrize("exchange", ["allgather", "hillis_steele", "pipelined"])
def test_what_crosses_no_cut_is_not_summed_up(pool, exchange: str):
    options = {"counts": (4, 0, 6), "lengths": (1, 3, 0, 6), "final": False, "exchange": exchange}
    assert pool.call("messages", 3, gather=False, **options) == [{}, {}, {}]


def test_what_crosses_no_cut_is_not_sent(pool):
    options = {"counts": (4, 0, 6), "lengths": (1, 3, 0, 6), "final": False}
    assert pool.call("messages", 3, gather=False, **options) == [{}, {}, {}]
    assert pool.call("messages", 3, gather=True, **options) == [{"gather": 1}] * 3


def test_a_state_is_sent_once_and_its_gradient_once(pool):
    found = pool.call("messages", 3, gather=False, counts=(4, 0, 6), lengths=(1, 9), final=False)
    assert found == [{"send": 1, "receive": 1}, {}, {"send": 1, "receive": 1}]
    found = pool.call("messages", 3, gather=False, counts=(4, 1, 5), lengths=(1, 9), final=True)
    # two holders, the first of one sequence
    shares = {"broadcast": 2, "add_up": 2}
    assert found == [
        {"send": 1, "receive": 1, **shares},
        {"send": 2, "receive": 2, **shares},
        {"send": 1, "receive": 1, **shares},
    ]


@pytest.mark.parametrize("exchange", ["chain", "allgather", "hillis_steele", "pipelined"])
@pytest.mark.parametrize("frozen", [False, True])
def test_few_gradients_end_on_every_rank(pool, frozen: bool, exchange: str):
    found = pool.call("some_gradients", 4, counts=(3, 2, 0, 4), frozen=frozen, exchange=exchange)
    # the last rank's loss reaches the first one's tokens, through all between
    assert found[0] > 0
    assert found[1:] == [None] * 3


def test_layers_in_a_row_need_no_residual(pool):
    assert pool.call("without_residuals", 3, counts=(2, 0, 3)) == [None] * 3


@pytest.mark.parametrize(("exchange", "size"), [("chain", 1), ("allgather", 2)])
def test_a_recomputation_must_not_communicate(pool, exchange: str, size: int):
    with pytest.raises(Exception, match=r"SequenceParallelError: activation checkpointing .*keep_exchanges"):
        pool.call("plain_checkpoint", size, exchange=exchange)


def test_refusals(pool):
    assert pool.call("refusals", 3) == [None] * 3
