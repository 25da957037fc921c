"""Generated data on the disk: shards of arrays with checksums, made where they are missing or damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from seqzoo.folders import cache_root
from seqzoo.hub.files import WriteError, atomic_file

FORMAT = 1
MANIFEST = "manifest.json"
Arrays = Mapping[str, NDArray[Any]]


def data_folder() -> Path:
    """Where generated data lie unless told otherwise: ``data`` in :func:`seqzoo.folders.cache_root`."""
    return cache_root() / "data"


class Shards:
    """A folder of numbered shards, each a few arrays, and a manifest with their checksums.

    A shard is a pure function of what the manifest describes and its number, so that any can be made again. Every file
    is whole or not there, and a process that dies leaves the shards that it has finished.

    Args:
        folder: Where; other data must not lie there.
        of: What the shards hold, as plain data.
        count: How many shards there are.
        make: Makes the arrays of a shard.
        verify: Whether the checksums of what is there are compared; else its presence suffices.

    Raises:
        ValueError: If the folder holds other shards.
    """

    def __init__(
        self, folder: Path, of: Mapping[str, Any], count: int, make: Callable[[int], Arrays], *, verify: bool = True
    ) -> None:
        self.folder = folder
        self.of = json.loads(json.dumps(of))
        self.count = count
        self._make = make
        self._verify = verify
        self._entries: dict[str, dict[str, str]] = {}

    @classmethod
    def named(
        cls, parent: Path, task: str, of: Mapping[str, Any], count: int, make: Callable[[int], Arrays], *, verify: bool
    ) -> Shards:
        """Shards in the folder of what is described, of which no other data have one."""
        return cls(parent / folder_name(task, of), of, count, make, verify=verify)

    def complete(self) -> None:
        """Makes what is missing; what is damaged is made anew, with a warning. A second process waits for the first.

        Whole shards may lie where nothing can be written.

        Raises:
            WriteError: If something is missing and cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(error.errno, f"could not make the folder {self.folder}: {error.strerror}") from error
        with self._lock():
            self._entries = self._read()
            states = {number: self._state(number) for number in range(self.count)}
            wanted = [number for number, state in states.items() if state != "whole"]
            for number in wanted:
                if states[number]:
                    warnings.warn(f"{self.folder}, shard {number}: {states[number]}; it is made again", stacklevel=2)
            words, console = f"making {self.folder.name}", Console(stderr=True)
            for number in track(wanted, words, console=console, transient=True, disable=not console.is_terminal):
                self._write(number)

    def load(self, number: int) -> dict[str, NDArray[Any]]:
        """The arrays of a shard, read from the disk as they are used."""
        return {
            name: np.load(self._path(name, number), mmap_mode="r", allow_pickle=False)
            for name in sorted(self._entries[str(number)])
        }

    def digest(self, first: int, last: int) -> str:
        """A fingerprint of the shards from ``first`` to below ``last``, as 32 hexadecimal digits."""
        text = json.dumps([self._entries[str(number)] for number in range(first, last)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _read(self) -> dict[str, dict[str, str]]:
        path = self.folder / MANIFEST
        if not path.is_file():
            return {}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found, entries = (manifest["format"], manifest["of"]), manifest["shards"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error!r}; delete {self.folder}, it will be made again") from error
        if found != (FORMAT, self.of):
            raise ValueError(f"{path} is of other data, {found[1]}, not {self.of}; choose another folder or delete it")
        return entries

    def _state(self, number: int) -> str:
        """``"whole"``, the empty string where there is no shard, or what is wrong with it."""
        entry = self._entries.get(str(number))
        if entry is None:
            return ""
        for name, expected in entry.items():
            path = self._path(name, number)
            if not path.is_file():
                return f"{path.name} is missing"
            if not self._verify:
                continue
            with path.open("rb") as file:
                found = file_digest(file)
            if found != expected:
                return f"{path.name} has another checksum than {MANIFEST} says"
        return "whole"

    def _write(self, number: int) -> None:
        entry = {}
        for name, values in self._make(number).items():
            path = self._path(name, number)
            with atomic_file(path, "wb", what="generated data") as file:
                np.save(file, values, allow_pickle=False)
            with path.open("rb") as file:
                entry[name] = file_digest(file)
        self._entries[str(number)] = entry
        manifest = {"format": FORMAT, "of": self.of, "shards": self._entries}
        with atomic_file(self.folder / MANIFEST, what="the manifest of generated data") as file:
            file.write(json.dumps(manifest, indent=1) + "\n")

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}-{number:05}.npy"

    @contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        try:
            opened = (self.folder / ".lock").open("w")
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                raise
            # where nothing can be written there is nothing to wait for
            opened = None
        with opened or nullcontext() as file:
            if file is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def folder_name(task: str, of: Mapping[str, Any]) -> str:
    """The folder of what is described: different data never share one."""
    text = json.dumps(of, sort_keys=True)
    return f"{task}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


def file_digest(file: IO[bytes]) -> str:
    """A fingerprint of what a file still holds, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()
