"""``seqzoo train --sequence_parallel``: several processes give what one gives, and their checkpoints fit any number."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from seqzoo.train.checkpoints import CheckpointError, read_checkpoint
from seqzoo.train.command import main
from seqzoo.train.data import FolderBytes
from seqzoo.train.data.windows import TrainingWindows
from seqzoo.train.metrics_table import read_metrics
from seqzoo.train.sharded_checkpoints import read_rest, read_shards
from seqzoo.train.strategy import SequenceParallelStrategy

STEPS = 12


@pytest.fixture(scope="module")
def short(tiny: list[str]) -> list[str]:
    """Options of a run of few steps without dropout, whose random numbers differ between processes."""
    pattern = '["min_gru", {"name": "attention", "n_heads": 2}]'
    more = ["--trainer.max_steps", str(STEPS), "--model.config.dropout", "0", "--model.config.pattern", pattern]
    return [*tiny, *more, "--trainer.val_check_interval", "4", "--data.validation_streams", "6"]


@pytest.fixture(scope="module")
def alone(short, tmp_path_factory) -> dict[int, Path]:
    """Runs of one process on the batches of one group of processes, and of two."""
    found = {}
    original = FolderBytes.train_dataloader
    for groups in (1, 2):
        runs = tmp_path_factory.mktemp(f"alone{groups}")

        def together(self, groups=groups):
            parts = [
                TrainingWindows(self.side("training").ids, context=32, batch_size=4, rank=rank)
                for rank in range(groups)
            ]
            return (torch.cat(batches) for batches in zip(*parts, strict=True))

        FolderBytes.train_dataloader = together
        try:
            assert main([*short, "--runs", str(runs)]) == 0
        finally:
            FolderBytes.train_dataloader = original
        found[groups] = next(runs.iterdir())
    return found


@pytest.fixture(scope="module")
def several(short, tmp_path_factory, train_on):
    """Makes runs of two processes, and of four that are two groups of two."""

    @functools.cache
    def run(size: int) -> Path:
        runs = tmp_path_factory.mktemp(f"several{size}")
        done = train_on(size, ([*short, "--runs", runs, "--sequence-parallel", "2"], None))
        assert done.statuses == [[0]] * size, done.out
        assert f"divided among {size} processes, each sequence among 2" in done.out[0]
        assert not any(done.out[1:]), "the first process speaks for all"
        return next(runs.iterdir())

    return run


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_what_one_gives(alone, several, size: int):
    reference, run = alone[size // 2], several(size)
    one, other = (read_metrics(path / "metrics.csv") for path in (reference, run))
    assert len(one) == len(other) > 5
    for expected, found in zip(one, other, strict=True):
        for name in ("step", "train_loss", "validation_bpb", "lr"):
            assert found[name] == (None if expected[name] is None else pytest.approx(expected[name], rel=3e-5)), name
    expected = read_checkpoint(reference / "checkpoints/last.safetensors")
    found = read_shards(run / "checkpoints/last")
    assert found["global_step"] == STEPS
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for name, value in expected["state_dict"].items():
        assert (found["state_dict"][name] - value).abs().max() <= 3e-4 * value.abs().max(), name
    assert expected["callbacks"].keys() == found["callbacks"].keys()
    sizes = [(path / "model/model.safetensors").stat().st_size for path in (reference, run)]
    assert sizes[0] == sizes[1]


def test_exchanges_give_what_the_chain_gives(short, several, train_on, tmp_path):
    options = [*short, "--runs", tmp_path, "--sequence-parallel", "2", "--exchange", "allgather", "--attention", "usp"]
    done = train_on(2, ([*options, "--head-ranks", "2"], None))
    assert done.statuses == [[0]] * 2, done.out
    run = next(tmp_path.iterdir())
    one, other = (read_metrics(path / "metrics.csv") for path in (several(2), run))
    for expected, found in zip(one, other, strict=True):
        for name in ("step", "train_loss", "validation_bpb"):
            assert found[name] == (None if expected[name] is None else pytest.approx(expected[name], rel=3e-5)), name
    configuration = (run / "config.yaml").read_text()
    assert "exchange: allgather" in configuration
    assert "head_ranks: 2" in configuration


# the fault, the exit status of all processes, the step of the checkpoint that it leaves, on how many processes
FAULTS = {
    "killed": ({"at": "step", "step": 8, "does": "kill"}, None, 5, 2),
    "killed in one": ({"at": "step", "step": 8, "does": "kill", "rank": 3}, None, 5, 4),
    "disk full": ({"at": "save", "step": 10, "does": "full", "rank": 0}, [1], 5, 4),
    "interrupted in one": ({"at": "step", "step": 7, "does": "interrupt", "rank": 2}, [130], 7, 4),
    "interrupted twice": ({"at": "step", "step": 7, "does": "abort", "rank": 2}, [130], 7, 4),
}


@pytest.mark.parametrize(
    "name", [name if name == "killed" else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_a_run_goes_on_to_the_same_bits(short, several, train_on, tmp_path, name: str):
    fault, status, kept, size = FAULTS[name]
    done = train_on(size, ([*short, "--runs", tmp_path, "--sequence-parallel", "2"], fault))
    # those that wait for a process that has died fail
    assert done.statuses == [status] * size or (name == "killed in one" and 0 not in done.codes), done.out
    run = next(tmp_path.iterdir())
    assert read_shards(run / "checkpoints/last")["global_step"] == kept
    done = train_on(size, (["--resume", run], None))
    assert done.statuses == [[0]] * size, done.out
    assert (run / "model/model.safetensors").read_bytes() == (several(size) / "model/model.safetensors").read_bytes()
    one, other = (
        [(row["step"], row["train_loss"], row["validation_bpb"]) for row in read_metrics(path / "metrics.csv")]
        for path in (run, several(size))
    )
    assert one == other
    assert not list(run.rglob("*.tmp"))


# -- checkpoints --


@pytest.fixture(scope="module")
def written(train_on, tmp_path_factory):
    """A checkpoint of four processes, and its numbers."""
    path = tmp_path_factory.mktemp("checkpoint") / "last"
    done = train_on(4, (["case:save", path], None))
    assert None not in done.statuses, done.out
    return path, done.statuses[0][0]


@pytest.mark.parametrize("size", [1, 3, pytest.param(2, marks=pytest.mark.slow)])
def test_any_number_of_processes_reads_a_checkpoint(written, train_on, size: int):
    path, numbers = written
    done = train_on(size, (["case:load", path], None))
    assert None not in done.statuses, done.out
    for (found,) in done.statuses:
        assert found.keys() == numbers.keys()
        for name, value in numbers.items():
            assert np.array_equal(found[name], value), name


def test_one_process_reads_it_without_a_model(written):
    path, numbers = written
    state = read_shards(path)
    assert state["number"] == 7
    for name, value in state["state_dict"].items():
        assert np.array_equal(value.numpy(), numbers[name]), name
    for index, values in state["optimizer_states"][0]["state"].items():
        for name, value in values.items():
            assert np.array_equal(value.numpy(), numbers[f"{index} {name}"]), name
    assert not any(path.rglob("*.metadata")), "nothing is pickled"


def test_damage_is_named(written, tmp_path):
    copy = Path(shutil.copytree(written[0], tmp_path / "last"))
    files = sorted((copy / "shards").iterdir())
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"shards is incomplete or damaged: .*expected whole safetensors files"):
        read_rest(copy)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"shards has \d+ of the \d+ numbers of a tensor; a file is missing"):
        read_shards(copy)
    (copy / "rest.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*rest\.safetensors"):
        read_rest(copy)


# -- errors, before any work --


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def launched(monkeypatch):
    """Pretends that torchrun has started so many processes."""

    def pretend(size: int) -> None:
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")

    return pretend


def test_refusals(capsys, launched, tiny, tmp_path):
    runs = ["--runs", str(tmp_path / "runs")]
    words = refused(capsys, *tiny, *runs, "--sequence-parallel", "4")
    assert "sequence_parallel=4 needs processes, which torchrun starts: torchrun --nproc-per-node 4" in words
    assert "must be a positive integer, got 0" in refused(capsys, *tiny, *runs, "--sequence_parallel", "0")
    assert "there is no option 'sequence_paralel'; did you mean" in refused(capsys, "--sequence-paralel", "4")
    launched(6)
    words = refused(capsys, *tiny, *runs, "--sequence-parallel", "4")
    assert "sequence_parallel must divide the number of processes, got 4 for 6; start a multiple of 4" in words
    words = refused(capsys, *tiny, *runs)
    assert "torchrun has started 6 processes; say with --sequence_parallel N" in words
    words = refused(capsys, *tiny, *runs, "--sequence-parallel", "1", "--data.validation_streams", "5")
    assert "data.validation_streams must be at least the number of groups of processes, 6, got 5" in words
    attention = ["--model.config.pattern", '[{"name": "attention", "n_heads": 2}]']
    words = refused(capsys, *tiny, *runs, *attention, "--sequence-parallel", "3", "--attention", "ulysses")
    assert "Attention on rank 0 of 3 cannot run by 'ulysses': 3 of 3 ranks cannot share 2 heads evenly" in words
    assert "method 'allgather' or 'ring', which take any heads" in words
    words = refused(capsys, *tiny, *runs, "--sequence-parallel", "3", "--attention", "ring", "--head-ranks", "2")
    assert "head_ranks is for attention 'usp', got 2 with 'ring'" in words
    words = refused(capsys, *tiny, *runs, "--sequence-parallel", "3", "--exchange", "ring")
    assert "exchange" in words
    assert "'chain', 'allgather', 'hillis_steele', 'pipelined'" in words
    launched(1)
    words = refused(capsys, *tiny, *runs, "--exchange", "allgather")
    assert "exchange says how processes share a sequence; give --sequence_parallel N too" in words
    assert not (tmp_path / "runs").exists()


def test_the_strategy_without_a_launcher(launched):
    with pytest.raises(RuntimeError, match="needs processes that torchrun has started: torchrun --nproc-per-node 2"):
        Trainer(accelerator="cpu", devices=2, strategy=SequenceParallelStrategy(2), logger=False)
    with pytest.raises(ValueError, match="must be a positive integer, got True"):
        SequenceParallelStrategy(True)
    with pytest.raises(ValueError, match="attention must be one of chain, allgather, ulysses, ring, usp, got 'rings'"):
        SequenceParallelStrategy(2, attention="rings")
    launched(3)
    with pytest.raises(ValueError, match="must divide the number of processes, got 2 for 3"):
        Trainer(accelerator="cpu", devices=3, strategy=SequenceParallelStrategy(2), logger=False)


# -- the example --


@pytest.mark.slow
def test_the_example_under_torchrun():
    script = Path(__file__).parents[2] / "examples/sequence_parallel.py"
    losses = []
    for size, shared in ((1, 1), (2, 2), (4, 2), (4, 4)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size, script]
        command += ["--sequence-parallel", shared, "--steps", 3, "--context", 64]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400, check=True)
        losses.append([float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")])
    assert len(losses[0]) == 3
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], abs=2e-5)
