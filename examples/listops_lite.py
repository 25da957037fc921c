"""Does a model read the structure of ListOps? S4D and Mamba beside who sees the top levels of a tree alone.

    python examples/listops_lite.py                    # a quarter of an hour for each model, on two cores
    python examples/listops_lite.py --models mamba --minutes 5
    python examples/listops_lite.py --easy 0           # from the first step on the trees that are judged

Trains with ``seqzoo train``, a part of the time on shorter and shallower trees, from whose weights the rest begins;
judges with ``seqzoo eval``, and says which models beat the oracle that knows the root and its children (one level). The
status is 1 where one does not: its accuracy can then be had without reading deeper.
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
        *("--model.config.d_model", "64", "--model.config.norm", "batch"),
    ],
    "mamba": [
        # what is selected by the root, which comes first, needs no second direction, and the last token knows it all;
        # without norms of what is selected some runs fall back to chance within the first thousand steps
        *("--model.config.pattern", '[{"name": "mamba", "d_state": 4, "norm_eps": 1e-6}]'),
        *("--model.config.bidirectional", "false", "--model.config.pooling", "last"),
        *("--model.config.n_layers", "3", "--model.config.d_model", "64", "--model.config.norm", "batch"),
    ],
}
# learning rates: of a model that knows nothing, and of one that goes on from weights (at 0.01 S4D forgets much)
RATES = {"s4d": (0.01, 0.004), "mamba": (0.003, 0.003)}
# a share of the time is for trees that are learned in a few minutes
EASY = 0.3
STAGES = {
    "easy": ["--data.above", "20", "--data.below", "80", "--data.max_depth", "4"],
    # so many are judged that an accuracy is known to half a percent
    "lite": ["--data.test_examples", "10000"],
}
ONE_LEVEL = "1 levels"


def run(model: str, minutes: dict[str, float], runs: Path, more: list[str]) -> tuple[float, float]:
    """Trains a model for some minutes of each stage and judges it; its accuracy and that of the oracle of one level."""
    options = ["--config", "task/listops-lite", "--config", "model/s4d", *MODELS[model]]
    options += ["--data.training_examples", "300000", "--trainer.max_steps", "-1", "--model.warmup_steps", "300"]
    options += ["--trainer.val_check_interval", "1000", "--runs", str(runs)]
    folder, weights = runs, []
    for (stage, given), rate in zip(minutes.items(), RATES[model], strict=False):
        before = set(runs.glob("*")) if runs.is_dir() else set()
        this = ["--minutes", str(given), "--name", f"listops-{stage}-{model}", *STAGES[stage], *weights]
        this += ["--model.lr", str(rate)]
        if seqzoo(["train", *options, *this, *more]) != 0:
            raise SystemExit(f"training {model} did not end well; what it said stands above")
        (folder,) = set(runs.glob("*")) - before
        weights = ["--weights", str(folder)]
    if seqzoo(["eval", str(folder)]) != 0:
        raise SystemExit(f"{folder} could not be judged; what was said stands above")
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return found["accuracy"], found["baselines_accuracy"][ONE_LEVEL]


def main(arguments: list[str] | None = None) -> int:
    """Runs the models; options that this script does not know go to ``seqzoo train``."""
    options = argparse.ArgumentParser(description="S4D and Mamba on short ListOps, beside the depth oracle.")
    options.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="which (%(default)s)")
    options.add_argument("--minutes", type=float, default=15.0, help="of training each model (%(default)s)")
    options.add_argument("--easy", type=float, default=EASY, help="share of them with smaller trees (%(default)s)")
    options.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (%(default)s)")
    given, more = options.parse_known_args(arguments)
    if not 0 <= given.easy < 1:
        options.error(f"--easy must be a share from 0 to less than 1, got {given.easy}")
    minutes = {"easy": given.easy * given.minutes, "lite": (1 - given.easy) * given.minutes}
    if given.easy == 0:
        del minutes["easy"]
    found = {model: run(model, minutes, given.runs, more) for model in given.models}
    for model, (accuracy, oracle) in found.items():
        verdict = "above" if accuracy > oracle else "NOT above"
        words = f"{model}: {100 * accuracy:.1f} %, {verdict} the oracle of one level, {100 * oracle:.1f} %"
        sys.stdout.write(f"{words}\n")
    return int(any(accuracy <= oracle for accuracy, oracle in found.values()))


if __name__ == "__main__":
    sys.exit(main())
