"""Published weights: checkpoints of transformers read into a ``LanguageModel``, and written. Nothing is unpickled."""

from __future__ import annotations

import os
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from seqzoo.hub.conversion import Family, Obstacle, find_family, publish
from seqzoo.hub.saving import (
    CONFIG,
    WEIGHTS,
    assemble,
    check_dtype,
    fp32_parameters,
    locate,
    read_json,
    read_tensors,
    write_checkpoint,
)
from seqzoo.models.language_model import LanguageModel

INDEX = "model.safetensors.index.json"
PATTERNS = (CONFIG, WEIGHTS, INDEX, "model-*.safetensors")


def load_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Loads published weights in the format of transformers: Mamba, FalconMamba and Mamba-2.

    Reads ``config.json`` and ``model.safetensors``, or the parts that ``model.safetensors.index.json`` lists. Tokenizer
    and generation settings are not read.

    Args:
        path_or_id: A folder that exists, ``"owner/name"`` of the Hugging Face Hub where there is no local folder
            ``owner``, or ``"hf://owner/name"``.
        device: Where the model goes; the CPU when omitted.
        dtype: What the floating-point parameters become, ``fp32_parameters`` excepted; as stored when omitted, the
            widest where several are.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If the folder or a file does not exist, or the weights are pickled.
        ValueError: If a file is damaged, config.json describes what has no equal here, or tensors are missing,
            unexpected or misshapen.
        ImportError: If the Hub is meant and huggingface_hub is not installed.
    """
    check_dtype(dtype)
    folder = locate(path_or_id, PATTERNS)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}")
    try:
        values = read_json(folder / CONFIG)
        family = find_family(values)
        config = family.read(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a model that seqzoo reads: {error}") from error
    files = _weight_files(folder)
    model = assemble(
        lambda: LanguageModel(config),
        lambda: _read(files, family, config.tie_embeddings),
        files[0] if len(files) == 1 else folder / INDEX,
        family.rename,
    )
    if dtype is None:
        kept = fp32_parameters(model)
        dtype = reduce(torch.promote_types, {one.dtype for one in model.parameters() if id(one) not in kept})
    return model.to(device=device, dtype=dtype).eval()


def export_pretrained(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a language model as a folder that transformers loads, which appears whole or not at all.

    Weights and ``config.json`` alone: a tokenizer, the numbers of special tokens and generation settings are to be
    added. Every tensor keeps its dtype; transformers brings all to that of the embedding, ``fp32_parameters`` included.

    Args:
        model: A ``LanguageModel`` of Mamba or Mamba-2 mixers alone, all with the same options, without MLPs, with RMS
            norms before the mixers and without learned positions.
        path: The folder; a checkpoint of that name is replaced.

    Raises:
        TypeError: If the model is no ``LanguageModel``.
        ValueError: If the format cannot hold the model; the message has all that is in the way.
        FileExistsError: If the folder holds anything but a checkpoint, which replacing it would delete.
        OSError: If writing fails; what was there before is untouched.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if type(model) is not LanguageModel:
        raise TypeError(f"only a LanguageModel can be exported, this is a {type(model).__name__}")
    try:
        family, values = publish(model.config)
    except Obstacle as obstacle:
        raise ValueError(str(obstacle)) from None
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    # null, because transformers would take token 0 for the end of a text
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    write_checkpoint(model, {**values, "dtype": dtype, **tokens}, path, family.rename)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        pickles = sorted(one.name for one in folder.iterdir() if one.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f", only {', '.join(pickles)}" if pickles else ""
        raise FileNotFoundError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}{found}. Nothing is ever unpickled; where a publisher has "
            "pickled weights alone, convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(FOLDER)"
        )
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is no index of weights: {error!r}") from error
    outside = [name for name in names if Path(str(name)).name != name or not name.endswith(".safetensors")]
    if outside or not names:
        raise ValueError(f"{index} must list safetensors files beside it, got {outside or names}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {INDEX} lists")
    return [folder / name for name in names]


def _read(files: list[Path], family: Family, tied: bool) -> dict[str, Tensor]:
    """The tensors of all files; of tied ones the embedding alone."""
    stored: dict[str, Tensor] = {}
    for file in files:
        stored |= read_tensors(file)
    for alias, name in family.aliases.items():
        if alias in stored and name not in stored:
            stored[name] = stored.pop(alias)
    embedding, head = family.rename("embedding.weight"), family.rename("head.weight")
    if tied and head in stored:
        output = stored.pop(head)
        tied_to = stored.setdefault(embedding, output)
        if tied_to.shape != output.shape:
            raise ValueError(
                f"{files[0].parent} holds {head} of shape {tuple(output.shape)} and {embedding} of "
                f"{tuple(tied_to.shape)}, though {CONFIG} ties them; one of the three is of another model"
            )
        # one may be stored narrower; NaN is no difference
        narrow = min(tied_to.dtype, output.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.allclose(tied_to.to(narrow), output.to(narrow), rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"{files[0].parent} holds {head} different from {embedding}, though {CONFIG} ties them; "
                'to keep both set "tie_word_embeddings": false there'
            )
    return stored
