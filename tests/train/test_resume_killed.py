"""Runs of ``seqzoo train`` that SIGKILL ends at a step that chance chooses go on to the bits of one that was let be.

The command runs in a process of its own, which is watched from outside and knows nothing of it.
"""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from seqzoo.train.checkpoints import read_checkpoint

STEPS = 90
CLOCK = ("seconds", "bytes_per_second", "tokens_per_second")
COMMON = f"""
    --trainer.max_steps {STEPS} --trainer.log_every_n_steps 1 --trainer.val_check_interval 20 --checkpoint_steps 7
    --model.warmup_steps 6 --model.config.dropout 0.1 --model.config.n_layers 2
"""
TEXT = COMMON + "--data.validation_fraction 0.25 --data.context 32 --data.validation_streams 4 --model.lr 0.02"
KINDS = {
    "bytes": f"{TEXT} --data.batch_size 4 --model.config.d_model 32",
    "documents": f"--config task/documents {TEXT} --data.tokens 300 --model.config.d_model 32",
    "listops": f"--config task/listops-lite --config model/s4d {COMMON} --model.config.d_model 16 "
    "--data.training_examples 100 --data.validation_examples 20 --data.test_examples 20 --data.batch_size 2",
}


@dataclass(frozen=True)
class Kill:
    """When a run is killed.

    Attributes:
        kind: Of run.
        seed: Of the step.
        writing: Whether while a checkpoint is written, the first one behind that step; else wherever it stands then.
    """

    kind: str
    seed: int
    writing: bool

    @property
    def step(self) -> int:
        return random.Random(self.seed).randrange(2, STEPS - 15)


KILLS = [
    Kill("bytes", 0, False),
    Kill("bytes", 1, True),
    Kill("bytes", 2, False),
    Kill("bytes", 3, True),
    Kill("bytes", 4, False),
    Kill("documents", 5, False),
    Kill("documents", 6, True),
    Kill("listops", 7, False),
    Kill("listops", 8, True),
]


def rows(run: Path) -> list[dict[str, str]]:
    """The whole lines of the table of metrics, as they are written, without what the clock says."""
    path = run / "metrics.csv"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [{name: cell for name, cell in row.items() if name not in CLOCK} for row in found]


def reached(run: Path) -> int:
    """The last step that has a row."""
    return max((int(row["step"]) for row in rows(run)), default=0)


def leftovers(run: Path) -> list[str]:
    return [one.name for one in (run / "checkpoints").iterdir() if one.name.endswith(".tmp")]


@dataclass
class Watched:
    """A process and the folder that its run is to be in."""

    process: subprocess.Popen
    runs: Path

    @property
    def run(self) -> Path | None:
        found = list(self.runs.iterdir()) if self.runs.is_dir() else []
        return found[0] if found and (found[0] / "checkpoints").is_dir() else None

    def wait(self, condition: Callable[[Path], bool], deadline: float = 120.0) -> Path:
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            run = self.run
            if run is not None and condition(run):
                return run
            if self.process.poll() is not None:
                _, err = self.process.communicate()
                raise AssertionError(f"the run ended by itself, {self.process.returncode}: {err[-2000:]}")
            time.sleep(0.0005)
        raise AssertionError("the run did not come so far")


def options(kind: str, corpus: Path, cache: Path) -> list[str]:
    data = ["--data.cache", str(cache)] if kind == "listops" else ["--data.folder", str(corpus)]
    return [*KINDS[kind].split(), *data]


def kill(one: Kill, arguments: list[str], runs: Path) -> Path:
    """Starts a run and kills it; returns its folder."""
    command = [sys.executable, "-W", "ignore", "-m", "seqzoo.cli", "train", *arguments, "--runs", str(runs)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    watched = Watched(process, runs)
    try:
        run = watched.wait(lambda run: reached(run) >= one.step)
        while one.writing:
            watched.wait(lambda run: bool(leftovers(run)))
            # it stands still while we look again: the file may have been renamed since
            process.send_signal(signal.SIGSTOP)
            if leftovers(run):
                break
            process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
    assert one.step <= reached(run) < STEPS
    assert not (run / "report.json").exists()
    assert bool(leftovers(run)) or not one.writing
    saved = read_checkpoint(run / "checkpoints" / "last.safetensors")["global_step"]
    assert 0 <= saved <= reached(run)
    return run


def check(run: Path, reference: Path) -> None:
    """Every loss of the table and everything that is left, bit by bit."""
    assert len(rows(reference)) >= STEPS
    assert rows(run) == rows(reference)
    assert (run / "model/model.safetensors").read_bytes() == (reference / "model/model.safetensors").read_bytes()
    ours, theirs = (read_checkpoint(one / "checkpoints/last.safetensors") for one in (run, reference))
    assert repr(ours["optimizer_states"]) == repr(theirs["optimizer_states"])
    assert leftovers(run) == []


def test_a_killed_run_goes_on_to_the_same_bits(corpus, train, tmp_path):
    one = KILLS[0]
    arguments = options(one.kind, corpus, tmp_path / "cache")
    run = kill(one, arguments, tmp_path / "killed")
    done = train((["--resume", run], None), ([*arguments, "--runs", tmp_path / "whole"], None))
    assert done.statuses == [0, 0], done.err
    check(run, next((tmp_path / "whole").iterdir()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_killed_run_does(kind, corpus, train, tmp_path):
    arguments = options(kind, corpus, tmp_path / "cache")
    done = train(([*arguments, "--runs", tmp_path / "whole"], None))
    assert done.statuses == [0], done.err
    reference = next((tmp_path / "whole").iterdir())
    found = [kill(one, [*arguments], tmp_path / f"{one.seed}") for one in KILLS if one.kind == kind]
    done = train(*[(["--resume", run], None) for run in found], deadline=400.0)
    assert done.statuses == [0] * len(found), done.err
    for run in found:
        check(run, reference)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(corpus, train, tmp_path):
    arguments = options("documents", corpus, tmp_path / "cache")
    run = kill(Kill("documents", 11, False), arguments, tmp_path / "killed")
    for seed in (12, 13):
        place = reached(run)
        command = [sys.executable, "-W", "ignore", "-m", "seqzoo.cli", "train", "--resume", str(run)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        watched = Watched(process, run.parent)
        further = random.Random(seed).randrange(1, 6)
        watched.wait(lambda run, place=place, further=further: reached(run) >= min(place + further, STEPS - 8))
        process.kill()
        process.communicate()
    done = train((["--resume", run], None), ([*arguments, "--runs", tmp_path / "whole"], None))
    assert done.statuses == [0, 0], done.err
    check(run, next((tmp_path / "whole").iterdir()))
