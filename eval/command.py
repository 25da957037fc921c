"""``seqzoo eval RUN``: bits per byte at several context lengths, speed and memory, tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from seqzoo.eval.perplexity import at_contexts, draw
from seqzoo.eval.throughput import measure
from seqzoo.hub.files import atomic_file
from seqzoo.hub.saving import find_checkpoint, from_pretrained
from seqzoo.models.language_model import LanguageModel
from seqzoo.models.tokenizer import BYTES, Tokenizer, check_tokenizer, load_tokenizer, tokenizer_of
from seqzoo.train.baselines import compressed_bits_per_byte
from seqzoo.train.data.folder_bytes import FolderBytes


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(prog="seqzoo eval", description="Judge a trained language model.")
    options.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, or of a checkpoint")
    options.add_argument(
        "--text", type=Path, nargs="+", help="files of text; the run's own validation files if omitted"
    )
    options.add_argument("--tokens", type=int, default=131072, help="of the text that are read (%(default)s)")
    options.add_argument(
        "--contexts", type=int, nargs="+", default=[64, 256, 1024, 4096], help="lengths of windows (%(default)s)"
    )
    options.add_argument("--tokenizer", help="'bytes', a tokenizer.json or owner/name; the checkpoint's if omitted")
    options.add_argument("--speed", type=int, nargs="*", metavar="T", help="measure speed and memory at these lengths")
    options.add_argument("--tasks", nargs="+", help="tasks of lm-evaluation-harness")
    options.add_argument("--include", type=Path, help="a folder with tasks of your own")
    options.add_argument("--limit", type=int, help="documents of every task")
    options.add_argument("--device", default="cpu", help="where to run (%(default)s)")
    options.add_argument("--output", type=Path, help="folder for evaluation.json and the picture; RUN if omitted")
    return options


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        found = evaluate(options)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.stderr.write(f"seqzoo eval: {' '.join(str(error).split())}\n")
        return 1
    sys.stdout.write(table(found))
    return 0


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, as it is written to ``evaluation.json``."""
    folder = find_checkpoint(options.run)
    model = from_pretrained(folder, device=options.device)
    if not isinstance(model, LanguageModel):
        raise TypeError(f"{folder} holds a {type(model).__name__}; seqzoo eval judges language models")
    vocabulary = model.config.vocab_size
    tokenizer = (
        tokenizer_of(folder, vocabulary)
        if options.tokenizer is None
        else check_tokenizer(load_tokenizer(options.tokenizer), vocabulary)
    )
    if options.tokens < 2:
        raise ValueError(f"--tokens must be at least 2, got {options.tokens}")
    text = b"".join(path.read_bytes() for path in options.text) if options.text else validation_bytes(options.run)
    ids, read = tokens_of(text, tokenizer, options.tokens)
    contexts = [context for context in options.contexts if context <= ids.shape[0]]
    if not contexts:
        raise ValueError(f"the text has {ids.shape[0]} tokens, --contexts asks for {min(options.contexts)} at least")
    likelihoods = at_contexts(model, ids, contexts, bytes_per_token=len(read) / ids.shape[0])
    baselines = compressed_bits_per_byte(read)
    found: dict[str, Any] = {
        "model": str(folder),
        "tokens": ids.shape[0],
        "bytes": len(read),
        "bits_per_byte": {name: one.bits_per_byte for name, one in likelihoods.items()},
        "perplexity": {name: one.perplexity for name, one in likelihoods.items()},
        "baselines_bits_per_byte": baselines,
    }
    if options.speed is not None:
        found["speed"] = [one._asdict() for one in measure(model, options.speed or [256, 1024, 4096])]
    if options.tasks:
        found["tasks"] = run_tasks(model, tokenizer, options)
    output = options.run if options.output is None else options.output
    output.mkdir(parents=True, exist_ok=True)
    with atomic_file(output / "context.png", "wb", what="the picture of context lengths") as file:
        file.write(draw(likelihoods, baselines, trained_length(options.run)))
    with atomic_file(output / "evaluation.json", what="evaluation.json") as file:
        file.write(json.dumps(found, indent=2) + "\n")
    return found


