"""Does a model read the structure of ListOps? S4D and Mamba beside who sees the top levels of a tree alone.

    python examples/listops_lite.py                    # a quarter of an hour for each model, on two cores
    python examples/listops_lite.py --models mamba --minutes 5
    python examples/listops_lite.py --task shorter     # trees of 27 tokens: learned in a third of the time

Trains with ``seqzoo train``, judges with ``seqzoo eval``, and says which models beat the oracle that knows the root and
its children (one level). The status is 1 where one does not: its accuracy can then be had without reading deeper.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from seqzoo.cli import main as seqzoo

# options beside --config task/listops-lite --config model/s4d
MODELS = {
    "s4d": [
        *("--model.config.pattern", '[{"name": "s4d", "d_state": 16}]', "--model.config.n_layers", "4"),
        *("--model.config.d_model", "64", "--model.config.norm", "batch", "--model.lr", "0.01"),
    ],
    "mamba": [
        # what is selected by the root, which comes first, needs no second direction; without norms of what is selected
        # some runs fall back to chance within the first thousand steps
        *("--model.config.pattern", '[{"name": "mamba", "d_state": 4, "norm_eps": 1e-6}]'),
        *("--model.config.bidirectional", "false", "--model.config.n_layers", "3", "--model.config.d_model", "64"),
        *("--model.config.norm", "batch", "--model.lr", "0.003"),
    ],
}
# so many are judged that an accuracy is known to half a percent
EXAMPLES = ["--data.training_examples", "100000", "--data.test_examples", "10000"]
TASKS = {
    "lite": EXAMPLES,
    "shorter": [
        *("--data.above", "20", "--data.below", "80", "--data.max_depth", "4", "--data.max_args", "5"),
        *EXAMPLES,
    ],
}
ONE_LEVEL = "1 levels"


def run(model: str, task: str, minutes: float, runs: Path, more: list[str]) -> tuple[float, float]:
    """Trains and judges a model; its accuracy and that of the oracle of one level."""
    before = set(runs.glob("*")) if runs.is_dir() else set()
    arguments = ["train", "--config", "task/listops-lite", "--config", "model/s4d", *MODELS[model], *TASKS[task]]
    arguments += ["--minutes", str(minutes), "--trainer.max_steps", "-1", "--model.warmup_steps", "300"]
    arguments += ["--name", f"listops-{task}-{model}", "--runs", str(runs)]
    if seqzoo([*arguments, *more]) != 0:
        raise SystemExit(f"training {model} did not end well; what it said stands above")
    (folder,) = set(runs.glob("*")) - before
    if seqzoo(["eval", str(folder)]) != 0:
        raise SystemExit(f"{folder} could not be judged; what was said stands above")
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return found["accuracy"], found["baselines_accuracy"][ONE_LEVEL]


def main(arguments: list[str] | None = None) -> int:
    """Runs the models; options that this script does not know go to ``seqzoo train``."""
    options = argparse.ArgumentParser(description="S4D and Mamba on short ListOps, beside the depth oracle.")
    options.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="which (%(default)s)")
    options.add_argument("--task", choices=list(TASKS), default="lite", help="trees (%(default)s)")
    options.add_argument("--minutes", type=float, default=15.0, help="of every training (%(default)s)")
    options.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (%(default)s)")
    given, more = options.parse_known_args(arguments)
    found = {model: run(model, given.task, given.minutes, given.runs, more) for model in given.models}
    for model, (accuracy, oracle) in found.items():
        verdict = "above" if accuracy > oracle else "NOT above"
        words = f"{model}: {100 * accuracy:.1f} %, {verdict} the oracle of one level, {100 * oracle:.1f} %"
        sys.stdout.write(f"{words}\n")
    return int(any(accuracy <= oracle for accuracy, oracle in found.values()))


if __name__ == "__main__":
    sys.exit(main())
