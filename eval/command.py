"""``seqzoo eval``: what a trained model can do, beside what needs none.

Of a language model bits per byte at several context lengths, speed and memory, and tasks of lm-evaluation-harness; of
a classifier, or of what was trained on a diagnostic, the accuracy on its test examples; with ``--recall`` and
``--state-tracking`` tables of both, of models or of mixers that are trained for them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqzoo.eval import classification, diagnostics
from seqzoo.eval.perplexity import at_contexts, draw
from seqzoo.eval.run_data import data_of, is_trained_on, trained_length
from seqzoo.eval.throughput import measure
from seqzoo.hub.files import atomic_file
from seqzoo.hub.saving import find_checkpoint, from_pretrained
from seqzoo.models.classifier import SequenceClassifier
from seqzoo.models.language_model import LanguageModel
from seqzoo.models.tokenizer import BYTES, Tokenizer, check_tokenizer, load_tokenizer, tokenizer_of
from seqzoo.train.baselines import compressed_bits_per_byte
from seqzoo.train.data.diagnostic_data import Diagnostic
from seqzoo.train.data.language import LanguageData
from seqzoo.train.data.lra import ClassificationData


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(prog="seqzoo eval", description="Judge a trained model.")
    options.add_argument(
        "models",
        nargs="+",
        metavar="RUN",
        help="the folder of a run, or of a checkpoint; for --recall and --state-tracking several, among them names of "
        "mixers, or entries of a pattern as JSON, which are trained briefly",
    )
    options.add_argument("--device", default="cpu", help="where to run (%(default)s)")
    options.add_argument("--output", type=Path, help="folder of the results; RUN, or 'evaluation' for several")
    options.add_argument("--limit", type=int, help="documents of every task; examples of a classifier")
    text = options.add_argument_group("language models")
    text.add_argument(
        "--text", type=Path, nargs="+", help="files of text; held-out text of the run's own data if omitted"
    )
    text.add_argument("--side", choices=("validation", "test"), default="validation", help="of the run's own data")
    text.add_argument("--tokens", type=int, default=131072, help="of the text that are read (%(default)s)")
    text.add_argument(
        "--contexts", type=int, nargs="+", default=[64, 256, 1024, 4096], help="lengths of windows (%(default)s)"
    )
    text.add_argument("--tokenizer", help="'bytes', a tokenizer.json or owner/name; the checkpoint's if omitted")
    text.add_argument("--speed", type=int, nargs="*", metavar="T", help="measure speed and memory at these lengths")
    text.add_argument("--tasks", nargs="+", help="tasks of lm-evaluation-harness")
    text.add_argument("--include", type=Path, help="a folder with tasks of your own")
    text.add_argument("--twice", action="store_true", help="the tasks' contexts stand in the prompt twice")
    text.add_argument("--prefix", action="store_true", help="prefix mixers read the first copy as a whole")
    probes = options.add_argument_group("recall and state tracking")
    probes.add_argument("--recall", action="store_true", help="accuracy over numbers of pairs and lengths")
    probes.add_argument(
        "--state-tracking",
        nargs="*",
        metavar="GROUP",
        help=f"accuracy over lengths: parity, Zn, Sn, An, products as A4xZ5 ({' '.join(diagnostics.GROUPS)})",
    )
    probes.add_argument("--pairs", type=int, nargs="+", default=list(diagnostics.PAIRS), help="(%(default)s)")
    probes.add_argument("--lengths", type=int, nargs="+", help="tokens, of which the least is trained")
    probes.add_argument("--steps", type=int, default=1500, help="of training a mixer, at most (%(default)s)")
    probes.add_argument("--seed", type=int, default=0, help="of training a mixer (%(default)s)")
    return options


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        text = evaluate(options)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.stderr.write(f"seqzoo eval: {' '.join(str(error).split())}\n")
        return 1
    sys.stdout.write(text)
    return 0


def evaluate(options: argparse.Namespace) -> str:
    """Does what was asked for, leaves it in the folder of results, and returns the tables.

    Raises:
        ValueError: If several models are given where one is judged, or as the kinds of evaluation do.
    """
    probes = [diagnostics.RECALL] if options.recall else []
    probes += [diagnostics.STATE_TRACKING] if options.state_tracking is not None else []
    if not probes and len(options.models) > 1:
        raise ValueError(
            f"one run is judged at a time, got {len(options.models)}; seqzoo report compares several, and --recall and "
            "--state-tracking take them"
        )
    first = Path(options.models[0])
    output = options.output
    if output is None:
        output = first if len(options.models) == 1 and first.is_dir() else Path("evaluation")
    if probes:
        found = {
            task: diagnostics.probe(
                options.models,
                task,
                pairs=options.pairs,
                groups=options.state_tracking or diagnostics.GROUPS,
                lengths=options.lengths,
                steps=options.steps,
                seed=options.seed,
                device=options.device,
            )
            for task in probes
        }
        output.mkdir(parents=True, exist_ok=True)
        return "\n".join(diagnostics.write(cells, task, output) for task, cells in found.items())
    folder = find_checkpoint(first)
    model = from_pretrained(folder, device=options.device)
    if isinstance(model, SequenceClassifier):
        data = data_of(first, ClassificationData, "a classifier is judged on the test examples of its run")
        values = classification.judge(model, data, options.limit)
        text, pictures = classification.markdown(values), {"accuracy.png": classification.draw(values)}
    elif isinstance(model, LanguageModel) and options.text is None and is_trained_on(first, Diagnostic):
        drawn = data_of(first, Diagnostic, "give --text")
        values = classification.judge_labels(model, drawn, options.limit)
        text, pictures = classification.markdown(values), {"accuracy.png": classification.draw(values)}
    elif isinstance(model, LanguageModel):
        values, pictures = of_language(model, folder, first, options)
        text = table(values)
    else:
        raise TypeError(f"{folder} holds a {type(model).__name__}; seqzoo eval judges language models and classifiers")
    output.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        with atomic_file(output / name, "wb", what=name) as file:
            file.write(picture)
    for name, content in (
        ("evaluation.json", json.dumps({"model": str(folder), **values}, indent=2) + "\n"),
        ("evaluation.md", text),
    ):
        with atomic_file(output / name, what=name) as file:
            file.write(content)
    return text


def of_language(
    model: LanguageModel, folder: Path, run: Path, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What is asked for of a language model, and the picture of context lengths.

    Raises:
        ValueError: If there is too little text, or it does not fit the tokenizer.
    """
    vocabulary = model.config.vocab_size
    tokenizer = (
        tokenizer_of(folder, vocabulary)
        if options.tokenizer is None
        else check_tokenizer(load_tokenizer(options.tokenizer), vocabulary)
    )
    if options.tokens < 2:
        raise ValueError(f"--tokens must be at least 2, got {options.tokens}")
    text = b"".join(path.read_bytes() for path in options.text) if options.text else held_out(run, options.side)
    ids, read = tokens_of(text, tokenizer, options.tokens)
    contexts = [context for context in options.contexts if context <= ids.shape[0]]
    if not contexts:
        raise ValueError(f"the text has {ids.shape[0]} tokens, --contexts asks for {min(options.contexts)} at least")
    likelihoods = at_contexts(model, ids, contexts, bytes_per_token=len(read) / ids.shape[0])
    baselines = compressed_bits_per_byte(read)
    found: dict[str, Any] = {
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
    return found, {"context.png": draw(likelihoods, baselines, trained_length(run))}


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


def held_out(run: Path, side: str) -> bytes:
    """What a run was validated on, or its test text; of much the beginning.

    Raises:
        ValueError: If the folder tells of no data, of data that are no texts, or of no such side.
    """
    data = data_of(run, LanguageData, "give --text")
    if side not in data.sides:
        raise ValueError(f"the data of {run} have no {side} side, they have {', '.join(data.sides)}; give --text")
    return data.text(side)


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
        model=wrap(model, tokenizer, device=options.device, twice=options.twice, prefix=options.prefix),
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
    """What was found of a language model, in Markdown."""
    lines = ["| context | bits per byte | perplexity of a token |", "|---|---|---|"]
    for name, value in found["bits_per_byte"].items():
        lines.append(f"| {name} | {value:.3f} | {found['perplexity'][name]:.3f} |")
    lines += [f"| {name} | {value:.3f} | |" for name, value in found["baselines_bits_per_byte"].items()]
    if "speed" in found:
        lines += ["", "| tokens | forward, tokens/s | training, tokens/s | decoding, tokens/s | kept, bytes a token |"]
        lines[-1] += " state, bytes |"
        lines.append("|---|---|---|---|---|---|")
        for one in found["speed"]:
            lines.append(
                f"| {one['length']} | {one['forward']:.0f} | {one['training']:.0f} | {one['step']:.0f} | "
                f"{one['kept']:.0f} | {one['state']} |"
            )
    for task, values in found.get("tasks", {}).items():
        lines += ["", f"| {task} | |", "|---|---|", *(f"| {name} | {value:.4f} |" for name, value in values.items())]
    return "\n".join(lines) + "\n"
