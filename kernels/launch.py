"""Kernel launches as data: one plan runs on a device, is compiled ahead of time and has its memory traffic counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: The function under ``triton.jit``.
        grid: Programs in each dimension; where one is 0 there is nothing to do.
        arguments: Every parameter of the kernel by its name, compile-time constants included.
        reads: The tensors whose every element it must read, for the count of memory traffic.
        writes: The tensors whose every element it writes.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        registers: Most registers a thread may have. None leaves the number to the assembler: NVIDIA's may lower it at
            the price of spills so that more programs fit; AMD's compiler is never told.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    reads: tuple[Tensor | None, ...]
    writes: tuple[Tensor | None, ...]
    num_warps: int = 1
    num_stages: int = 1
    registers: int | None = None

    def options(self) -> dict[str, Any]:
        """What the compiler is told beside the arguments."""
        # said explicitly because Triton's default differs between its backends and will change
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        # Triton refuses an option that a device's backend does not know
        return options if self.registers is None or torch.version.hip else {**options, "maxnreg": self.registers}

    def traffic(self) -> int:
        """Bytes that the launch moves between memory and the chip when nothing is moved twice."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.reads + self.writes if tensor is not None)


@dataclass(frozen=True)
class Example:
    """Launches that are compiled ahead of time as representative of an op; its tensors may be on the meta device.

    Attributes:
        label: Names it within its op.
        launches: Those of one call.
        elements: What the memory traffic is divided by.
    """

    label: str
    launches: list[Launch]
    elements: int


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Runs launches in order on ``device``, which for the interpreter is the CPU."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            if all(launch.grid):
                launch.kernel[launch.grid](**launch.arguments, **launch.options())


@dataclass(frozen=True)
class Device:
    """What launch configurations depend on.

    Attributes:
        processors: Multiprocessors, or compute units.
        warp: Threads that run in step.
    """

    processors: int
    warp: int


# the interpreter runs programs one after another: one processor keeps them few
INTERPRETER = Device(processors=1, warp=32)

_assumed: list[Device] = []


@contextmanager
def assume(device: Device) -> Iterator[None]:
    """Plans for ``device`` inside the block wherever tensors are on the meta device, for compiling ahead of time."""
    _assumed.append(device)
    try:
        yield
    finally:
        _assumed.pop()


def properties(device: torch.device) -> Device:
    """The device that a plan for tensors on ``device`` is made for."""
    if device.type == "cuda":
        return _cuda_properties(torch.cuda.current_device() if device.index is None else device.index)
    return _assumed[-1] if device.type == "meta" else INTERPRETER


@cache
def _cuda_properties(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(found.multi_processor_count, found.warp_size)
