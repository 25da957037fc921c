"""Finding the files of a folder and splitting them, the same on every machine and at every call."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from seqzoo.mixer import nearest
from seqzoo.train.baselines import Bytes


def resolve_folder(folder: str) -> Path:
    """The folder that a configuration means.

    Args:
        folder: A path; ``~`` is the home folder, and a name in braces a path of the running Python
            (``sysconfig.get_paths()``): ``"{stdlib}"`` is the source of its standard library.

    Raises:
        ValueError: If it does not exist, is not a folder, or the name in braces is unknown.
    """
    known = sysconfig.get_paths()
    try:
        path = Path(folder.format_map(known)).expanduser()
    except KeyError as error:
        raise ValueError(f"folder {folder!r}: {nearest(str(error.args[0]), known)}") from None
    except (ValueError, IndexError, AttributeError):
        raise ValueError(f"folder {folder!r}: braces hold one of {', '.join(sorted(known))}") from None
    if not path.exists():
        raise ValueError(f"the data folder {str(path)!r} does not exist")
    if not path.is_dir():
        raise ValueError(f"the data folder {str(path)!r} is a file; expected a folder of files")
    return path


def find_files(folder: Path, patterns: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The files below ``folder`` whose name or relative path matches a pattern, as sorted relative POSIX paths.

    Args:
        folder: Where to look.
        patterns: Shell patterns such as ``*.py``.
        exclude: Shell patterns of the names of files and folders that are left out.

    Raises:
        ValueError: If there is none.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _matches(name, exclude)]
        relative = Path(parent).relative_to(folder)
        for name in names:
            path = (relative / name).as_posix()
            if not _matches(name, exclude) and (_matches(name, patterns) or _matches(path, patterns)):
                found.append(path)
    if not found:
        raise ValueError(f"the data folder {str(folder)!r} has no file that matches {', '.join(patterns)}")
    return sorted(found)


def split_files(files: Sequence[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Splits files into those for training and those for validation, by a hash of each path.

    A file's side depends on its relative path and the fraction alone: other files that come or go do not move it, and
    raising the fraction only moves files to validation.
    """
    training, validation = [], []
    for path in files:
        digest = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        share = int.from_bytes(digest, "big") / 2**64
        (validation if share < validation_fraction else training).append(path)
    return training, validation


def read_bytes(folder: Path, files: Sequence[str]) -> Bytes:
    """The bytes of the files behind one another, with nothing in between."""
    return joined(read_parts(folder, files))


def read_parts(folder: Path, files: Sequence[str]) -> list[Bytes]:
    """The bytes of each of the files."""
    return [np.fromfile(folder / path, dtype=np.uint8) for path in files]


def joined(parts: Sequence[Bytes]) -> Bytes:
    """Bytes behind one another."""
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)


def digest(data: Bytes) -> str:
    """A fingerprint of bytes, as 32 hexadecimal digits."""
    return hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
