"""``seqzoo signature``: small tasks that every kind of mixer has to pass *and fail* as its mathematics says.

A model that fails what it should solve has a bug; one that solves what it cannot has one too, as a constraint that does
not hold or a causal mask that leaks. Four tasks on two cores:

* digits: scikit-learn's digits, 64 pixels one after another: the class;
* copying: selective copying trained at 64 tokens, judged at 128 (https://arxiv.org/abs/2312.00752, section 4.1.1);
* recall: MQAR of 6 pairs in 32 tokens (https://arxiv.org/abs/2312.04927);
* parity: trained at 24 tokens, judged at 96 (https://arxiv.org/abs/2411.12537).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqzoo.eval.brief import RATE, Draw, accuracy, train_briefly
from seqzoo.hub.files import atomic_file
from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec, nearest
from seqzoo.models import ClassifierConfig, LanguageModel, ModelConfig, SequenceClassifier
from seqzoo.packing import Packing
from seqzoo.train.data.diagnostics import diagnostic

SEEDS = 5


class LongShortTermMemory(SequenceMixer):
    """``torch.nn.LSTM``, the nonlinear row of the table; not part of the zoo.

    Args:
        d_model: Width of inputs, outputs and state.
        forget_bias: With which the forget gates start (https://proceedings.mlr.press/v37/jozefowicz15.html); None
            means PyTorch's, about 0, from which some seeds do not learn to copy.
    """

    def __init__(self, d_model: int, forget_bias: float | None = 1.0) -> None:
        super().__init__(d_model)
        self.forget_bias = forget_bias
        self.lstm = nn.LSTM(d_model, d_model, batch_first=True)
        self.out_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """All tokens, one after another."""
        given = None if state is None else tuple(state[name].transpose(0, 1).contiguous() for name in ("h", "c"))
        y, (h, c) = self.lstm(x, given)
        return Mixed(self.out_proj(y), {"h": h.transpose(0, 1), "c": c.transpose(0, 1)})

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """Two vectors."""
        return dict.fromkeys(("h", "c"), ((batch_size, 1, self.d_model), dtype))

    def reset_parameters(self) -> None:
        """PyTorch's but for the forget gates' biases."""
        self.lstm.reset_parameters()
        self.out_proj.reset_parameters()
        if self.forget_bias is None:
            return
        # the gates' order is input, forget, cell, output; the two biases are added
        gates = slice(self.d_model, 2 * self.d_model)
        for name, value in (("bias_ih_l0", self.forget_bias), ("bias_hh_l0", 0.0)):
            nn.init.constant_(self.lstm.get_parameter(name)[gates], value)


@dataclass(frozen=True)
class Task:
    """What is trained and judged.

    Attributes:
        model: Values of the model's configuration.
        steps: Of training, at most.
        batch: Sequences of a step.
        training: Makes a step's batch from its number, given a seed.
        judging: Likewise those that are judged.
        trained: Those that tell whether training has nothing more to learn.
    """

    model: Mapping[str, Any]
    steps: int
    batch: int
    training: Callable[[int], Draw]
    judging: Callable[[], tuple[Tensor, Tensor]]
    trained: Callable[[], tuple[Tensor, Tensor]]


def _drawn(name: str, batch: int, options: Mapping[str, Any], longer: Mapping[str, Any]) -> dict[str, Any]:
    def training(seed: int) -> Draw:
        return lambda step: diagnostic(name, **options)(seed, step, batch_size=batch)

    # no run has this seed
    return {
        "batch": batch,
        "training": training,
        "judging": lambda: diagnostic(name, **{**options, **longer})(2**40, 0, batch_size=512),
        "trained": lambda: diagnostic(name, **options)(2**40, 1, batch_size=256),
    }


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels and classes for training, then for judging: every fifth digit."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32)[..., None] / 8 - 1
    y = torch.tensor(classes)
    held = torch.arange(len(y)) % 5 == 0
    return x[~held], y[~held], x[held], y[held]


def _digit_batches(seed: int) -> Draw:
    x, y, _, _ = _digits()

    def draw(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(y), (64,), generator=generator)
        return x[rows], y[rows]

    return draw


TASKS = {
    "digits": Task(
        {"n_features": 1, "n_classes": 10, "d_model": 64, "n_layers": 2},
        600,
        64,
        _digit_batches,
        lambda: _digits()[2:],
        lambda: _digits()[:2],
    ),
    "copying": Task(
        {"vocab_size": 10, "d_model": 64, "n_layers": 2},
        2000,
        **_drawn("selective-copying", 32, {"length": 64, "n_tokens": 4, "n_symbols": 8}, {"length": 128}),
    ),
    "recall": Task(
        {"vocab_size": 64, "d_model": 64, "n_layers": 2},
        1000,
        **_drawn("mqar", 64, {"length": 32, "n_pairs": 6, "vocab_size": 64}, {}),
    ),
    "parity": Task(
        {"vocab_size": 2, "d_model": 32, "n_layers": 1}, 1500, **_drawn("parity", 64, {"length": 24}, {"length": 96})
    ),
}


@dataclass(frozen=True)
class Row:
    """A kind of mixer.

    Attributes:
        mixer: The entry of a pattern; None means ``torch.nn.LSTM``.
        expected: By task ``(">=", value)`` or ``("<=", value)`` of the median; a task that is missing is not run.
        instead: By task other options of the mixer, or of the model under ``"model"``.
        rates: By task another peak of the learning rate.
        steps: By task another number of steps of training.
    """

    mixer: Mapping[str, Any] | None
    expected: Mapping[str, tuple[str, float]]
    instead: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)


ROWS = {
    "S4D": Row(
        {"name": "s4d"},
        {"digits": (">=", 0.93), "copying": ("<=", 0.5), "recall": ("<=", 0.5), "parity": ("<=", 0.7)},
        {"parity": {"model": {"n_layers": 2}}},
    ),
    "minGRU": Row(
        {"name": "min_gru"},
        {"digits": (">=", 0.6), "copying": (">=", 0.95), "recall": ("<=", 0.5), "parity": ("<=", 0.7)},
        {"recall": {"d_conv": 4}},
    ),
    "minGRU in (-1, 1)": Row(
        {"name": "min_gru", "gate_range": [-1.0, 1.0]},
        {"copying": (">=", 0.95), "parity": (">=", 0.75)},
    ),
    "Mamba": Row(
        {"name": "mamba"},
        {"copying": (">=", 0.95), "recall": ("<=", 0.5), "parity": ("<=", 0.7)},
        # without norms of its step, B and C two of five seeds do not make the leap
        {"copying": {"norm_eps": 1e-6}, "parity": {"model": {"n_layers": 2}}},
        rates={"copying": 2e-3},
        steps={"copying": 3000},
    ),
    "linear attention": Row(
        {"name": "linear_attention", "feature_map": "elu+1"},
        {"digits": (">=", 0.5), "copying": ("<=", 0.7), "recall": (">=", 0.99), "parity": ("<=", 0.7)},
        # by second-order features noise that is not forgotten hardly shows, so copying would succeed
        {"recall": {"feature_map": "taylor", "d_conv": 4}, "parity": {"model": {"n_layers": 2}}},
    ),
    # a key that has to be one direction must not see its neighbours
    "DeltaNet": Row(
        {"name": "deltanet"}, {"recall": (">=", 0.99), "parity": ("<=", 0.7)}, {"parity": {"d_conv": None}}
    ),
    "DeltaNet in (-1, 1)": Row(
        {"name": "deltanet", "negative_eigenvalues": True},
        {"recall": (">=", 0.99), "parity": (">=", 0.75)},
        {"parity": {"d_conv": None}},
    ),
    "attention": Row(
        {"name": "attention"},
        {"digits": (">=", 0.85), "parity": ("<=", 0.7)},
        {"parity": {"rotary_base": None, "model": {"n_layers": 2}}},
        steps={"digits": 900},
    ),
    "LSTM": Row(
        None,
        {"digits": (">=", 0.85), "copying": (">=", 0.95), "recall": ("<=", 0.5), "parity": (">=", 0.99)},
        {"parity": {"forget_bias": None}},
        rates={"parity": 2e-2},
        steps={"parity": 2000},
    ),
}


def build(row: Row, task: str) -> LanguageModel | SequenceClassifier:
    """The model of a row for a task."""
    instead = dict(row.instead.get(task, {}))
    values = {**TASKS[task].model, **instead.pop("model", {})}
    pattern: list[str | dict[str, Any]] = ["min_gru"] if row.mixer is None else [{**row.mixer, **instead}]
    model: LanguageModel | SequenceClassifier
    if "n_classes" in values:
        model = SequenceClassifier(ClassifierConfig(pattern=pattern, **values))
    else:
        model = LanguageModel(ModelConfig(pattern=pattern, **values))
    if row.mixer is None:
        for block in model.backbone.blocks:
            block.mixer = LongShortTermMemory(values["d_model"], **instead)  # pyright: ignore - a ModuleList hides its class
    return model


def run(name: str, task: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Trains a row on a task; the accuracy where it is judged, steps and seconds of processor time.

    Args:
        name: Of a row.
        task: Of a task.
        seed: Of initialisation and data.
        steps: Of training; those of the task when omitted.
    """
    row, what = ROWS[name], TASKS[task]
    steps = row.steps.get(task, what.steps) if steps is None else steps
    torch.manual_seed(seed)
    model = build(row, task)
    trained = what.trained()
    # what generalises to longer sequences goes on settling after it is solved at this length
    learned = (lambda: accuracy(model, trained)) if task == "recall" else None
    started = time.process_time()
    done = train_briefly(model, what.training(seed), steps, rate=row.rates.get(task, RATE), learned=learned)
    return {
        "row": name,
        "task": task,
        "seed": seed,
        "accuracy": round(accuracy(model, what.judging()), 4),
        "accuracy_in_training": round(accuracy(model, trained), 4),
        "steps": done,
        "seconds": round(time.process_time() - started, 1),
    }


def holds(expected: tuple[str, float], value: float) -> bool:
    """Whether an accuracy is as expected."""
    sign, bound = expected
    return value >= bound if sign == ">=" else value <= bound


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The table: medians of the seeds with their range, what is expected of them, and how many seeds miss it.

    A median that is not as expected is bold. Single seeds miss it where learning is a leap that some never make.
    """
    lines = ["| " + " | ".join(["", *TASKS]) + " |", "| " + " | ".join(["---"] * (len(TASKS) + 1)) + " |"]
    for name, row in ROWS.items():
        cells = []
        for task in TASKS:
            values = [one["accuracy"] for one in results if (one["row"], one["task"]) == (name, task)]
            if not values:
                cells.append("")
                continue
            spread = f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else "1 seed"
            expected, median = row.expected[task], statistics.median(values)
            missed = sum(not holds(expected, value) for value in values)
            verdict = "holds" if holds(expected, median) else "**fails**"
            counted = f", {missed} of {len(values)} miss it" if missed else ""
            cells.append(f"{median:.3f} ({spread}; {expected[0]} {expected[1]}: {verdict}{counted})")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    seconds = sum(one["seconds"] for one in results)
    lines += ["", f"{len(results)} runs, {seconds / 60:.0f} minutes of processor time in sum."]
    return "\n".join(lines) + "\n"


def medians(results: Sequence[Mapping[str, Any]]) -> str:
    """The table in short: the median of the seeds, bold where the task has to be solved."""
    lines = ["| | " + " | ".join(TASKS) + " |", "|" + "---|" * (len(TASKS) + 1)]
    for name, row in ROWS.items():
        cells = []
        for task in TASKS:
            values = [one["accuracy"] for one in results if (one["row"], one["task"]) == (name, task)]
            text = f"{statistics.median(values):.2f}" if values else ""
            cells.append(f"**{text}**" if values and row.expected[task][0] == ">=" else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(prog="seqzoo signature", description="Train every kind of mixer on small tasks.")
    options.add_argument("--output", type=Path, default=Path("signature"), help="folder of results (%(default)s)")
    options.add_argument("--seeds", type=int, default=SEEDS, help="runs of every cell (%(default)s)")
    options.add_argument("--rows", nargs="+", default=list(ROWS), help="which kinds; all by default")
    options.add_argument("--tasks", nargs="+", default=list(TASKS), help="which tasks; all by default")
    options.add_argument("--steps", type=int, help="of every run; those of the task when omitted")
    options.add_argument("--part", default="1/1", help="i/n: this process takes every n-th run, to share them out")
    return options


def main(arguments: Sequence[str]) -> int:
    """Runs what has no result yet, and writes the table; the status is 1 where a median is not as expected."""
    options = parser().parse_args(arguments)
    try:
        for what, given, known in (("row", options.rows, ROWS), ("task", options.tasks, TASKS)):
            for name in given:
                if name not in known:
                    raise ValueError(f"there is no {what} {name!r}; {nearest(name, known)}")
        part, parts = (int(number) for number in options.part.split("/"))
        if options.seeds < 1 or not 1 <= part <= parts:
            raise ValueError(f"--seeds must be at least 1 and --part i/n, got {options.seeds} and {options.part}")
        options.output.mkdir(parents=True, exist_ok=True)
        wanted = [
            (name, task, seed)
            for seed in range(options.seeds)
            for name in options.rows
            for task in options.tasks
            if task in ROWS[name].expected
        ][part - 1 :: parts]
        for name, task, seed in wanted:
            path = options.output / f"{name}-{task}-{seed}.json".replace(" ", "_")
            if path.exists():
                continue
            found = run(name, task, seed, options.steps)
            with atomic_file(path, what=path.name) as file:
                file.write(json.dumps(found) + "\n")
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
        results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.output.glob("*.json"))]
        for path, text in (
            (options.output / "signature.md", markdown(results)),
            (options.output / "signature.jsonl", "".join(json.dumps(one) + "\n" for one in results)),
        ):
            with atomic_file(path, what=path.name) as file:
                file.write(text)
    except (ImportError, OSError, ValueError) as error:
        sys.stderr.write(f"seqzoo signature: {' '.join(str(error).split())}\n")
        return 2
    table = markdown(results)
    sys.stdout.write(table)
    return int("**fails**" in table)
