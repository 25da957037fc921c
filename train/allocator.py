"""Keeps large freed blocks in the process, which glibc by default returns to the kernel and faults in again."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Raises glibc's thresholds, for the whole process and for good, so that large tensors reuse memory.

    By default every tensor above 32 MB is mapped freshly and its pages are zeroed at first touch, which costs three to
    four times what an elementwise operation on it does: whole layers train twice as fast with the thresholds raised.
    The price is that the process holds on to its peak of memory, so this is a training command's decision and not an
    import's.

    Returns:
        Whether it took effect; False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # before 2.35 glibc refuses thresholds for mmap above 32 MB
    mapped = any(library.mallopt(M_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25))
    return bool(library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)) and mapped
