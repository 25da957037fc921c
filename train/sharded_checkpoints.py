"""Checkpoints of models that lie on several processes: a folder to which each writes its share, as safetensors.

Tensors that are divided go through torch.distributed.checkpoint, so that any number of processes can read them;
everything else is a checkpoint of :mod:`seqzoo.train.checkpoints` beside them. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from seqzoo.hub.files import WriteError, atomic_folder
from seqzoo.train.checkpoints import CheckpointError, read_checkpoint, write_checkpoint

REST, SHARDS = "rest.safetensors", "shards"
# the key of a dictionary that stands for a divided tensor: its name among the shards
SHARD = "$shard"


def is_sharded(path: Path) -> bool:
    """Whether a path is a checkpoint of several processes."""
    return (path / REST).is_file()


def write_shards(state: Any, path: Path) -> None:
    """Writes what :func:`seqzoo.train.checkpoints.write_checkpoint` writes, and divided tensors, as a folder.

    Every process calls it, with the same tensors; numbers and whole tensors are the first process's. The folder is
    whole or not there, and replaces one of that name once it is complete.

    Raises:
        WriteError: On all processes, if the disk of any is full or refuses; an earlier folder is intact.
        CheckpointError: If the state holds something that cannot be written.
    """
    shards: dict[str, Tensor] = {}
    rest = _apart(state, shards)
    first = dist.get_rank() == 0
    with contextlib.ExitStack() as stack:
        folder = _agreed(
            lambda: stack.enter_context(atomic_folder(path, what="a training checkpoint")) if first else None
        )
        writer = HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
        try:
            save(shards, storage_writer=writer)
        except CheckpointException as error:
            raise _write_error(error, path) from error

        def finish() -> None:
            write_checkpoint(rest, folder / REST)
            stack.close()

        _agreed(finish if first else lambda: None)


def read_shards(path: Path) -> Any:
    """Reads what :func:`write_shards` wrote, in one process, divided tensors as whole ones on the CPU.

    Raises:
        CheckpointError: If the folder is not a whole checkpoint.
    """
    rest = read_checkpoint(path / REST)
    sizes = shard_sizes(path)
    whole = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in sizes.items()}
    _load(path, whole, no_dist=True)
    return _together(rest, whole.__getitem__)


def read_rest(path: Path) -> Any:
    """Reads what is not divided, and checks of the divided tensors that all of each is there.

    Raises:
        CheckpointError: If the folder is not a whole checkpoint.
    """
    rest = read_checkpoint(path / REST)
    sizes = shard_sizes(path)
    _together(rest, lambda name: sizes[name])
    return rest


def load_into(path: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Any:
    """Puts a checkpoint into a module and its optimisers, on any number of processes, each reading its own share.

    Args:
        path: The folder.
        module: Whose parameters are divided now, or are not; the checkpoint's ``"state_dict"`` is its own.
        optimizers: As many as ``"optimizer_states"``, or none, whose states stay unread then.

    Returns:
        What else the checkpoint holds.

    Raises:
        CheckpointError: If the folder is no whole checkpoint, or one of another model.
    """
    state = read_rest(path)
    own = module.state_dict()
    names = {key: value[SHARD] for key, value in state["state_dict"].items() if _is_shard(value)}
    if state["state_dict"].keys() != own.keys():
        differing = sorted(state["state_dict"].keys() ^ own.keys())
        raise CheckpointError(f"{path} is of another model: {', '.join(differing[:3])} is in one of them alone")
    targets = {name: torch.empty_like(own[key]) for key, name in names.items()}
    saved_optimizers = state.pop("optimizer_states") if optimizers else []
    for saved, optimizer in zip(saved_optimizers, optimizers, strict=True):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, values in saved["state"].items():
            targets |= {
                value[SHARD]: torch.empty_like(parameters[index]) for value in values.values() if _is_shard(value)
            }
    sizes = shard_sizes(path)
    for name, target in targets.items():
        if sizes[name][0] != target.shape:
            raise CheckpointError(
                f"{path} is of another model: a tensor has shape {sizes[name][0]}, not {target.shape}"
            )
    _load(path, targets, no_dist=not dist.is_initialized())
    module.load_state_dict(_together(state.pop("state_dict"), targets.__getitem__))
    for saved, optimizer in zip(saved_optimizers, optimizers, strict=True):
        optimizer.load_state_dict(_together(saved, targets.__getitem__))
    return state


def whole_tensors(state: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors put together again, on the CPU, one after the other; all processes call it.

    Args:
        state: Divided tensors, and whole ones.
        keep: Whether this process wants them; the others get nothing.
    """
    found = {}
    for name, tensor in state.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = whole.cpu()
    return found


def shard_sizes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every divided tensor.

    Raises:
        CheckpointError: If a part of one is missing, or a file is damaged.
    """
    folder = path / SHARDS
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    except (OSError, SafetensorError, LookupError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is incomplete or damaged: {error}; expected whole safetensors files"
        ) from error
    found = {}
    for name, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise CheckpointError(f"{folder} holds something that is no tensor: {name}")
        held = sum(chunk.sizes.numel() for chunk in tensor.chunks)
        if held != tensor.size.numel():
            raise CheckpointError(
                f"{folder} has {held} of the {tensor.size.numel()} numbers of a tensor; a file is missing"
            )
        found[name] = tensor.size, tensor.properties.dtype
    return found


def _load(path: Path, targets: dict[str, Tensor], no_dist: bool) -> None:
    reader = HuggingFaceStorageReader(str(path / SHARDS))
    try:
        with warnings.catch_warnings():
            # that one process reads alone is meant
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
            load(targets, storage_reader=reader, no_dist=no_dist)
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _apart(value: Any, shards: dict[str, Tensor]) -> Any:
    """A state with names in place of divided tensors, which are collected."""
    if isinstance(value, DTensor):
        name = str(len(shards))
        shards[name] = value.detach()
        return {SHARD: name}
    if isinstance(value, dict):
        return {key: _apart(one, shards) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_apart(one, shards) for one in value)
    return value


def _is_shard(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {SHARD}


def _together(value: Any, tensor_of: Callable[[str], Any]) -> Any:
    """A state with divided tensors in place of their names."""
    if _is_shard(value):
        try:
            return tensor_of(value[SHARD])
        except KeyError as error:
            raise CheckpointError(f"a divided tensor of the checkpoint, {error}, is missing") from error
    if isinstance(value, dict):
        return {key: _together(one, tensor_of) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_together(one, tensor_of) for one in value)
    return value


def _agreed(run: Callable[[], Any]) -> Any:
    """What the first process returns, on all of them, or what it raises."""
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = run()
        except (OSError, CheckpointError) as error:
            found[1] = (type(error), error.args)
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        kind, arguments = found[1]
        raise kind(*arguments)
    return found[0]


def _write_error(error: CheckpointException, path: Path) -> Exception:
    reasons = [failure for failure, _ in error.failures.values()]
    number = next((reason.errno for reason in reasons if isinstance(reason, OSError)), errno.EIO)
    words = "; ".join(f"{type(reason).__name__}: {reason}" for reason in reasons)
    return WriteError(
        number, f"could not write a training checkpoint to {path}: {words}; what was there before is untouched"
    )
