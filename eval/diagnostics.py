"""Recall and state tracking over lengths: of models that are there, or of mixers that are trained briefly for it.

* recall: multi-query associative recall, "Zoology: Measuring and Improving Recall in Efficient Language Models",
  https://arxiv.org/abs/2312.04927, section 3: the share of values found, over numbers of pairs and lengths;
* state tracking: words over a group, "The Illusion of State in State-Space Models", https://arxiv.org/abs/2404.08819,
  section 4: the share of right running products over lengths, beyond the one that was trained.

A mixer is trained on sequences of one length alone, so that what it makes of longer ones is told apart.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from seqzoo.eval.brief import accuracy, train_briefly
from seqzoo.hub.files import atomic_file
from seqzoo.hub.saving import find_checkpoint, from_pretrained
from seqzoo.mixer import list_mixers, nearest
from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.modules.options import check_count
from seqzoo.train.data.diagnostics import diagnostic
from seqzoo.train.data.state_tracking import product_table

RECALL, STATE_TRACKING = "recall", "state-tracking"
PAIRS = (4, 8, 16)
# the first length of each is the one that mixers are trained at
LENGTHS = {RECALL: (64, 128, 256, 512), STATE_TRACKING: (16, 32, 64, 128, 256)}
GROUPS = ("parity", "S3", "A5", "S5")
VOCABULARY = 64
WIDTH, LAYERS = 64, 2
# no run has this seed
HELD_OUT = 2**40
TRAINED, JUDGED = 64, 128


@dataclass(frozen=True)
class Cell:
    """What one model reaches in one setting.

    Attributes:
        model: Its name.
        task: ``"recall"`` or ``"state-tracking"``.
        setting: Pairs of a sequence, or the group.
        length: Tokens.
        accuracy: Of the model's first choice, over all tokens that are asked for.
        chance: Of a guess among what the sequence allows: its values, or the elements of the group.
        trained: Tokens of the sequences in training, None where the model was not trained here.
        steps: Of training here, likewise.
    """

    model: str
    task: str
    setting: str
    length: int
    accuracy: float
    chance: float
    trained: int | None
    steps: int | None


def settings(task: str, pairs: Sequence[int], groups: Sequence[str]) -> list[str]:
    """The settings of a task: numbers of pairs, or groups."""
    return [str(one) for one in pairs] if task == RECALL else list(groups)


def batch(task: str, setting: str, length: int, seed: int, index: int, size: int, vocabulary: int) -> Any:
    """Ids and labels of a batch, both ``(size, length)``."""
    if task == RECALL:
        draw = diagnostic("mqar", length=length, n_pairs=int(setting), vocab_size=vocabulary)
    else:
        draw = diagnostic("group-words", length=length, group=_group(setting))
    return draw(seed, index, batch_size=size)


def judge(
    model: LanguageModel, task: str, setting: str, lengths: Sequence[int], size: int = JUDGED
) -> dict[int, float]:
    """The accuracy at every length that the setting fits into and the model sees, on sequences of no training.

    Args:
        model: The model.
        task: ``"recall"`` or ``"state-tracking"``.
        setting: Pairs of a sequence, or the group.
        lengths: Tokens.
        size: Sequences at every length.

    Raises:
        ValueError: If the model has too few tokens in its vocabulary, or there is no such group.
    """
    vocabulary, limit = model.config.vocab_size, model.config.max_positions
    needed = 2 * int(setting) + 2 if task == RECALL else len(product_table(_group(setting)))
    if vocabulary < needed:
        raise ValueError(f"{task} {setting} needs a vocabulary of {needed} tokens at least, the model has {vocabulary}")
    device = model.embedding.weight.device
    found = {}
    for length in sorted(set(lengths)):
        if (limit is None or length <= limit) and _fits(task, setting, length):
            ids, labels = batch(task, setting, length, HELD_OUT, 0, size, vocabulary)
            found[length] = accuracy(model, (ids.to(device), labels.to(device)))
    return found


def train(
    pattern: Sequence[Any], task: str, chosen: Sequence[str], length: int, *, steps: int, seed: int
) -> tuple[LanguageModel, int]:
    """A small language model of a pattern, trained on one task; ends early where nothing more is to be learned.

    Args:
        pattern: Of the model.
        task: ``"recall"``, whose settings are trained in turn, or ``"state-tracking"``.
        chosen: The settings.
        length: Tokens of a sequence.
        steps: Updates, at most.
        seed: Of initialisation and data.

    Returns:
        The model, and the updates that were made.
    """
    size = VOCABULARY if task == RECALL else len(product_table(_group(chosen[0])))
    torch.manual_seed(seed)
    model = LanguageModel(ModelConfig(vocab_size=size, d_model=WIDTH, n_layers=LAYERS, pattern=list(pattern)))

    def draw(step: int) -> Any:
        return batch(task, chosen[step % len(chosen)], length, seed, step, TRAINED, size)

    def learned() -> float:
        return min(judge(model, task, one, [length])[length] for one in chosen)

    done = train_briefly(model, draw, steps, learned=learned)
    return model.eval(), done


def probe(
    names: Sequence[str],
    task: str,
    *,
    pairs: Sequence[int] = PAIRS,
    groups: Sequence[str] = GROUPS,
    lengths: Sequence[int] | None = None,
    steps: int = 1500,
    seed: int = 0,
    device: str = "cpu",
) -> list[Cell]:
    """Judges models at all settings and lengths of a task; the same arguments give the same numbers.

    Args:
        names: Folders of runs or checkpoints, which are judged as they are, and names of mixers or entries of a
            pattern as JSON, ``{"name": "linear_attention", "d_conv": 4}``, which are trained at the least length: one
            model for all numbers of pairs, one for every group.
        task: ``"recall"`` or ``"state-tracking"``.
        pairs: Of a sequence, for recall.
        groups: For state tracking, as :func:`seqzoo.train.data.state_tracking.product_table`, and ``"parity"``.
        lengths: Tokens; those of the task when omitted.
        steps: Updates of training, at most.
        seed: Of training.
        device: Of the models that are not trained here.

    Raises:
        ValueError: If a number is out of range, or a name is no folder, mixer or pattern.
    """
    chosen = settings(task, [check_count("--pairs", one) for one in pairs], groups)
    tokens = sorted({check_count("--lengths", one) for one in (LENGTHS[task] if lengths is None else lengths)})
    check_count("--steps", steps)
    if task == STATE_TRACKING:
        for group in groups:
            product_table(_group(group))
    cells = []
    for name in names:
        pattern = _pattern(name)
        if pattern is None:
            model = _load(name, device)
            found = {one: (judge(model, task, one, tokens), None, None) for one in chosen}
        else:
            found = {}
            for together in [chosen] if task == RECALL else [[one] for one in chosen]:
                for one in together:
                    if task == RECALL and int(one) > VOCABULARY // 2 - 1:
                        raise ValueError(
                            f"--pairs must be at most {VOCABULARY // 2 - 1}, got {one}: a mixer is trained with "
                            f"{VOCABULARY} tokens"
                        )
                    if not _fits(task, one, tokens[0]):
                        raise ValueError(
                            f"a mixer is trained at the least length, {tokens[0]}, which has no room for {one} pairs; "
                            f"give --lengths of {4 * int(one)} and more, even ones, or fewer --pairs"
                        )
                model, done = train(pattern, task, together, tokens[0], steps=steps, seed=seed)
                found |= {one: (judge(model, task, one, tokens), tokens[0], done) for one in together}
        for one, (accuracies, trained, done) in found.items():
            chance = 1 / int(one) if task == RECALL else 1 / len(product_table(_group(one)))
            cells += [
                Cell(name, task, one, length, round(value, 4), round(chance, 4), trained, done)
                for length, value in accuracies.items()
            ]
    return cells


def markdown(cells: Sequence[Cell]) -> str:
    """Tables, one for each task: a row for every model and setting, a column for every length, in per cent."""
    lines: list[str] = []
    for task, group in itertools.groupby(cells, key=lambda cell: cell.task):
        of = list(group)
        lengths = sorted({cell.length for cell in of})
        first = "pairs" if task == RECALL else "group"
        lines += [
            f"## {task}",
            "",
            f"| model | {first} | trained at | chance | " + " | ".join(map(str, lengths)) + " |",
        ]
        lines.append("|" + "---|" * (4 + len(lengths)))
        for (name, setting), row in itertools.groupby(of, key=lambda cell: (cell.model, cell.setting)):
            found = {cell.length: cell for cell in row}
            one = next(iter(found.values()))
            trained = "elsewhere" if one.trained is None else f"{one.trained} tokens, {one.steps} steps"
            values = [f"{100 * found[length].accuracy:.1f}" if length in found else "" for length in lengths]
            lines.append(f"| {name} | {setting} | {trained} | {100 * one.chance:.1f} | " + " | ".join(values) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(cells: Sequence[Cell]) -> bytes:
    """A panel for every setting of one task, the accuracy over the length; a PNG file."""
    panels = list(dict.fromkeys(cell.setting for cell in cells))
    figure = Figure(figsize=(3.6 * len(panels) + 1.6, 3.8), layout="constrained")
    for place, setting in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        here = [cell for cell in cells if cell.setting == setting]
        for name, row in itertools.groupby(here, key=lambda cell: cell.model):
            axes.plot(*zip(*((cell.length, cell.accuracy) for cell in row), strict=True), "o-", label=name)
        axes.axhline(here[0].chance, color="0.35", linestyle="--", linewidth=1, label=f"chance: {here[0].chance:.3f}")
        for trained in sorted({cell.trained for cell in here if cell.trained is not None}):
            axes.axvline(trained, color="0.5", linestyle=":", label=f"length in training: {trained}")
        title = f"{setting} pairs" if here[0].task == RECALL else setting
        axes.set(xlabel="tokens", ylabel="accuracy", ylim=(0, 1.03), title=title)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7.5)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def write(cells: Sequence[Cell], task: str, output: Path) -> str:
    """Leaves ``recall.json``, ``.md`` and ``.png``, or those of ``state-tracking``, in a folder; returns the table."""
    text = markdown(cells)
    with atomic_file(output / f"{task}.json", what=f"{task}.json") as file:
        file.write(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")
    with atomic_file(output / f"{task}.md", what=f"{task}.md") as file:
        file.write(text)
    with atomic_file(output / f"{task}.png", "wb", what=f"the picture of {task}") as file:
        file.write(draw(cells))
    return text


def _fits(task: str, setting: str, length: int) -> bool:
    return task != RECALL or (length % 2 == 0 and length >= 4 * int(setting))


def _group(setting: str) -> str:
    return "Z2" if setting == "parity" else setting


def _pattern(name: str) -> list[Any] | None:
    """The pattern that a mixer's name or JSON stands for; None where the name is a folder."""
    if Path(name).is_dir():
        return None
    if name in list_mixers():
        return [name]
    if not name.startswith(("{", "[")):
        raise ValueError(
            f"{name!r} is neither the folder of a run or checkpoint nor a mixer; {nearest(name, list_mixers())}"
        )
    try:
        found: Mapping[str, Any] | list[Any] = json.loads(name)
    except ValueError as error:
        raise ValueError(f"{name!r} is no JSON: {error}; expected an entry of a pattern or a list of them") from error
    return found if isinstance(found, list) else [found]


def _load(name: str, device: str) -> LanguageModel:
    folder = find_checkpoint(name)
    model = from_pretrained(folder, device=device)
    if not isinstance(model, LanguageModel):
        raise TypeError(f"{folder} holds a {type(model).__name__}; recall and state tracking judge language models")
    return model
