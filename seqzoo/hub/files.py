"""Files and folders that appear whole or not at all, also when the disk fills or the process dies while writing."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

AT_FDCWD = -100
RENAME_EXCHANGE = 2


class WriteError(OSError):
    """Raised when something could not be written; what was there before is untouched."""


@contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "w", *, what: str = "a file") -> Iterator[IO[Any]]:
    """Opens a file for writing that takes its name when the block ends, and vanishes when the block raises.

    Args:
        path: Where; its folder must exist.
        mode: ``"w"`` for UTF-8 text, ``"wb"`` for bytes.
        what: What is being written, for messages.

    Yields:
        The open file.

    Raises:
        WriteError: If writing fails. Other exceptions pass through.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode must be 'w' or 'wb', got {mode!r}")
    target = Path(path).resolve()
    temporary = _sibling(target)
    with _reporting(target, what):
        try:
            # newline="" writes line ends as they are given, on every system
            options: dict[str, Any] = {} if mode == "wb" else {"encoding": "utf-8", "newline": ""}
            with temporary.open(mode, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, what: str = "a folder") -> Iterator[Path]:
    """Makes a folder to write into, which takes its name when the block ends, and vanishes when the block raises.

    A folder that had the name is replaced as a whole, everything in it included. On Linux the two are exchanged in one
    step. Where the file system cannot do that, the old one is moved aside first; a process that dies between the two
    moves leaves it beside the path as ``.NAME.previous``, and the next call puts it back.

    Args:
        path: Where; missing parents are made.
        what: What is being written, for messages.

    Yields:
        The temporary folder, on the same file system.

    Raises:
        WriteError: If writing fails. Other exceptions pass through.
    """
    target = Path(path).resolve()
    temporary = _sibling(target)
    with _reporting(target, what):
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file of that name is in the way", str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        _restore(target)
        try:
            temporary.mkdir()
            yield temporary
            for folder, _, files in os.walk(temporary):
                for name in files:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _replace_folder(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(target.parent)


def previous(path: Path) -> Path:
    """Where a folder lies that was moved aside by a replacement that never finished."""
    return path.with_name(f".{path.name}.previous")


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


@contextmanager
def _reporting(target: Path, what: str) -> Iterator[None]:
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"could not write {what} to {target}: {reason}; what was there before is untouched"
        raise WriteError(error.errno, message) from error


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_folder(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    if _exchange(temporary, target):
        shutil.rmtree(temporary, ignore_errors=True)
        return
    aside = previous(target)
    target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _restore(target: Path) -> None:
    aside = previous(target)
    if not aside.is_dir():
        return
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.rename(target)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where the system or the file system has no such call."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    # flags is an unsigned int, which ctypes would not guess
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(other))
