"""The folder of a run: what lies where, how it is made, and that one process at a time trains in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seqzoo.hub.files import WriteError, atomic_file
from seqzoo.version import __version__

# of what lies in the folder; the record of an earlier one, that of the version 0.1.0, may lack it
FORMAT = 1


class RunFolderError(RuntimeError):
    """A folder is not what a run leaves, or cannot be used now."""


def reason(error: Exception) -> str:
    """What an error says, without the number that an operating system's error leads with."""
    return error.strerror or str(error) if isinstance(error, WriteError) else str(error)


class RunFolder:
    """Paths inside the folder of a run.

    Args:
        path: The folder.
        sharded: Whether several processes train in it, so that its checkpoints are folders.
    """

    def __init__(self, path: Path, sharded: bool = False) -> None:
        self.path = path
        self.sharded = sharded
        self.configuration = path / "config.yaml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.csv"
        self.curves = path / "curves.png"
        self.checkpoints = path / "checkpoints"
        suffix = "" if sharded else ".safetensors"
        self.last = self.checkpoints / f"last{suffix}"
        self.best = self.checkpoints / f"best{suffix}"
        self.model = path / "model"
        self.average = path / "model-average"
        self.groups = path / "parameter_groups.json"
        self.refined_from = path / "refined_from"
        self.report = path / "report.json"
        self.sample = path / "sample.txt"

    @classmethod
    def create(cls, parent: Path, name: str, sharded: bool = False) -> RunFolder:
        """Makes a new folder ``<name>-<date-time>`` that no other process has.

        Raises:
            RunFolderError: If it cannot be made.
        """
        stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for number in range(1, 1000):
                path = parent / (stem if number == 1 else f"{stem}-{number}")
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
                    run = cls(path, sharded)
                    run.checkpoints.mkdir()
                    return run
        except OSError as error:
            raise RunFolderError(f"the folder of the run, {parent / stem}, cannot be made: {error}") from error
        raise RunFolderError(f"{parent} already has 999 runs named {stem}")

    @classmethod
    def open(cls, path: Path, sharded: bool = False) -> RunFolder:
        """The folder of an earlier run.

        Raises:
            RunFolderError: If it is none.
        """
        if not path.is_dir():
            raise RunFolderError(f"there is no run folder {path}")
        run = cls(path, sharded)
        if not run.configuration.is_file():
            raise RunFolderError(f"{path} is not the folder of a run: it has no {run.configuration.name}")
        run.checkpoints.mkdir(exist_ok=True)
        return run

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process, until it ends in whatever way.

        Raises:
            RunFolderError: If another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunFolderError(f"another process is training in {self.path}") from None
            yield

    def write_text(self, path: Path, text: str) -> None:
        """Writes a file of the run, whole or not at all."""
        with atomic_file(path, what=path.name) as file:
            file.write(text)

    def write_json(self, path: Path, values: Any) -> None:
        """Writes plain data as JSON, whole or not at all."""
        self.write_text(path, json.dumps(values, indent=2) + "\n")

    def read_json(self, path: Path) -> Any:
        """Plain data from a JSON file of the run; None where it does not exist.

        Raises:
            RunFolderError: If it is not JSON.
        """
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunFolderError(f"{path} is damaged: {error}") from error

    def check_version(self) -> None:
        """Raises RunFolderError unless this version can go on with the run."""
        record = self.read_json(self.environment) or {}
        found = record.get("format", FORMAT)
        if found != FORMAT:
            raise RunFolderError(
                f"{self.path} was made by seqzoo {record.get('seqzoo')} and has format {found}; seqzoo {__version__} "
                f"goes on with format {FORMAT} alone: pip install seqzoo=={record.get('seqzoo')}, or start a new run"
            )

    def check_space(self, needed: int) -> None:
        """Raises RunFolderError unless the disk has ``needed`` free bytes."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise RunFolderError(
                f"the disk of {self.path} has {free / 1e6:.1f} MB free; checkpoints and model will need about "
                f"{needed / 1e6:.1f} MB"
            )

    def sweep(self) -> None:
        """Removes what a killed process was writing."""
        for leftover in [*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")]:
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes the folder of a run that never began."""
        shutil.rmtree(self.path, ignore_errors=True)

    def resume_command(self) -> str:
        """What to type to go on."""
        words = "torchrun ... -m seqzoo.cli" if self.sharded else "seqzoo"
        return f"{words} train --resume {os.fspath(self.path)}"
