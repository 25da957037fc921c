"""Saving and loading of models: a folder of ``config.json`` and ``model.safetensors``. Nothing is ever unpickled."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqzoo.hub.files import atomic_folder, previous
from seqzoo.kernels.checks import HALF
from seqzoo.mixer import SequenceMixer
from seqzoo.models.registry import model_class, model_name

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FILES = (CONFIG, WEIGHTS)
HUB_PREFIX = "hf://"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def save_pretrained(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Saves a model as a folder, which appears whole or not at all; a checkpoint of that name is replaced.

    Tensors that share memory (tied weights) are stored once. Every tensor keeps its dtype.

    Args:
        model: A model of a registered kind, as ``LanguageModel``.
        path: The folder.

    Raises:
        FileExistsError: If the folder holds anything but a checkpoint, which replacing it would delete.
        OSError: If writing fails, the disk being full for instance; what was there before is untouched.
        TypeError: If the model is of no registered kind.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    name = model_name(model)
    folder = Path(path).expanduser()
    if folder.is_dir():
        others = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES)
        if others:
            raise FileExistsError(
                f"saving replaces the whole folder {folder}, and it holds {', '.join(others[:3])}; choose another"
            )
    config: Any = model.config
    text = json.dumps({"model": name, **config.to_dict()}, indent=2) + "\n"
    tensors = {names[0]: tensor.detach().contiguous() for names, tensor in _tensors(model)}
    with atomic_folder(folder, what=f"the checkpoint of a {type(model).__name__}") as temporary:
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        write_tensors(tensors, temporary / WEIGHTS)
        # safetensors gives its files to the owner alone
        shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)


def from_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Loads a model that :func:`save_pretrained` saved, from a folder or from the Hugging Face Hub.

    A folder that exists is taken first. ``"owner/name"`` means the Hub where there is no local folder ``owner``;
    ``"hf://owner/name"`` always does.

    Args:
        path_or_hub_id: The folder, or the repository.
        device: Where the model goes; the CPU when omitted.
        dtype: What the floating-point parameters become, ``fp32_parameters`` excepted; as saved when omitted.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If the folder or one of its files does not exist.
        ValueError: If a file is damaged, or does not fit this version or the model that it describes.
        ImportError: If the Hub is meant and huggingface_hub is not installed.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    folder = _locate(path_or_hub_id)
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; a checkpoint is a folder of {' and '.join(FILES)}")
    # non-persistent buffers come from reset_parameters; the caller's random numbers must not move
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            model = _build(folder / CONFIG)
        model.to_empty(device="cpu")
        model.reset_parameters()
    _fill(model, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return model.to(device=device, dtype=dtype).eval()


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint's folder in ``path``: itself, or ``model`` inside the folder of a training run.

    Raises:
        FileNotFoundError: If there is none, or it lacks a file.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    candidates = [one for one in (folder, folder / "model") if any((one / name).is_file() for name in FILES)]
    if not candidates:
        raise FileNotFoundError(f"neither {path} nor its folder model holds a checkpoint, {' and '.join(FILES)}")
    missing = [name for name in FILES if not (candidates[0] / name).is_file()]
    if missing:
        raise FileNotFoundError(f"the checkpoint {candidates[0]} lacks {missing[0]}")
    return candidates[0]


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file; a failure is an OSError, as everywhere else."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(errno.EIO, str(error), str(path)) from error
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        ValueError: If it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def _tensors(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Every parameter and saved buffer of the model with all its names; tied ones have several."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(groups.values())


def _build(path: Path) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"a model's description is a JSON object, got {type(values).__name__}")
        kind = model_class(values.pop("model", None))
        return kind(kind.config_class.from_dict(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a model: {error}") from error


def _fill(model: nn.Module, stored: dict[str, Tensor], path: Path) -> None:
    """Puts stored tensors, in the dtype that they have there, into the model."""
    groups = _tensors(model)
    known = {name for names, _ in groups for name in names}
    missing = [names[0] for names, _ in groups if not any(name in stored for name in names)]
    unexpected = sorted(set(stored) - known)
    for words, names in (("lacks", missing), ("holds the unknown", unexpected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path} {words} {', '.join(names[:3])}{more}; {CONFIG} beside it describes another model")
    for names, target in groups:
        name = next(name for name in names if name in stored)
        tensor = stored[name]
        if tensor.shape != target.shape or tensor.is_floating_point() != target.is_floating_point():
            raise ValueError(
                f"{name} in {path} must have shape {tuple(target.shape)} and a dtype like {target.dtype}, got "
                f"{tuple(tensor.shape)} of {tensor.dtype}"
            )
    wide = _fp32_parameters(model)
    for names, target in groups:
        tensor = stored[next(name for name in names if name in stored)]
        if id(target) in wide and tensor.dtype in HALF:
            tensor = tensor.float()
        # a copy, because the stored tensors are views of the file
        target.data = tensor.clone()


def _fp32_parameters(model: nn.Module) -> set[int]:
    mixers = [module for module in model.modules() if isinstance(module, SequenceMixer)]
    return {id(mixer.get_parameter(name)) for mixer in mixers for name in mixer.fp32_parameters}


def _locate(path_or_hub_id: str | os.PathLike[str]) -> Path:
    text = os.fspath(path_or_hub_id)
    if isinstance(path_or_hub_id, str) and text.startswith(HUB_PREFIX):
        return _download(text.removeprefix(HUB_PREFIX))
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{text} is a file; a checkpoint is a folder of {' and '.join(FILES)}")
    if previous(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {text}; an interrupted save left the last as {previous(folder)}")
    if not isinstance(path_or_hub_id, str) or not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(f"there is no folder {text}, and it is no owner/name of the Hub")
    if folder.parent.exists():
        raise FileNotFoundError(
            f"there is no folder {text}, though {folder.parent} exists; to load from the Hub write {HUB_PREFIX}{text}"
        )
    return _download(text)


def _download(hub_id: str) -> Path:
    if not _HUB_ID.fullmatch(hub_id):
        raise ValueError(f"a repository of the Hub is written owner/name, got {hub_id!r}")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"{hub_id} is no local folder, and loading from the Hub needs huggingface_hub: pip install 'seqzoo[hub]'"
        ) from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{hub_id} is no local folder, and the Hub did not give it: {error}") from error
