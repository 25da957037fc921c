"""Accuracy of a classifier on test examples, beside what needs no model of sequences, by length and by depth."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from seqzoo.hub.files import atomic_file
from seqzoo.models.classifier import SequenceClassifier
from seqzoo.models.language_model import LanguageModel
from seqzoo.train.data.diagnostic_data import Diagnostic
from seqzoo.train.data.examples import Batch, EvaluationBatches, Sequences
from seqzoo.train.data.listops import TOKENS
from seqzoo.train.data.lra import ClassificationData, ListOps
from seqzoo.train.data.ragged import Ragged
from seqzoo.train.data.shards import data_folder
from seqzoo.train.data.windows import IGNORED

# of the baselines' cache: a change of what they are makes it anew
FORMAT = 1
# examples on which the linear baseline is fitted, and examples of a batch of features
FITTED, PIECE = 10_000, 256
GROUPS = 5
NAMES = {
    "0 levels": "ListOps oracle: root operator only",
    "1 levels": "ListOps oracle: one level",
    **{f"{k} levels": f"ListOps oracle: {k} levels" for k in range(2, 32)},
}


@torch.inference_mode()
def predictions(model: SequenceClassifier, data: ClassificationData, limit: int | None = None) -> NDArray[np.int64]:
    """The likeliest class of the test examples, int64 ``(n,)``, in their order.

    Args:
        model: The classifier, in evaluation mode.
        data: Whose ``setup()`` was called.
        limit: Examples that are judged, the first ones; None means all.
    """
    device = next(model.parameters()).device
    found, count = [], 0
    for batch in EvaluationBatches(data.examples("test"), batch_size=data.batch_size):
        inputs = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in batch.items()}
        del inputs["labels"]
        found.append(model(**inputs).argmax(-1).cpu().numpy())
        count += len(found[-1])
        if limit is not None and count >= limit:
            break
    return np.concatenate(found)[:limit]


def judge(model: SequenceClassifier, data: ClassificationData, limit: int | None = None) -> dict[str, Any]:
    """Accuracy on the test examples, the baselines, and accuracy in groups of examples.

    Args:
        model: The classifier, in evaluation mode.
        data: Whose ``setup()`` was called.
        limit: Examples that are judged, the first ones; None means all. The baselines are those of all.

    Returns:
        Plain data: ``accuracy`` with its ``standard_error``, ``examples``, ``baselines_accuracy``, and ``groups``: by
        ``length`` and for ListOps by ``depth`` and by ``root operator``, lists of ``{"group", "examples", "accuracy",
        "most frequent class"}``, the last being the accuracy of the best constant answer in the group.

    Raises:
        ValueError: If limit is below 1, or the model has other classes than the data.
    """
    check_limit(limit)
    if model.config.n_classes != data.n_classes:
        raise ValueError(f"the data have {data.n_classes} classes, the model tells {model.config.n_classes} apart")
    answers = predictions(model, data, limit)
    labels = data.examples("test").labels[: len(answers)]
    right = answers == labels
    share = float(right.mean())
    return {
        "accuracy": share,
        "standard_error": math.sqrt(share * (1 - share) / len(right)),
        "examples": len(right),
        "baselines_accuracy": baselines(data),
        "groups": {name: _rows(of, right, labels) for name, of in groups(data, len(right)).items()},
    }


@torch.inference_mode()
def judge_labels(model: LanguageModel, data: Diagnostic, limit: int | None = None) -> dict[str, Any]:
    """Accuracy at the labelled tokens of a diagnostic's test sequences, the baselines, and accuracy by position.

    Args:
        model: The model, in evaluation mode.
        data: Whose ``setup()`` was called.
        limit: Sequences that are judged, the first ones; None means all.

    Returns:
        As :func:`judge`; the standard error is that of the mean over sequences, whose tokens are not independent.

    Raises:
        ValueError: If limit is below 1, or the model has too few tokens.
    """
    check_limit(limit)
    if data.vocab_size is not None and model.config.vocab_size < data.vocab_size:
        raise ValueError(f"{data.name} has {data.vocab_size} tokens, the model {model.config.vocab_size}")
    device = next(model.parameters()).device
    labels = data.judged["test"].labels[:limit]
    answers = [
        model(data.judged["test"].batch(rows)["x"].to(device))[0].argmax(-1).cpu().numpy()
        for rows in np.array_split(np.arange(len(labels)), -(-len(labels) // data.batch_size))
    ]
    asked, right = labels != IGNORED, np.concatenate(answers) == labels
    row, position = np.nonzero(asked)
    share = float(right[asked].mean())
    # of a ratio of sums over sequences, which may ask for unequally many
    residuals = ((right - share) * asked).sum(1)
    by_position = _quantiles(position)
    return {
        "accuracy": share,
        "standard_error": float(np.sqrt(np.square(residuals).sum()) / len(row)),
        "examples": len(labels),
        "baselines_accuracy": data.baselines(),
        "groups": {"position": _rows(by_position, right[asked], labels[asked])} if len(by_position) > 1 else {},
    }


def check_limit(limit: int | None) -> None:
    """Raises ValueError where a number of examples is below 1."""
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")


def groups(data: ClassificationData, count: int) -> dict[str, dict[str, NDArray[np.int64]]]:
    """The first ``count`` test examples, divided in several ways: by kind of group and group their indices."""
    examples = data.examples("test")
    if not isinstance(examples, Sequences):
        return {}
    lengths = np.minimum(np.diff(examples.data.bounds), examples.longest)[:count]
    found = {"length": _quantiles(lengths)}
    if isinstance(data, ListOps):
        depth = depths(examples.data)[:count]
        found["depth"] = {str(one): np.flatnonzero(depth == one) for one in np.unique(depth).tolist()}
        first = examples.data.tokens[examples.data.bounds[:-1]][:count]
        found["root operator"] = {TOKENS[one]: np.flatnonzero(first == one) for one in np.unique(first).tolist()}
    return {name: of for name, of in found.items() if len(of) > 1}


def depths(trees: Ragged) -> NDArray[np.int64]:
    """Nodes from the root of every expression to its deepest digit, int64 ``(n,)``."""
    steps = np.zeros(len(TOKENS), dtype=np.int64)
    # the last token closes a bracket, those between it and the digits open one
    steps[10:], steps[-1] = 1, -1
    open_brackets = np.cumsum(steps[trees.tokens])
    # every expression closes what it opens, so each begins at none
    return np.maximum.reduceat(open_brackets, trees.bounds[:-1]) + 1


def baselines(data: ClassificationData) -> dict[str, float]:
    """Accuracies on all test examples without a model of sequences, found once and kept in the cache folder.

    Those of :meth:`seqzoo.train.data.lra.ClassificationData.baselines`, for ListOps with what those reach who know the
    top levels of a tree, computed for the law at hand; and a linear classifier that sees no order
    (:func:`linear_accuracy`).
    """
    description = data.description()
    of = {
        "format": FORMAT,
        "data": type(data).__name__,
        "law": list(data.law) if isinstance(data, ListOps) else None,
        **{name: value for name, value in description.items() if name.endswith("_digest")},
    }
    key = hashlib.blake2b(json.dumps(of, sort_keys=True).encode(), digest_size=8).hexdigest()
    path = data_folder().parent / "baselines" / f"{type(data).__name__}-{key}.json"
    if path.is_file():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["of"] == of:
                return {str(name): float(value) for name, value in kept["accuracies"].items()}
        except (ValueError, LookupError, TypeError, AttributeError):
            # a damaged cache is written anew
            pass
    found = {**data.baselines(), _linear_name(data): linear_accuracy(data)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, what="the cache of baselines") as file:
        file.write(json.dumps({"of": of, "accuracies": found}, indent=1) + "\n")
    return found


def linear_accuracy(data: ClassificationData) -> float:
    """The test accuracy of logistic regression: on how often each token occurs, or on the numbers at all positions.

    Fitted on at most 10,000 training examples by L-BFGS, on standardised features with an L2 penalty of 1e-3, from
    zeros, so that the result is always the same.
    """
    x, y = _features(data, "training", FITTED)
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-3)
    x = (x - mean) / deviation
    weight = torch.zeros(data.n_classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(data.n_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), y) + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        test, labels = _features(data, "test", None)
        return float((F.linear((test - mean) / deviation, weight, bias).argmax(-1) == labels).float().mean())


def _features(data: ClassificationData, split: str, most: int | None) -> tuple[Tensor, Tensor]:
    """float32 ``(n, features)`` and classes of the first examples of a split."""
    examples = data.examples(split)
    count = min(len(examples.labels), most or len(examples.labels))
    parts = [
        _of_batch(examples.batch(np.arange(start, min(start + PIECE, count), dtype=np.int64)), data)
        for start in range(0, count, PIECE)
    ]
    return torch.cat(parts), torch.from_numpy(examples.labels[:count].copy())


def _of_batch(batch: Batch, data: ClassificationData) -> Tensor:
    x = batch["x"]
    if data.vocab_size is None:
        return x.flatten(1)
    inside = torch.ones_like(x, dtype=torch.float32)
    if "lengths" in batch:
        inside = (torch.arange(x.shape[1]) < torch.tensor(batch["lengths"])[:, None]).float()
    counts = torch.zeros(len(x), data.vocab_size).scatter_add_(1, x, inside)
    # of pairs all first ones stand before all second ones
    return torch.cat(counts.chunk(2), dim=1) if data.pairs else counts


def _linear_name(data: ClassificationData) -> str:
    return "linear on positions" if data.vocab_size is None else "linear on counts of tokens"


def _quantiles(values: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Groups of about equally many by size; equal values are never parted."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, GROUPS + 1)[1:-1], method="lower"))
    place = np.searchsorted(edges, values, side="left")
    found = {}
    for one in np.unique(place).tolist():
        indices = np.flatnonzero(place == one)
        low, high = int(values[indices].min()), int(values[indices].max())
        found[f"{low} to {high}" if low < high else f"{low}"] = indices
    return found


def _rows(of: Mapping[str, NDArray[np.int64]], right: NDArray[np.bool_], labels: NDArray[np.int64]) -> list[dict]:
    return [
        {
            "group": name,
            "examples": len(indices),
            "accuracy": float(right[indices].mean()),
            "most frequent class": float(np.bincount(labels[indices]).max() / len(indices)),
        }
        for name, indices in of.items()
    ]


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of :func:`judge`: the model among the baselines, the best first, and each kind of groups."""
    spread = f" ± {100 * found['standard_error']:.2f}"
    entries = [(NAMES.get(name, name), value, "") for name, value in found["baselines_accuracy"].items()]
    entries.append((f"**this model**, {found['examples']} test examples", found["accuracy"], spread))
    lines = ["| | accuracy, % |", "|---|---|"]
    lines += [f"| {name} | {100 * value:.2f}{more} |" for name, value, more in sorted(entries, key=lambda row: -row[1])]
    for kind, rows in found["groups"].items():
        lines += ["", f"| {kind} | examples | accuracy, % | most frequent class, % |", "|---|---|---|---|"]
        lines += [
            f"| {row['group']} | {row['examples']} | {100 * row['accuracy']:.2f} | "
            f"{100 * row['most frequent class']:.2f} |"
            for row in rows
        ]
    return "\n".join(lines) + "\n"