def tokens_of(text: bytes, tokenizer: Tokenizer, most: int) -> tuple[Tensor, bytes]:
    """The first tokens of a text, and the bytes that they stand for.

    Raises:
        ValueError: If the text has fewer than 2 tokens, or is no UTF-8 where the tokenizer reads that.
    """
    if tokenizer.vocab_size == BYTES and tokenizer.end is None:
        ids = list(text[:most])
        read = text[:most]
    else:
        try:
            words = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the text is no UTF-8, byte {error.start}: {error.reason}") from error
        ids = tokenizer.encode(words)
        read = text if len(ids) <= most else tokenizer.decode(ids[:most]).encode("utf-8")
        ids = ids[:most]
    if len(ids) < 2:
        raise ValueError(f"the text must have at least 2 tokens, it has {len(ids)}")
    return torch.tensor(ids), read


def validation_bytes(run: Path) -> bytes:
    """What a run was validated on.

    Raises:
        ValueError: If the folder tells of no data, or of data that is no folder of files.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} has no config.yaml that tells what it was validated on; give --text")
    described = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("data") or {}
    module, _, name = str(described.get("class_path", "")).rpartition(".")
    kind = getattr(importlib.import_module(module), name, None) if module.startswith("seqzoo.") else None
    if kind is not FolderBytes:
        raise ValueError(f"{run} was trained on {described.get('class_path')!r}, not on a folder of files; give --text")
    data = FolderBytes(**described.get("init_args", {}))
    data.setup()
    if data.validation_bytes is None:
        raise RuntimeError("setup() has read no validation bytes")
    return data.validation_bytes.tobytes()


def trained_length(run: Path) -> int | None:
    """Tokens of a training window, where the run's configuration tells."""
    path = run / "config.yaml"
    if not path.is_file():
        return None
    data = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("data") or {}
    length = (data.get("init_args") or {}).get("context")
    return length if isinstance(length, int) else None


def run_tasks(model: LanguageModel, tokenizer: Tokenizer, options: argparse.Namespace) -> dict[str, Any]:
    """The scores of tasks of lm-evaluation-harness.

    Raises:
        ImportError: If lm-eval is not installed.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from seqzoo.eval.harness import HarnessModel
    except ImportError as error:
        raise ImportError(f"--tasks needs lm-evaluation-harness: pip install 'seqzoo[eval]' ({error})") from error
    manager = TaskManager(include_path=None if options.include is None else str(options.include))
    # the package's decorators hide their types
    simple_evaluate: Any = lm_eval.simple_evaluate
    wrap: Any = HarnessModel
    scores = simple_evaluate(
        model=wrap(model, tokenizer, device=options.device),
        tasks=options.tasks,
        task_manager=manager,
        limit=options.limit,
        bootstrap_iters=0,
    )
    if scores is None:
        raise RuntimeError("lm-evaluation-harness returned no scores")
    return {
        task: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in scores["results"].items()
    }


def table(found: dict[str, Any]) -> str:
    """What was found, in words."""
    lines = [f"{'context':>10}  bits per byte  perplexity"]
    for name, value in found["bits_per_byte"].items():
        lines.append(f"{name:>10}  {value:13.3f}  {found['perplexity'][name]:10.3f}")
    for name, value in found["baselines_bits_per_byte"].items():
        lines.append(f"{name:>10}  {value:13.3f}")
    if "speed" in found:
        lines += ["", f"{'length':>8}  forward  training  steps/s  kept/token  state  (tokens/s, bytes)"]
        for one in found["speed"]:
            lines.append(
                f"{one['length']:8d}  {one['forward']:7.0f}  {one['training']:8.0f}  {one['step']:7.0f}  "
                f"{one['kept']:10.0f}  {one['state']}"
            )
    for task, values in found.get("tasks", {}).items():
        lines += ["", task, *(f"  {name}: {value:.4f}" for name, value in values.items())]
    return "\n".join(lines) + "\n"
