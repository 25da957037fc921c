"""A small corpus, tiny runs on it, and the processes that make them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("fault_driver.py")
STEPS = 24
TINY = """
    --data.validation_fraction 0.25 --data.context 32 --data.batch_size 4 --data.validation_streams 4
    --model.config.d_model 16 --model.config.n_layers 2 --model.config.dropout 0.1 --model.warmup_steps 6
    --model.lr 0.02 --model.sample_length 40 --trainer.val_check_interval 8 --trainer.limit_val_batches 4
    --trainer.log_every_n_steps 3 --checkpoint_steps 5
"""


@dataclass
class Done:
    """How a process ended."""

    returncode: int
    statuses: list[int] | None
    out: str
    err: str


def write_corpus(folder: Path, files: int = 24, words: int = 500) -> Path:
    """Text with structure to learn, the same every time."""
    generator = random.Random(0)
    known = ["def ", "return ", "self.", "x", "y", " = ", "(", ")", ":\n    ", "\n", "import ", "value", "if "]
    for number in range(files):
        path = folder / f"part{number % 3}" / f"file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(generator.choice(known) for _ in range(words)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def train() -> Callable[..., Done]:
    """Runs commands, ``(arguments, fault)`` each, in one new process; the fault is the first one's."""

    def run(*commands: Sequence[Any], deadline: float = 180.0) -> Done:
        data = [{"arguments": list(map(str, arguments)), "fault": fault} for arguments, fault in commands]
        # one thread, as two pools of two spin against each other on a busy machine
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        process = subprocess.run(
            [sys.executable, "-W", "ignore::FutureWarning", str(DRIVER), json.dumps(data)],
            capture_output=True,
            text=True,
            timeout=deadline,
            env=environment,
            check=False,
        )
        last = process.stdout.strip().splitlines()[-1:] or [""]
        statuses = json.loads(last[0]) if last[0].startswith("[") else None
        return Done(process.returncode, statuses, process.stdout, process.stderr)

    return run


@pytest.fixture(scope="session")
def quiet_trainer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Makes a trainer of so many steps on the CPU that shows and keeps nothing."""
    import lightning.pytorch as lightning

    def make(steps: int, **options: Any) -> lightning.Trainer:
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        values = {
            "max_epochs": -1,
            "accelerator": "cpu",
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "val_check_interval": steps,
            "default_root_dir": str(tmp_path_factory.getbasetemp()),
        }
        return lightning.Trainer(max_steps=steps, **{**dict.fromkeys(quiet, False), **values, **options})

    return make


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """Inside of ``interrupted(step)`` a run that is judged by accuracy is interrupted in that step, as by Ctrl-C."""
    from seqzoo.train.classification_training import ClassificationMetering

    original = ClassificationMetering.on_train_batch_end

    @contextlib.contextmanager
    def during(step: int) -> Iterator[None]:
        def stop(self: Any, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == step:
                raise KeyboardInterrupt
            original(self, trainer, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(ClassificationMetering, "on_train_batch_end", stop)
            with pytest.raises(SystemExit):
                yield

    return during


@pytest.fixture(scope="session")
def tiny(corpus: Path) -> list[str]:
    """Options of a run of 24 steps that takes less than a second."""
    return ["--data.folder", str(corpus), *TINY.split(), "--trainer.max_steps", str(STEPS)]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, train: Callable[..., Done], tiny: list[str]) -> tuple[Path, Done]:
    """The folder of a run that nothing disturbed, and how its process ended."""
    runs = tmp_path_factory.mktemp("whole")
    done = train(([*tiny, "--runs", runs], None))
    return next(runs.iterdir()), done


@dataclass
class Ranks:
    """How the processes of a run with several ended.

    Attributes:
        statuses: Of each process those of its commands, None where it died.
        codes: What each process ended with.
        out: What each one printed.
    """

    statuses: list[list[int] | None]
    codes: list[int | None]
    out: list[str]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="session")
def train_on(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ranks]:
    """Runs commands, ``(arguments, fault)`` each, in several new processes, as torchrun would."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch.distributed.fsdp", "seqzoo.parallel", "seqzoo.testing", "seqzoo.train.command"]
    )

    def run(size: int, *commands: Sequence[Any], deadline: float = 180.0) -> Ranks:
        data = [{"arguments": list(map(str, arguments)), "fault": fault} for arguments, fault in commands]
        ports, logs = free_ports(len(data)), [tmp_path_factory.mktemp("ranks") / "out" for _ in range(size)]
        processes, connections = [], []
        for rank in range(size):
            here, there = context.Pipe()
            given = {"connection": there, "rank": rank, "size": size, "ports": ports, "commands": data}
            given["log"] = str(logs[rank])
            process = context.Process(
                target=runpy.run_path, args=(str(DRIVER.with_name("rank.py")), given, "rank"), daemon=True
            )
            process.start()
            there.close()
            processes.append(process)
            connections.append(here)
        end = time.monotonic() + deadline
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        statuses = []
        for connection in connections:
            try:
                statuses.append(connection.recv() if connection.poll() else None)
            except EOFError:
                statuses.append(None)
        return Ranks(statuses, codes, [log.read_text(encoding="utf-8") for log in logs])

    return run