def draw(found: Mapping[str, Any]) -> bytes:
    """The accuracy of every group, with the model's own and the baselines as level lines; a PNG file."""
    kinds = found["groups"] or {"all": []}
    figure = Figure(figsize=(4.2 * len(kinds) + 2.6, 4.4), layout="constrained")
    for place, (kind, rows) in enumerate(kinds.items()):
        axes = figure.add_subplot(1, len(kinds), place + 1)
        for index, row in enumerate(rows):
            error = math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / row["examples"])
            axes.bar(index, row["accuracy"], yerr=error, color="tab:blue", alpha=0.75, capsize=3)
        axes.set_xticks(range(len(rows)), [row["group"] for row in rows], rotation=20)
        axes.axhline(found["accuracy"], color="tab:red", label=f"this model: {found['accuracy']:.3f}")
        ordered = sorted(found["baselines_accuracy"].items(), key=lambda item: item[1])
        for index, (name, level) in enumerate(ordered):
            style = ("--", "-.", ":")[index % 3]
            words = f"{NAMES.get(name, name)}: {level:.3f}"
            axes.axhline(
                level, color=f"{0.2 + 0.5 * index / len(ordered):.2f}", linewidth=1, linestyle=style, label=words
            )
        axes.set(xlabel=kind, ylabel="accuracy", ylim=(0, 1.02))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right upper")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
