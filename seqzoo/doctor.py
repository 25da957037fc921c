"""``seqzoo doctor``: what this machine runs, and whether it computes it right.

Every op, forward and backward, on every implementation that can run here, against its own float64 reference.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from seqzoo.kernels import dispatch
from seqzoo.testing import OP_CASES, compare
from seqzoo.version import __version__

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64)
PACKAGES = ("torch", "triton", "numba", "einops", "safetensors", "lightning", "transformers", "causal-conv1d")


def environment() -> Iterator[str]:
    """Lines that describe the machine and the packages that matter."""
    yield f"seqzoo {__version__}, Python {platform.python_version()}, {platform.platform()}"
    found = [f"{name} {_version(name)}" for name in PACKAGES]
    yield ", ".join(found)
    yield f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} PyTorch threads"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield "no CUDA or ROCm device"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def devices() -> list[torch.device]:
    """The CPU, and the accelerator where there is one."""
    return [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


def choices() -> Iterator[str]:
    """Lines that say which implementation of the ops is taken on each device, why, and why not the others."""
    for device in devices():
        for wide in (False, True):
            try:
                chosen = "{} ({})".format(*dispatch.choose(device, wide, dispatch.slot.backend))
            except RuntimeError as error:
                chosen = f"none: {error}"
            yield f"{device}, {'float64' if wide else 'float32 and below'}: {chosen}"
        for name in dispatch.BACKENDS:
            reason = dispatch.obstacle(name, device, False)
            if reason is not None:
                yield f"{device}: {name} cannot run: {reason}"


@dataclass
class Finding:
    """The worst of all cases of an op on one implementation and dtype: error over what is allowed; above 1 is wrong."""

    op: str
    device: torch.device
    backend: str
    dtype: torch.dtype
    cases: int = 0
    excess: float = 0.0
    where: str = ""

    def __str__(self) -> str:
        verdict = "ok  " if self.excess <= 1 else "FAIL"
        name = f"{self.op} {self.device.type} {self.backend} {str(self.dtype).split('.')[1]}"
        tail = "" if self.excess <= 1 else f", worst: {self.where}"
        return f"{verdict} {name:<44} {self.cases:3d} cases, error {self.excess:.2f} of what is allowed{tail}"


def check(op: str, device: torch.device, backend: str, dtype: torch.dtype) -> Finding:
    """Compares every case of an op; an exception counts as a failure and is named."""
    finding = Finding(op, device, backend, dtype)
    for case in OP_CASES[op](dtype):
        finding.cases += 1
        try:
            measured = compare(case.to(device), backend)
        except Exception as error:  # a broken kernel may raise anything, and the other ops are still to be checked
            measured = {f"{type(error).__name__}: {error}": float("inf")}
        for name, value in measured.items():
            if value > finding.excess:
                finding.excess, finding.where = value, f"{name} of {case.label}"
    return finding


def checks() -> Iterator[Finding]:
    """All findings on this machine."""
    for op in OP_CASES:
        for device in devices():
            for backend in dispatch.BACKENDS:
                for dtype in DTYPES:
                    able = dispatch.obstacle(backend, device, dtype in dispatch.WIDE) is None
                    if backend != "reference" and able and any(True for _ in OP_CASES[op](dtype)):
                        yield check(op, device, backend, dtype)


def main(arguments: Sequence[str]) -> int:
    """The command; its status is 1 when anything fails."""
    parser = argparse.ArgumentParser("seqzoo doctor", description="Checks every op against the float64 reference.")
    parser.add_argument("--kernels", action="store_true", help="only say which implementation is taken, and why")
    options = parser.parse_args(arguments)
    _print(*environment(), "", *choices())
    if options.kernels:
        return 0
    _print("")
    started, failed = time.monotonic(), []
    for finding in checks():
        _print(str(finding))
        if finding.excess > 1:
            failed.append(finding)
    _print("")
    if failed:
        _print("failed: " + ", ".join(f"{f.op} on {f.device.type} {f.backend} {f.dtype}" for f in failed))
        return 1
    _print(f"every op is as exact as promised ({time.monotonic() - started:.0f} s)")
    return 0


def _print(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)  # noqa: T201 - a command prints
