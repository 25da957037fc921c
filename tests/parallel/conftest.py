"""A pool of ranks: processes on this machine, started once, that run cases one after another.

They are under gloo, or with ``--device cuda`` under NCCL, each on a GPU of its own; tests of more ranks than there are
GPUs are skipped.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import runpy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


class Failure(Exception):
    """What a rank raised: the name of its class, and its words."""

    def __init__(self, rank: int, name: str, words: str, trace: str) -> None:
        super().__init__(f"rank {rank}: {name}: {words}\n{trace}")
        self.name, self.words = name, words


class Pool:
    """Ranks that answer cases.

    Args:
        size: How many.
        store: A file that does not exist yet, through which they find one another.
        timeout: Seconds after which a rank stops waiting for another.
        cases: The file that each of them executes.
        device: Where their tensors are, ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, size: int, store: Path, timeout: float, cases: str = "ranks.py", device: str = "cpu") -> None:
        self.size = size if device == "cpu" else min(size, torch.cuda.device_count())
        self.store, self.timeout, self.starts, self.device = store, timeout, 0, device
        self.cases = str(HERE / cases)
        self.restart()

    def restart(self) -> None:
        """Starts the ranks anew."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "seqzoo.parallel", "seqzoo.testing"])
        self.processes, self.connections = [], []
        self.starts += 1
        for rank in range(self.size):
            here, there = context.Pipe()
            given = {"connection": there, "rank": rank, "size": self.size, "timeout": self.timeout}
            given["device"] = self.device
            given["store"] = f"{self.store}{self.starts}"
            process = context.Process(target=runpy.run_path, args=(self.cases, given, "rank"), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.connections.append(here)
        for rank in range(self.size):
            assert self.answer(rank, 120) == "ready"

    def answer(self, rank: int, seconds: float) -> Any:
        if not self.connections[rank].poll(max(0.0, seconds)):
            raise TimeoutError(f"rank {rank} has not answered for {seconds} s")
        return self.connections[rank].recv()

    def start(self, name: str, ranks: int, options: list[dict[str, Any]]) -> None:
        if ranks > self.size:
            pytest.skip(f"{ranks} ranks need as many GPUs, there are {self.size}")
        for connection, own in zip(self.connections[:ranks], options, strict=True):
            connection.send((name, ranks, own))

    def collect(self, ranks: list[int], seconds: float = 120) -> list[Any]:
        """The answers of ranks, results or Failures."""
        deadline = time.monotonic() + seconds
        found = []
        for rank in ranks:
            right, value = self.answer(rank, deadline - time.monotonic())
            found.append(value if right else Failure(rank, *value))
        return found

    def call(self, name: str, ranks: int, **options: Any) -> list[Any]:
        """The results of all ranks; raises the first one's error."""
        self.start(name, ranks, [options] * ranks)
        try:
            found = self.collect(list(range(ranks)))
        except (TimeoutError, EOFError):
            # the next test shall not read this one's answers
            self.kill()
            self.restart()
            raise
        for value in found:
            if isinstance(value, Failure):
                raise value
        return found

    def stop(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self.processes:
            process.join(10)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join(10)


def running(folder: pytest.TempPathFactory, device: torch.device, cases: str) -> Iterator[Pool]:
    """Four ranks for as long as tests need them."""
    ranks = Pool(4, folder.mktemp("ranks") / "store", 60, cases, device.type)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Iterator[Pool]:
    yield from running(tmp_path_factory, device, "ranks.py")


@pytest.fixture(scope="module")
def attention_pool(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Iterator[Pool]:
    yield from running(tmp_path_factory, device, "attention_ranks.py")


@pytest.fixture(scope="session")
def recipe_pool(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Iterator[Pool]:
    yield from running(tmp_path_factory, device, "recipe_ranks.py")


@pytest.fixture
def make_pool(tmp_path: Path, device: torch.device) -> Iterator[Callable[[int, float], Pool]]:
    """Makes pools for tests that break theirs."""
    made: list[Pool] = []

    def make(size: int, timeout: float) -> Pool:
        made.append(Pool(size, tmp_path / f"store{len(made)}", timeout, device=device.type))
        return made[-1]

    yield make
    for ranks in made:
        ranks.kill()
