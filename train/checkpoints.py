"""Checkpoints as one safetensors file: tensors as they are, everything else as JSON in its header.

Nothing is pickled, so loading a file runs no code that came with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from seqzoo.hub.files import atomic_file

FORMAT = "seqzoo-checkpoint-1"
# what training goes on from
PARTS = ("global_step", "state_dict", "optimizer_states", "loops", "callbacks")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or holds what cannot be written."""


def write_checkpoint(state: Any, path: Path) -> None:
    """Writes nested dictionaries, lists, tuples, numbers, strings and tensors; the file is whole or not there.

    A file of that name is replaced once the new one is complete.

    Raises:
        WriteError: If the disk is full or refuses; an earlier file is intact.
        CheckpointError: If the state holds something else.
    """
    packer = _Packer()
    structure = packer.pack(state)
    metadata = {"format": FORMAT, "state": json.dumps(structure)}
    with atomic_file(path, "wb", what="a training checkpoint") as file:
        file.write(save(packer.tensors, metadata))


def read_checkpoint(path: Path) -> Any:
    """Reads what :func:`write_checkpoint` wrote, tensors on the CPU.

    Raises:
        CheckpointError: If the file is missing, truncated, or something else.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dictionary
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is no training checkpoint: format {metadata.get('format')!r}, not {FORMAT!r}"
            )
        return _unpack(json.loads(metadata["state"]), tensors)
    except (OSError, SafetensorError, ValueError, LookupError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or damaged: {error}; expected a whole safetensors file"
        ) from error


def check_fits(path: Path, state: Any, expected: Mapping[str, Tensor]) -> None:
    """Checks that training can go on from a checkpoint.

    Args:
        path: Of the file, for the message.
        state: What :func:`read_checkpoint` read.
        expected: The tensors of the module that is to be trained.

    Raises:
        CheckpointError: If a part is missing, or tensors have other names or shapes; names the first.
    """
    missing = [name for name in PARTS if not isinstance(state, Mapping) or name not in state]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: another version of SeqZoo wrote it; resume with that version"
        )
    other = difference(expected, state["state_dict"])
    if other is not None:
        name, ours, theirs = other
        raise CheckpointError(
            f"{path} does not fit the model of config.yaml: the shape of {name} is {theirs} in the checkpoint and "
            f"{ours} in the model; restore config.yaml, or begin a new run"
        )


def difference(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> tuple[str, tuple[int, ...] | None, tuple[int, ...] | None] | None:
    """The first name under which two state dictionaries differ, with both shapes, None where there is no tensor."""
    ours, theirs = ({name: tuple(tensor.shape) for name, tensor in one.items()} for one in (expected, found))
    return next(
        ((name, ours.get(name), theirs.get(name)) for name in [*ours, *theirs] if ours.get(name) != theirs.get(name)),
        None,
    )


class SafetensorsIO(CheckpointIO):
    """Makes Lightning write and read its checkpoints in this format."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint to the CPU; Lightning moves what it restores."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint."""
        Path(path).unlink(missing_ok=True)


class _Packer:
    """Replaces tensors by their names; tensors that share memory share a name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def pack(self, value: Any) -> Any:
        """The structure of a value, fit for JSON."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            return {"$tensor": self._name(value)}
        if isinstance(value, list):
            return [self.pack(item) for item in value]
        if isinstance(value, tuple):
            return {"$tuple": [self.pack(item) for item in value]}
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: self.pack(item) for key, item in value.items()}
            return {"$items": [[self.pack(key), self.pack(item)] for key, item in value.items()]}
        raise CheckpointError(
            f"a checkpoint holds tensors, numbers, strings, lists and dictionaries, got {type(value)}"
        )

    def _name(self, tensor: Tensor) -> str:
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in self._names:
            name = str(len(self.tensors))
            whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
            # a file holds whole storages, so a view becomes one
            self.tensors[name] = tensor.detach().contiguous() if whole else tensor.detach().clone().contiguous()
            self._names[place] = name
        return self._names[place]


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["$tuple"])
    if "$items" in value:
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in value["$items"]}
    return {key: _unpack(item, tensors) for key, item in value.items()}


def finite(tensors: dict[str, Tensor]) -> bool:
    """Whether all numbers of a state dictionary are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
