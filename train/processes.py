"""The processes that torchrun has started: who this one is, and what they agree upon before the trainer exists."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from seqzoo.parallel.recipe import check_sizes
from seqzoo.train.configuration import ConfigurationError

# for which a process waits for another: reading data, the slowest validation, writing a checkpoint
TIMEOUT = timedelta(minutes=30)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank: Of this process, from 0 on.
        size: Processes.
        local_rank: Of this process among those on its machine.
        local_size: Processes on this machine.
        sequence_parallel: Processes that share a sequence.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    sequence_parallel: int

    @classmethod
    def started(cls, sequence_parallel: int | None) -> Processes | None:
        """The processes that the environment tells of; None where there is one alone and nothing else is asked for.

        Raises:
            ConfigurationError: If several processes are asked for and torchrun has started none, or the other way
                round, or their number does not fit.
        """
        launched, size = dist.is_torchelastic_launched(), int(os.environ.get("WORLD_SIZE", "1"))
        if sequence_parallel is None:
            if launched and size > 1:
                raise ConfigurationError(
                    f"torchrun has started {size} processes; say with --sequence_parallel N how many of them share a "
                    "sequence (1: each has sequences of its own)"
                )
            return None
        try:
            check_sizes(size if launched else sequence_parallel, sequence_parallel)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        if not launched:
            raise ConfigurationError(
                f"sequence_parallel={sequence_parallel} needs processes, which torchrun starts: torchrun "
                f"--nproc-per-node {sequence_parallel} -m seqzoo.cli train --sequence_parallel {sequence_parallel}; on "
                "one process leave it out"
            )
        place = {name: int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        return cls(place["RANK"], size, place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"], sequence_parallel)

    @property
    def machines(self) -> int:
        """How many machines have processes, as many each."""
        return self.size // self.local_size

    def connect(self, accelerator: str) -> None:
        """Makes the processes know one another.

        Args:
            accelerator: The trainer's option, ``"cpu"``, ``"gpu"`` or ``"auto"``.
        """
        if dist.is_initialized():
            return
        on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
        if on_gpu:
            torch.cuda.set_device(self.local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)

    def first(self, run: Callable[[], _Result]) -> _Result:
        """What a function returns in the first process, on all of them; what it raises is raised on all."""
        found: list[Any] = [None, None]
        if self.rank == 0:
            try:
                found[0] = run()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        if found[1] is not None:
            raise found[1]
        return found[0]
