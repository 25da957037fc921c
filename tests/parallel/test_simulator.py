"""What a plan costs: bytes are the formulas that runs are held to, times those of links written out by hand."""

from __future__ import annotations

import pytest
import torch

from seqzoo import create
from seqzoo.cli import main
from seqzoo.parallel import Plan, attention_payload, payload_bytes
from seqzoo.parallel.simulator import Link, all_to_all, allgather, chain, estimate, hillis_steele, pipelined

LINK = Link(1e-5, 1e9)


def test_times():
    # 1 ms of bytes, 10 us of latency, 8 ranks
    size = 1_000_000
    assert chain(size, 8, LINK) == pytest.approx(7 * 1.01e-3)
    assert allgather(size, 8, LINK) == pytest.approx(3 * 1e-5 + 7e-3)
    assert hillis_steele(size, 8, LINK) == pytest.approx(3 * 1.01e-3)
    assert hillis_steele(size, 9, LINK) == pytest.approx(4 * 1.01e-3)
    assert pipelined(size, 8, LINK, pieces=4) == pytest.approx(10 * (1e-5 + 0.25e-3))
    assert all_to_all(size, 8, LINK) == pytest.approx(7e-5 + 1e-3)


def test_bytes_are_those_of_the_formulas():
    plan = Plan.balanced(4096, 8, 4)
    mixers = [
        create("mamba2", d_model=64),
        create("attention", d_model=64, n_heads=8, n_kv_heads=2),
        create("mlstm", d_model=64),
    ]
    mamba, attention, mlstm = estimate(mixers, plan, LINK)
    for exchange in ("allgather", "hillis_steele", "pipelined"):
        forward, backward = payload_bytes(mixers[0], plan, exchange)
        assert mamba.costs[exchange].sent == forward + backward
    assert mamba.costs["allgather"].received == 7 * mamba.costs["allgather"].sent
    for way in ("allgather", "ulysses", "ring"):
        payload = attention_payload(plan, way, n_heads=8, n_groups=2, key_size=8, value_size=8, dtype=torch.float32)
        assert attention.costs[way].received == payload.received_forward + payload.received_backward
    # its running maximum is nothing that could be summed up
    assert list(mlstm.costs) == ["chain"]
    assert mlstm.best == "chain"


def test_bytes_do_not_depend_on_the_length_and_activations_do():
    mixer = create("gla", d_model=64)
    short, long = (estimate([mixer], Plan.balanced(total, 8, 4), LINK)[0] for total in (4096, 65536))
    assert short.costs == long.costs
    assert long.kept == 16 * short.kept > 0


def test_alike_mixers_count_together():
    mixers = [create("min_gru", d_model=32), create("mamba", d_model=32), create("min_gru", d_model=32)]
    found = estimate(mixers, Plan.balanced(1024, 4, 2), LINK)
    assert [(one.name, one.blocks) for one in found] == [("MinGRU", 2), ("Mamba", 1)]


def test_many_ranks_scan():
    found = estimate([create("mamba2", d_model=64)], Plan.balanced(2**20, 1024, 512), Link(1e-4, 1e9))[0]
    assert found.best == "hillis_steele"
    assert found.costs["hillis_steele"].seconds < found.costs["pipelined"].seconds < found.costs["chain"].seconds


@pytest.mark.parametrize("model", ["jamba-small", "rglru"])
def test_the_command(model, capsys):
    assert main(["plan", "--ranks", "64", "--tokens", "1M", "--model", model, "--d-model", "64"]) == 0
    printed = capsys.readouterr().out
    assert "1,048,576 tokens on 64 ranks, 16,384 on rank 32" in printed
    assert "* " in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "1", "--tokens", "64", "--model", "mamba"], "at least 2 ranks"),
        (["--ranks", "8", "--tokens", "4", "--model", "mamba", "--d-model", "16"], "has no token"),
        (["--ranks", "8", "--tokens", "64", "--model", "mmba"], "neither a preset"),
        (["--ranks", "8", "--tokens", "64", "--model", "mamba", "--node-bandwidth", "0"], "bandwidth must be positive"),
        (["--ranks", "0", "--tokens", "64", "--model", "mamba"], "at least 1"),
        (["--ranks", "1000000000", "--tokens", "64", "--model", "mamba"], "ranks must be at most 4,096, got 1,000,0"),
        (["--ranks", "8", "--tokens", "64", "--model", "mamba", "--per-node", "0"], "per_node must be a positive"),
        (["--ranks", "8", "--tokens", "64", "--model", "mamba", "--batch-size", "-1"], "batch_size must be a positive"),
        (["--ranks", "8", "--tokens", "64", "--model", "mamba", "--latency", "nan"], "latency must be positive"),
        (["--ranks", "8", "--tokens", "64", "--model", "jamba-small", "--n-layers", "0"], "plan: n_layers must be"),
    ],
)
def test_bad_options(arguments, words, capsys):
    assert main(["plan", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_a_number_of_tokens_that_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--ranks", "8", "--tokens", "1x", "--model", "mamba"])
    assert "digits" in capsys.readouterr().err
