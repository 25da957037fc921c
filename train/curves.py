"""The picture of the loss curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float | None]]


def draw_curves(rows: Rows, baselines: Mapping[str, float], final: tuple[int, float] | None, title: str) -> bytes:
    """Draws bits per byte over steps, with the baselines as level lines.

    Args:
        rows: Of the table of metrics.
        baselines: Names and bits per byte.
        final: Step and bits per byte on all validation bytes, where known.
        title: Of the picture.

    Returns:
        A PNG file.
    """
    figure = Figure(figsize=(9.0, 5.5), layout="constrained")
    axes = figure.add_subplot()
    training = _points(rows, "train_bpb")
    validation = _points(rows, "validation_bpb")
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.35, linewidth=1.0, label="training")
        axes.plot(*zip(*_smooth(training), strict=True), color="tab:blue", linewidth=1.8, label="training, smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="tab:orange", markersize=3.5, label="validation (part)")
    if final is not None:
        axes.plot(*final, "*", color="tab:red", markersize=13, label=f"validation (all): {final[1]:.3f}")
    values = [value for _, value in [*training, *validation]] or [8.0]
    for (name, level), style in zip(baselines.items(), _styles(len(baselines)), strict=True):
        axes.axhline(level, color="0.35", linewidth=1.0, linestyle=style, label=f"{name}: {level:.3f}")
    low = min(values + list(baselines.values()) + ([] if final is None else [final[1]]))
    axes.set_ylim(max(0.0, low - 0.3), min(max(values), 5.0) + 0.3)
    axes.set(xlabel="step", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", fontsize=8.5)
    return _png(figure)


def draw_accuracy_curves(
    rows: Rows, baselines: Mapping[str, float], final: tuple[int, float] | None, title: str
) -> bytes:
    """Draws a classifier's losses over steps, and below them its accuracy, with the baselines as level lines.

    Args:
        rows: Of the table of metrics.
        baselines: Names and accuracies.
        final: Step and accuracy on all validation examples, where known.
        title: Of the picture.

    Returns:
        A PNG file.
    """
    figure = Figure(figsize=(9.0, 7.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    training, judged = _points(rows, "train_loss"), _points(rows, "validation_loss")
    if training:
        above.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.35, linewidth=1.0, label="training")
        above.plot(*zip(*_smooth(training), strict=True), color="tab:blue", linewidth=1.8, label="training, smoothed")
    if judged:
        above.plot(*zip(*judged, strict=True), "o-", color="tab:orange", markersize=3.5, label="validation")
    accuracy = _points(rows, "validation_accuracy")
    if accuracy:
        below.plot(*zip(*accuracy, strict=True), "o-", color="tab:orange", markersize=3.5, label="validation")
    if final is not None:
        below.plot(*final, "*", color="tab:red", markersize=13, label=f"validation (model): {final[1]:.4f}")
    for (name, level), style in zip(baselines.items(), _styles(len(baselines)), strict=True):
        below.axhline(level, color="0.35", linewidth=1.0, linestyle=style, label=f"{name}: {level:.4f}")
    above.set(ylabel="cross entropy", title=title)
    below.set(xlabel="step", ylabel="accuracy")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            # beside the axes: the lines of many baselines leave no free place
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8.5)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _points(rows: Rows, column: str) -> list[tuple[float, float]]:
    points = [(row["step"], row[column]) for row in rows]
    return [(step, value) for step, value in points if step is not None and value is not None]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean around each point, over a twentieth of the curve.

    Narrower towards the ends, so that it does not lag, but not as narrow as to follow a single value.
    """
    width = len(points) // 40
    smooth = []
    for index, (step, _) in enumerate(points):
        reach = max(min(width, index, len(points) - 1 - index), width // 4)
        near = [value for _, value in points[max(index - reach, 0) : index + reach + 1]]
        smooth.append((step, sum(near) / len(near)))
    return smooth


def _styles(count: int) -> list[str]:
    return [("-", "--", "-.", ":")[index % 4] for index in range(count)]
