"""How the project's Numba kernels are compiled and run, on one thread or several. One copy for all of them.

A kernel is a function whose outer loop is a ``prange`` over tasks, compiled once for one thread and once for several,
each when it is first called with some dtypes::

    @function
    def _scale_columns(x, task, y): ...

    @kernel
    def _scale(x, tasks, y):
        for index in prange(tasks.shape[0]):
            _scale_columns(x, tasks[index], y)

    bounds, tasks = plan(cu_seqlens, batch, total, width, threads_for(x.numel()))
    _scale(len(tasks), array(x), tasks, array(y))

The threads are OpenMP's where it exists. GNU OpenMP kills a forked child that uses it after its parent did, so a child
computes on one thread. Elsewhere they are Numba's own, which abort the process when two Python threads start them at
once; one lock stands before them. A fork waits for that lock and for the compiler's: what another thread holds while a
process forks is never released in the child.

Importing this module does not import Numba; the first kernel does.
"""

from __future__ import annotations

import itertools
import os
import threading
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# the fewest elements worth a thread: starting one costs about what they take
ELEMENTS_PER_THREAD = 25_000
# two cache lines of float32: threads that share rows do not write the same line
COLUMNS = 32
# a page of float32: threads that share one fetch each other's part ahead, which doubles the time
PAGE = 1024

# what NumPy has in place of the 16-bit floats
_STAND_INS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}

# in a forked child the process is another
_process = os.getpid()
# taken in this order, and by a fork
_setup, _calls = threading.RLock(), threading.RLock()


def function(body: Callable[..., Any]) -> Any:
    """Compiles a function that kernels call into each of them."""
    return _numba().njit(**_OPTIONS)(_named(body))


def reduction(body: Callable[..., Any]) -> Any:
    """As :func:`function`, but sums may be taken in any order, in which they vectorise.

    The compiler settles that order, so the bits stay the same; a function that relies on rounding (``exp``) does not
    belong into one.
    """
    return _numba().njit(**_OPTIONS | {"fastmath": {"contract", "reassoc"}})(_named(body))


def _named(body: Callable[..., Any], *words: str) -> Any:
    """A copy of a function whose name tells what it is made of.

    Numba's symbols are made of the name and a number that counts the compilations of one process. Two functions of one
    name, compiled by two processes, may have one symbol; a process that loads both from the disk calls one of them in
    place of the other.
    """
    cells = [cell.cell_contents for cell in body.__closure__ or ()]
    held = [getattr(getattr(one, "py_func", one), "__qualname__", repr(one)) for one in cells]
    copy = types.FunctionType(body.__code__, body.__globals__, body.__name__, body.__defaults__, body.__closure__)
    copy.__module__, copy.__doc__, copy.__kwdefaults__ = body.__module__, body.__doc__, body.__kwdefaults__
    copy.__qualname__ = "__".join((body.__qualname__, *held, *words))
    return copy


def kernel(body: Callable[..., Any]) -> Kernel:
    """Makes a kernel of a module's function; a closure over compiled functions would defeat the cache on disk."""
    return Kernel(body)


class Kernel:
    """A Numba function in two compilations.

    Attributes:
        serial: The dispatcher for one thread.
        parallel: The dispatcher for several.
    """

    def __init__(self, body: Callable[..., Any]) -> None:
        self.serial = _dispatcher(body, parallel=False)
        self.parallel = _dispatcher(body, parallel=True)

    def __call__(self, threads: int, *arguments: Any) -> None:
        """Runs the kernel on so many threads, at most what :func:`threads_for` returned."""
        if threads == 1:
            self.serial(*arguments)
        elif threading_layer() == "workqueue":
            with _calls:
                self._run(threads, arguments)
        else:
            self._run(threads, arguments)

    def _run(self, threads: int, arguments: tuple[Any, ...]) -> None:
        # Numba's number of threads belongs to the calling thread, and is the user's
        numba = _numba()
        previous = numba.get_num_threads()
        if previous == threads:
            self.parallel(*arguments)
            return
        numba.set_num_threads(threads)
        try:
            self.parallel(*arguments)
        finally:
            numba.set_num_threads(previous)


