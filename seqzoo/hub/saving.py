"""Saving and loading of models: a folder of ``config.json`` and ``model.safetensors``. Nothing is ever unpickled."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqzoo.hub.files import atomic_folder, previous
from seqzoo.kernels.checks import REAL
from seqzoo.mixer import SequenceMixer
from seqzoo.models.registry import model_class, model_name
from seqzoo.models.tokenizer import FILE as TOKENIZER
from seqzoo.models.tokenizer import Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FILES = (CONFIG, WEIGHTS)
HUB_PREFIX = "hf://"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def save_pretrained(model: nn.Module, path: str | os.PathLike[str], *, tokenizer: Tokenizer | None = None) -> None:
    """Saves a model as a folder, which appears whole or not at all; a checkpoint of that name is replaced.

    Tensors that share memory (tied weights) are stored once. Every tensor keeps its dtype.

    Args:
        model: A model of a registered kind, as ``LanguageModel``.
        path: The folder.
        tokenizer: What is saved beside the model, and replaces an earlier one; bytes leave no file.

    Raises:
        FileExistsError: If the folder holds anything but a checkpoint, which replacing it would delete.
        OSError: If writing fails, the disk being full for instance; what was there before is untouched.
        TypeError: If the model is of no registered kind.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    name = model_name(model)
    config: Any = model.config
    write_checkpoint(model, {"model": name, **config.to_dict()}, path, tokenizer=tokenizer)


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
    check_dtype(dtype)
    folder = locate(path_or_hub_id)
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; a checkpoint is a folder of {' and '.join(FILES)}")
    weights = folder / WEIGHTS
    model = assemble(lambda: _build(folder / CONFIG), lambda: read_tensors(weights), weights)
    # which widens fp32_parameters also where there is nothing else to do
    return model.to(device=device, dtype=dtype).eval()


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises TypeError unless parameters can have the dtype."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")


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
        # transformers wants to be told whose tensors they are
        save_file(tensors, path, metadata={"format": "pt"})
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


def write_checkpoint(
    model: nn.Module,
    config: Mapping[str, Any],
    path: str | os.PathLike[str],
    rename: Callable[[str], str] = str,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a model's tensors, under names of its own or others, beside a description, as one folder or not at all.

    Args:
        model: The model.
        config: What becomes ``config.json``.
        path: The folder.
        rename: The name of a tensor in the file, of that in the model.
        tokenizer: What is saved beside them; one that is there already is replaced only by another.

    Raises:
        FileExistsError: If the folder holds anything but a checkpoint, which replacing it would delete.
        OSError: If writing fails.
    """
    folder = Path(path).expanduser()
    own = FILES if tokenizer is None else (*FILES, TOKENIZER)
    if folder.is_dir():
        others = sorted(entry.name for entry in folder.iterdir() if entry.name not in own)
        if others:
            raise FileExistsError(
                f"saving replaces the whole folder {folder}, and it holds {', '.join(others[:3])}; choose another"
            )
    text = json.dumps(config, indent=2) + "\n"
    tensors = {rename(names[0]): tensor.detach().contiguous() for names, tensor in _tensors(model)}
    with atomic_folder(folder, what=f"the checkpoint of a {type(model).__name__}") as temporary:
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        write_tensors(tensors, temporary / WEIGHTS)
        if tokenizer is not None:
            tokenizer.save(temporary)
        # safetensors gives its files to the owner alone
        shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)


def assemble(
    build: Callable[[], Any],
    read: Callable[[], Mapping[str, Tensor]],
    source: Path,
    rename: Callable[[str], str] = str,
) -> Any:
    """Builds a model of stored tensors, all in the dtypes that they have there.

    Args:
        build: Builds the model; called on the meta device.
        read: Reads the tensors by their names in the file, which are copied.
        source: The file, for messages.
        rename: The name of a tensor in the file, of that in the model.
        tokenizer: What is saved beside them; one that is there already is replaced only by another.

    Raises:
        ValueError: If tensors are missing, unexpected or misshapen; the message has all of them.
    """
    # the caller's random numbers must not move
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            model = build()
        if any(name not in model.state_dict() for name, _ in model.named_buffers()):
            # buffers that no file holds come from the initialisation, which else would only cost time and memory
            model.to_empty(device="cpu")
            model.reset_parameters()
    _fill(model, read(), source, rename)
    return model


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        TypeError: If the text is another JSON value.
        ValueError: If it is no JSON.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise TypeError(f"a model's description is a JSON object, got {type(values).__name__}")
    return values


def _tensors(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Every parameter and saved buffer of the model with all its names; tied ones have several."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(groups.values())


def _build(path: Path) -> Any:
    try:
        values = read_json(path)
        if "model" not in values and "model_type" in values:
            raise ValueError("it is one of transformers; seqzoo.hub.load_pretrained reads those")
        kind = model_class(values.pop("model", None))
        return kind(kind.config_class.from_dict(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a model: {error}") from error


def _fill(model: nn.Module, stored: Mapping[str, Tensor], source: Path, rename: Callable[[str], str]) -> None:
    groups = [([rename(name) for name in names], names, target) for names, target in _tensors(model)]
    missing, misshapen, unexpected = [], [], set(stored)
    for others, _, target in groups:
        unexpected -= set(others)
        found = next((name for name in others if name in stored), None)
        if found is None:
            missing.append(others[0])
            continue
        tensor = stored[found]
        if tensor.shape != target.shape:
            misshapen.append(f"{found} is {tuple(tensor.shape)}, must be {tuple(target.shape)}")
        if (tensor.dtype in REAL) != target.is_floating_point():
            misshapen.append(f"{found} is {tensor.dtype}, must be like {target.dtype}")
    lists = {"missing": missing, "unexpected": sorted(unexpected), "misshapen": misshapen}
    if any(lists.values()):
        lines = [f"  {word} ({len(names)}): {', '.join(names)}" for word, names in lists.items() if names]
        raise ValueError("\n".join([f"{source} holds other tensors than {CONFIG} beside it describes:", *lines]))
    for others, names, target in groups:
        tensor = stored[next(name for name in others if name in stored)]
        # a copy, because the stored tensors are views of the file
        tensor = tensor.clone()
        if isinstance(target, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=target.requires_grad)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, tensor)


def fp32_parameters(model: nn.Module) -> set[int]:
    """The identities of the parameters that stay float32 when the model becomes narrower."""
    mixers = [module for module in model.modules() if isinstance(module, SequenceMixer)]
    return {id(parameter) for mixer in mixers for parameter in mixer.wide_parameters().values()}


def locate(path_or_hub_id: str | os.PathLike[str], files: Sequence[str] = FILES) -> Path:
    """The folder that is meant, with ``files`` downloaded (names, or patterns) where it is one of the Hub.

    Raises:
        FileNotFoundError: If there is none.
        ImportError: If the Hub is meant and huggingface_hub is not installed.
    """
    text = os.fspath(path_or_hub_id)
    if isinstance(path_or_hub_id, str) and text.startswith(HUB_PREFIX):
        return _download(text.removeprefix(HUB_PREFIX), files)
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
    return _download(text, files)


def _download(hub_id: str, files: Sequence[str]) -> Path:
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
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{hub_id} is no local folder, and the Hub did not give it: {error}") from error
