"""Which implementation of an op runs, and the registration that every op shares.

An op has up to four implementations, each a module of its folder:

* ``reference``: a loop over time in plain PyTorch, the specification; differentiable any number of times.
* ``chunked``: PyTorch operations on whole chunks, on any device and in float64.
* ``cpu``: Numba (through :mod:`seqzoo.kernels.numba_runtime`).
* ``gpu``: Triton, for CUDA and ROCm devices; under ``TRITON_INTERPRET=1`` it takes CPU tensors.

The choice follows the device unless :func:`backend` or ``SEQZOO_BACKEND`` names one. What was asked for and cannot run
is an error that says why, never another implementation.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqzoo.packing import check_values

BACKENDS = ("reference", "chunked", "cpu", "gpu")
WIDE = (torch.float64, torch.complex128)

library = torch.library.Library("seqzoo", "DEF")

_NOTHING = nullcontext()


class Slot:
    """What is asked of every op at present; plain attributes, which ``torch.compile`` guards."""

    def __init__(self) -> None:
        self.backend = _known(os.environ.get("SEQZOO_BACKEND") or None, "SEQZOO_BACKEND")
        self.checks = os.environ.get("SEQZOO_CHECK", "0") not in ("", "0")
        # what answers the ops with a state while a mixer runs whose sequences lie on several ranks
        self.parallel: Any = None


def _known(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


slot = Slot()


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Runs the ops inside the block on one implementation.

    Args:
        name: ``"reference"``, ``"chunked"``, ``"cpu"``, ``"gpu"``, or None for the choice by device.

    Raises:
        ValueError: If there is no such implementation. An op raises RuntimeError if the one named cannot run.
    """
    previous, slot.backend = slot.backend, _known(name, "backend")
    try:
        yield
    finally:
        slot.backend = previous


@contextmanager
def checks(enabled: bool = True) -> Iterator[None]:
    """Makes the ops inside the block look at the values of their inputs (NaN, infinity), which synchronises a GPU."""
    previous, slot.checks = slot.checks, enabled
    try:
        yield
    finally:
        slot.checks = previous


def interpreted() -> bool:
    """Whether Triton's interpreter, which runs kernels on CPU tensors, is switched on."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def available(module: str) -> bool:
    """Whether a package can be imported, found without importing it."""
    return importlib.util.find_spec(module) is not None


def obstacle(name: str, device: torch.device, wide: bool) -> str | None:
    """Why the implementation ``name`` cannot run on ``device`` (``wide``: in float64), or None when it can."""
    if name == "cpu":
        if device.type != "cpu":
            return f"it takes CPU tensors, these are on {device}"
        if not available("numba"):
            return "the package numba is not installed; install numba"
    if name == "gpu":
        if not available("triton"):
            return "the package triton is not installed; install triton"
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            return f"it takes CUDA tensors (or CPU tensors under TRITON_INTERPRET=1), these are on {device}"
        if device.type == "cuda" and wide:
            return "it has no float64; the chunked implementation does"
    return None


_warned: set[str] = set()


def choose(device: torch.device, wide: bool, requested: str | None = None) -> tuple[str, str]:
    """The implementation that runs on ``device``, and why.

    Args:
        device: Where the tensors are.
        wide: Whether they are float64 or complex128.
        requested: The one asked for by name, or None.

    Returns:
        Its name and the reason in words.

    Raises:
        RuntimeError: If the one asked for cannot run.
    """
    if requested is not None:
        reason = obstacle(requested, device, wide)
        if reason is not None:
            raise RuntimeError(f"the implementation {requested!r} was asked for and cannot run: {reason}")
        return requested, "asked for"
    natural = {"cpu": "cpu", "cuda": "gpu"}.get(device.type)
    if natural is None:
        return "chunked", f"there is no kernel of its own for {device.type} devices"
    reason = obstacle(natural, device, wide)
    if reason is None:
        return natural, f"the kernel for {device.type} tensors"
    if not (device.type == "cuda" and wide) and reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"seqzoo runs its chunked PyTorch implementation, which is slower: {reason}", stacklevel=3)
    return "chunked", reason


def require(device: torch.device, wide: bool) -> None:
    """What an op calls that is made of others and of PyTorch's own.

    Raises:
        RuntimeError: If an implementation is asked for by name that cannot run. In compiled code the others raise.
    """
    if slot.backend is not None and not torch.compiler.is_compiling():
        choose(device, wide, slot.backend)


def chosen(requested: str, *tensors: Tensor | None) -> str:
    """The implementation for a call on these tensors; ``requested`` is empty for the choice by device."""
    present = [tensor for tensor in tensors if tensor is not None]
    device = present[0].device
    if not requested and device.type == "cpu" and available("numba"):
        return "cpu"  # what follows would say so too, at a tenth of the time of a small call
    wide = any(tensor.dtype in WIDE for tensor in present)
    return choose(device, wide, requested or None)[0]


@functools.cache
def implementation(op: str, name: str) -> ModuleType:
    """The module that holds one implementation of an op."""
    return importlib.import_module(f"seqzoo.kernels.{op}.{name}")


def uncast(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast, which would narrow the matrix products inside an op."""
    # the meta device has no autocast to ask for
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


# by op: its tensors that are float64 or complex128 even in a call that computes in less
_always_wide: dict[str, tuple[str, ...]] = {}


def is_wide(op: str, tensors: Mapping[str, Tensor | None]) -> bool:
    """Whether a call of ``op`` on these tensors, by argument name, computes in float64."""
    apart = _always_wide.get(op, ())
    return any(tensor is not None and tensor.dtype in WIDE for name, tensor in tensors.items() if name not in apart)


def define(
    op: str,
    part: str,
    schema: str,
    fake: Callable[..., Any],
    always_wide: tuple[str, ...] = (),
    strided: tuple[str, ...] = (),
) -> Any:
    """Registers ``seqzoo::<op>_<part>``, which runs the function ``part`` of the implementation chosen for its tensors.

    Args:
        op: The op, which is also its folder.
        part: ``"forward"`` or ``"backward"``.
        schema: Arguments and results in torch.library's language; the last argument is ``str backend``.
        fake: The same arguments to results of the right shapes, on fake tensors.
        always_wide: Arguments that are float64 or complex128 whatever the op computes in: the others say what that is.
        strided: Arguments that the implementations take as they lie in memory; they get contiguous copies of others.

    Returns:
        The operator, to be called with all its arguments by position.
    """
    name = f"{op}_{part}"
    library.define(name + schema)
    operator = getattr(torch.ops.seqzoo, name).default
    if always_wide:
        _always_wide[op] = always_wide
    names = [argument.name for argument in operator._schema.arguments[:-1]]
    decisive, compact = ([one not in apart for one in names] for apart in (always_wide, strided))

    def run(*arguments: Any) -> Any:
        *inputs, requested = arguments
        inputs = [
            value.contiguous() if copied and isinstance(value, Tensor) else value
            for value, copied in zip(inputs, compact, strict=True)
        ]
        telling = itertools.compress(inputs, decisive)
        tensors = [value for value in telling if isinstance(value, Tensor)]
        found = getattr(implementation(op, chosen(requested, *tensors)), part)
        with uncast(tensors[0].device):
            return found(*inputs)

    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"seqzoo::{name}", fake, lib=library)
    return operator


def check_boundaries(cu_seqlens: Tensor | None, total: int) -> None:
    """What an implementation that reads boundaries on the host calls first: an out-of-range one must never index."""
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        check_values(cu_seqlens, total)
