"""Compiles the GPU kernels ahead of time, without a GPU, and reads what they use out of the compiled code.

``python -m seqzoo.kernels.aot`` prints a table, by target, op and example: the launches, the bytes that an element of
the op moves, and of each kernel the registers, the shared memory and the spills. An op takes part by a function
``examples`` in its ``gpu.py`` (:class:`seqzoo.kernels.launch.Example`). Compiled code is kept in Triton's own cache.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import interpreted
from seqzoo.kernels.launch import Device, Example, Launch, assume

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
        backend: ``"cuda"`` or ``"hip"``.
        arch: Compute capability, or the name of the architecture.
        shared_memory: Most bytes a program may have.
        device: What launch configurations are planned for.
    """

    backend: str
    arch: int | str
    shared_memory: int
    device: Device


TARGETS = {
    "sm_80": Target("cuda", 80, 166912, Device(processors=108, warp=32)),
    "sm_90": Target("cuda", 90, 232448, Device(processors=132, warp=32)),
    "sm_100": Target("cuda", 100, 232448, Device(processors=148, warp=32)),
    "gfx942": Target("hip", "gfx942", 65536, Device(processors=304, warp=64)),
}


def ops() -> list[str]:
    """The ops that have GPU kernels of their own, which all go through the launcher."""
    paths = Path(__file__).resolve().parent.glob("*/gpu.py")
    return sorted(path.parent.name for path in paths if "from seqzoo.kernels.launch import" in path.read_text())


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """The signature, constants and attributes that Triton's launcher would derive from the arguments of a launch."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value, name = launch.arguments[parameter.name], parameter.name
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not fixed:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, target: Target) -> Any:
    """Compiles the kernel of a launch exactly as the launch would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, *specialise(launch))
    where = GPUTarget(target.backend, target.arch, target.device.warp)
    return triton.compile(source, target=where, options=launch.options())


def resources(compiled: Any) -> dict[str, int]:
    """Registers a thread, bytes of shared memory a program, and spills, of a compiled kernel.

    Spills are accesses to local memory inside loops in NVIDIA's machine code (what its assembler parks on the stack
    before a loop and fetches after it costs nothing), spilled vector registers and bytes of scratch in AMD's.
    """
    shared = int(compiled.metadata.shared)
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        spills = _number(r"\.vgpr_spill_count:\s*(\d+)", text) + _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
        return {"registers": _number(r"\.vgpr_count:\s*(\d+)", text), "shared": shared, "spills": spills}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("--dump-resource-usage", "-sass"))
    return {"registers": _number(r"REG:(\d+)", usage), "shared": shared, "spills": spills_in_loops(code)}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiled code does not say {pattern!r}")
    return int(found.group(1))


def _cuobjdump(option: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True, env=environment).stdout


def spills_in_loops(code: str) -> int:
    """Loads from and stores to local memory between a backward branch of NVIDIA machine code and its target."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", code, flags=re.MULTILINE)
    loops = []
    for address, operation, operands in lines:
        jump = re.search(r"0x([0-9a-f]+)", operands) if operation.startswith("BRA") else None
        # a branch to itself only fills the end of the code
        if jump and int(jump.group(1), 16) < int(address, 16):
            loops.append((int(jump.group(1), 16), int(address, 16)))
    local = [int(address, 16) for address, operation, _ in lines if operation.startswith(("LDL", "STL"))]
    return sum(any(first <= address <= last for first, last in loops) for address in local)


def measure(target: str, op: str, exhaustive: bool) -> dict[str, Any]:
    """The table's entries for one op on one target, by example."""
    found = {}
    with assume(TARGETS[target].device):
        examples: list[Example] = list(importlib.import_module(f"seqzoo.kernels.{op}.gpu").examples(exhaustive))
    for example in examples:
        kernels = {
            launch.kernel.__name__: resources(compile_launch(launch, TARGETS[target])) for launch in example.launches
        }
        moved = sum(launch.traffic() for launch in example.launches) / example.elements
        found[example.label] = {"launches": len(example.launches), "bytes": round(moved, 2), "kernels": kernels}
    return found


def table(targets: list[str], names: list[str], exhaustive: bool) -> dict[str, Any]:
    """The whole table, with the version of Triton that its numbers of registers hold for."""
    import triton

    tasks = [(target, op, exhaustive) for target in targets for op in names]
    with ProcessPoolExecutor(min(len(tasks), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        results = list(pool.map(measure, *zip(*tasks, strict=True)))
    entries: dict[str, dict[str, Any]] = {target: {} for target in targets}
    for (target, op, _), result in zip(tasks, results, strict=True):
        entries[target][op] = result
    return {"triton": triton.__version__, "targets": entries}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m seqzoo.kernels.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--ops", nargs="+", choices=ops(), default=ops())
    parser.add_argument("--exhaustive", action="store_true", help="every variant, which takes many minutes")
    parser.add_argument("--output", type=Path, help="file to write instead of printing")
    options = parser.parse_args()
    if interpreted():
        parser.error("kernels are compiled outside Triton's interpreter; unset TRITON_INTERPRET")
    text = json.dumps(table(options.targets, options.ops, options.exhaustive), indent=1, sort_keys=True) + "\n"
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
