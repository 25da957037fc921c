"""Where compiled Numba kernels are kept between processes, safely for processes that compile at the same time.

Importing this module imports Numba.
"""

from __future__ import annotations

import fcntl
import hashlib
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

from seqzoo.folders import cache_root
from seqzoo.version import __version__


class SharedCache(FunctionCache):
    """Numba's cache of one function; a disk that fails costs compilation the next time, never the call."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Returns the compiled function for a signature, or None."""
        try:
            return super().load_overload(sig, target_context)
        except (OSError, EOFError):
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Saves the compiled function, one process at a time: Numba reads the index, then writes it."""
        try:
            with Path(self.cache_path, "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                super().save_overload(sig, data)
        except OSError:
            self.disable()


def attach_cache(dispatcher: Any, body: Callable[..., Any], variant: str) -> None:
    """Gives a dispatcher its cache; variants of one body, which Numba cannot tell apart, have a folder each."""
    root = cache_folder()
    if root is None:
        return
    previous, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(root / variant)
    try:
        dispatcher._cache = SharedCache(body)
    finally:
        numba.config.CACHE_DIR = previous


@lru_cache(maxsize=1)
def cache_folder() -> Path | None:
    """The folder for this version of the kernels in :func:`seqzoo.folders.cache_root`, None if it cannot be written."""
    try:
        folder = cache_root() / "numba" / f"{__version__}-{_digest()}"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):
        return None
    return folder


def _digest() -> str:
    """Numba compares only the file that holds a kernel; what a kernel calls, and its constants, lie in others."""
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