def threads_for(elements: int) -> int:
    """On how many threads a kernel over so many elements runs: at most as many as torch uses, and as it is worth."""
    if elements < 2 * ELEMENTS_PER_THREAD or os.getpid() != _process:
        return 1
    threads = torch.get_num_threads()
    if threads == 1:
        return 1
    return min(threads, elements // ELEMENTS_PER_THREAD, _numba().config.NUMBA_NUM_THREADS)


@lru_cache(maxsize=1)
def threading_layer() -> str:
    """Starts Numba's threads and says whose they are: ``"omp"``, else ``"workqueue"``, or what the user configured."""
    numba = _numba()
    with _setup:
        configured = numba.config.THREADING_LAYER
        for layer in ("omp", "workqueue") if configured == "default" else (configured,):
            numba.config.THREADING_LAYER = layer
            try:
                # does nothing if they run already, in whatever layer
                numba.get_num_threads()
            except ValueError:
                if layer != "omp" or configured != "default":
                    raise
            else:
                break
            finally:
                numba.config.THREADING_LAYER = configured
        return numba.threading_layer()


def array(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor as a flat array; bfloat16 as uint16 and float16 as int16."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    stand_in = _STAND_INS.get(tensor.dtype)
    if stand_in is not None:
        tensor = tensor.view(stand_in)
    return tensor.numpy().reshape(-1)


def plan(cu_seqlens: Tensor | None, batch: int, total: int, width: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides sequences of rows among threads: groups of whole sequences, blocks of columns where those are too few.

    Args:
        cu_seqlens: Checked boundaries on the host, or None for ``batch`` sequences of ``total`` rows each.
        batch: The number of dense sequences.
        total: Rows of a dense sequence.
        width: Columns of a row.
        threads: How many threads share the work.

    Returns:
        bounds: int64 ``(S + 1,)``, the first row of each sequence, then the number of rows.
        tasks: int64 ``(n, 4)``: first column, number of columns, first sequence, one beyond the last sequence.
    """
    if cu_seqlens is None:
        return _dense_plan(batch, total, width, threads)
    bounds = cu_seqlens.numpy().astype(np.int64)
    return bounds, _tasks(bounds, width, threads)


@lru_cache(maxsize=128)
def _dense_plan(batch: int, total: int, width: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    bounds = np.arange(batch + 1, dtype=np.int64) * total
    return bounds, _tasks(bounds, width, threads)


def _tasks(bounds: np.ndarray, width: int, threads: int) -> np.ndarray:
    """The division whose longest task is the shortest."""
    if threads == 1:
        return np.array([[0, width, 0, bounds.size - 1]], dtype=np.int64)
    most = min(threads, -(-width // COLUMNS))
    candidates = []
    for blocks in {most, *(2**power for power in range(most.bit_length()))}:
        columns = -(-width // (blocks * COLUMNS)) * COLUMNS
        groups = cut_rows(bounds, threads // blocks)
        # a row costs its columns, and as much as COLUMNS more to begin it
        cost = int(np.diff(bounds[groups]).max()) * (columns + COLUMNS)
        candidates.append((2 * cost if blocks > 1 and columns < PAGE else cost, columns, groups))
    _, columns, groups = min(candidates, key=lambda candidate: candidate[:2])
    tasks = [
        (first, min(columns, width - first), start, stop)
        for start, stop in itertools.pairwise(groups)
        for first in range(0, width, columns)
    ]
    return np.array(tasks, dtype=np.int64)


def cut_rows(bounds: np.ndarray, groups: int) -> np.ndarray:
    """Cuts the sequences into at most so many groups of neighbours, of about as many rows each: where each begins."""
    ideal = np.arange(1, groups) * (bounds[-1] / groups)
    above = np.searchsorted(bounds, ideal)
    below = np.maximum(above - 1, 0)
    cuts = np.where(ideal - bounds[below] < bounds[above] - ideal, below, above)
    return np.unique(np.concatenate(([0], cuts, [bounds.size - 1])))


@lru_cache(maxsize=1)
def _numba() -> Any:
    import numba
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    # imports what the first compilation would; a child forked during an import waits for its lock for ever
    cpu_target.typing_context.refresh()  # pyright: ignore - a cached property
    cpu_target.target_context.refresh()  # pyright: ignore - another
    locks = (_setup, _calls, global_compiler_lock)

    def acquire() -> None:
        for lock in locks:
            lock.acquire()

    def release() -> None:
        for lock in reversed(locks):
            lock.release()

    os.register_at_fork(before=acquire, after_in_parent=release, after_in_child=release)
    return numba


def _dispatcher(body: Callable[..., Any], parallel: bool) -> Any:
    variant = "parallel" if parallel else "serial"
    body = _named(body, variant)
    dispatcher = _numba().njit(parallel=parallel, **_OPTIONS)(body)
    from seqzoo.kernels.numba_cache import attach_cache

    with _setup:
        attach_cache(dispatcher, body, variant)
    return dispatcher
