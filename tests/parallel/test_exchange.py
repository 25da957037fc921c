"""What goes from rank to rank, and what happens where little or nothing does."""

from __future__ import annotations

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
def test_both_directions(pool, name: str, options: dict[str, Any], same: bool):
    cases = [((5, 0, 8), None), ((5, 0, 8), (0, 1, 9, 0, 3, 0)), ((0, 6, 7), (6, 7)), ((13, 0, 0), None)]
    found = pool.call("both_ways", 3, mixer_name=name, options=options, same=same, cases=cases)
    for index, one in enumerate(cases):
        exact = ranks["both"](None, 0, name, options, same, *one)
        parts = [answer[index] for answer in found]
        for key, value in exact.items():
            joined = [part[key] for part in parts]
            whole = np.concatenate(joined, 1) if key in ("y", "gradient of x") else sum(joined)
            assert np.abs(whole - value).max() <= 1e-10 * np.abs(value).max(), (one, key)


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


@pytest.mark.parametrize("frozen", [False, True])
def test_few_gradients_end_on_every_rank(pool, frozen: bool):
    found = pool.call("some_gradients", 4, counts=(3, 2, 0, 4), frozen=frozen)
    # the last rank's loss reaches the first one's tokens, through all between
    assert found[0] > 0
    assert found[1:] == [None] * 3


def test_layers_in_a_row_need_no_residual(pool):
    assert pool.call("without_residuals", 3, counts=(2, 0, 3)) == [None] * 3


def test_a_recomputation_must_not_communicate(pool):
    with pytest.raises(Exception, match=r"SequenceParallelError: activation checkpointing .*keep_exchanges"):
        pool.call("plain_checkpoint", 1)


def test_refusals(pool):
    assert pool.call("refusals", 3) == [None] * 3
