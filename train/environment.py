"""The record of where a run took place."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from seqzoo.train.run_folder import FORMAT
from seqzoo.version import __version__

PACKAGES = ("torch", "lightning", "schedulefree", "jsonargparse", "numpy", "numba", "triton", "safetensors")
# what bit-identical repetition depends on
DECISIVE = ("seqzoo", "torch", "threads", "processor", "device", "backend", "processes")


def describe(
    *, arguments: Sequence[str], device: str, data: Mapping[str, Any], keeps_memory: bool, processes: int = 1
) -> dict[str, Any]:
    """Versions, machine, threads, data and the state of the source, as plain data.

    Args:
        arguments: Of the command.
        device: On which the run trains.
        data: The data module's own description.
        keeps_memory: Whether the allocator was told to keep freed memory.
        processes: How many train together.
    """
    return {
        "arguments": list(arguments),
        "format": FORMAT,
        "seqzoo": __version__,
        "git": git_state(Path(__file__).resolve().parent),
        "python": sys.version,
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "processes": processes,
        "backend": os.environ.get("SEQZOO_BACKEND", ""),
        "allocator": "keeps freed memory" if keeps_memory else "default",
        "data": dict(data),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What may change the bits of a resumed run, in words."""
    return [
        f"{name}: {before[name]} then, {now[name]} now" for name in DECISIVE if before.get(name, now[name]) != now[name]
    ]


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process holds: on a GPU the most that its tensors have held, else what lies in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        # no Linux: the greatest so far, in bytes on macOS
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the source and whether it was changed since; None where it is in no repository."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
