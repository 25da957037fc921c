"""What a run was trained on, from the configuration in its folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import yaml

from seqzoo.train.run_folder import RunFolderError


def data_options(run: Path) -> dict[str, Any]:
    """The section ``data`` of a run's configuration, ``class_path`` and ``init_args``; empty where there is none.

    Raises:
        RunFolderError: If the configuration is damaged.
    """
    path = run / "config.yaml"
    if not path.is_file():
        return {}
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}; expected the YAML that seqzoo train wrote") from error
    found = options.get("data") if isinstance(options, dict) else None
    if not isinstance(found, dict):
        raise RunFolderError(f"{path} is damaged: it has no section data, with class_path and init_args")
    return found


def data_of(run: Path, kind: type[lightning.LightningDataModule], otherwise: str) -> Any:
    """The data module of a run, read.

    Args:
        run: The folder.
        kind: What it must be.
        otherwise: What the caller can do where it is something else.

    Raises:
        ValueError: If the run tells of no data, of other data, or of options that this version does not take.
        OSError: If the data are no longer there.
    """
    described = data_options(run)
    if not described:
        raise ValueError(f"{run} has no config.yaml that tells of its data; {otherwise}")
    found = _class_of(described)
    if not isinstance(found, type) or not issubclass(found, kind):
        raise ValueError(f"{run} was trained on {described.get('class_path')!r}, not on {kind.__name__}; {otherwise}")
    try:
        data = found(**(described.get("init_args") or {}))
    except TypeError as error:
        raise ValueError(
            f"{run / 'config.yaml'} is of another version: {found.__name__} does not take its options ({error}); "
            f"{otherwise}"
        ) from error
    data.setup("test")
    return data


def is_trained_on(run: Path, kind: type[lightning.LightningDataModule]) -> bool:
    """Whether the configuration of a run names such data."""
    found = _class_of(data_options(run))
    return isinstance(found, type) and issubclass(found, kind)


def trained_length(run: Path) -> int | None:
    """Tokens of a training window, where the run's configuration tells."""
    length = (data_options(run).get("init_args") or {}).get("context")
    return length if isinstance(length, int) else None


def _class_of(described: dict[str, Any]) -> Any:
    """The class that a configuration names; None where it is not the package's own, for what is named is run."""
    module, _, name = str(described.get("class_path", "")).rpartition(".")
    if not module.startswith("seqzoo."):
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
