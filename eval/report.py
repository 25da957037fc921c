"""``seqzoo report RUN...``: one page of HTML and a table in Markdown that compare runs."""

from __future__ import annotations

import argparse
import base64
import csv
import html
import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from seqzoo.hub.files import atomic_file
from seqzoo.hub.saving import CONFIG
from seqzoo.models.registry import model_class
from seqzoo.train.run_folder import RunFolder, RunFolderError

# tokens after which the state's size is told
LENGTHS = (1024, 65536)
# of the options, what two runs differ in anyway
OF_THE_RUN = ("name", "runs", "seed_everything", "model.init_args.config.format")
MISSING = "-"
# what seqzoo eval leaves beside its numbers
PICTURES = ("context.png", "accuracy.png", "recall.png", "state-tracking.png")


@dataclass
class Run:
    """What the folder of a run holds."""

    folder: RunFolder
    options: dict[str, Any]
    environment: dict[str, Any]
    report: dict[str, Any]
    metrics: dict[str, list[tuple[float, float]]]
    evaluation: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    sample: str = ""
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.path.resolve().name


def read_run(path: Path) -> Run:
    """Reads the folder of a run.

    Raises:
        RunFolderError: If it is none, or a file in it is damaged.
    """
    folder = RunFolder.open(path)
    try:
        options = yaml.safe_load(folder.configuration.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RunFolderError(f"{folder.configuration} is damaged: {error}") from error
    if not isinstance(options, dict):
        raise RunFolderError(f"{folder.configuration} is damaged: it holds {type(options).__name__}, not options")
    run = Run(
        folder,
        flatten(options),
        _mapping(folder, folder.environment),
        _mapping(folder, folder.report),
        read_curves(folder.metrics),
        _mapping(folder, folder.path / "evaluation.json"),
    )
    for name in PICTURES:
        path = folder.path / name
        if path.is_file():
            run.pictures[name] = path.read_bytes()
    if folder.sample.is_file():
        run.sample = folder.sample.read_text(encoding="utf-8", errors="replace")
    run.sizes = read_sizes(folder)
    return run


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists stay as they are."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        found |= flatten(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return found


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The columns of a table of metrics over its steps; a last line that a kill cut short is left out.

    Raises:
        RunFolderError: If the table has no steps, or a cell is no number.
    """
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    found: dict[str, list[tuple[float, float]]] = {}
    for number, row in enumerate(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])), start=2):
        if "step" not in row:
            raise RunFolderError(f"{path} has no column 'step', its first line is {text.splitlines()[0]!r}")
        try:
            step = float(row.pop("step"))
            for name, cell in row.items():
                if cell:
                    found.setdefault(name, []).append((step, float(cell)))
        except (TypeError, ValueError) as error:
            raise RunFolderError(f"line {number} of {path} is damaged: {error}") from error
    return found


def read_sizes(folder: RunFolder) -> dict[str, int]:
    """Parameters, and the numbers that a sequence's state holds, of the model that a run left."""
    if not (folder.model / CONFIG).is_file():
        return {}
    values = _mapping(folder, folder.model / CONFIG)
    try:
        kind = model_class(values.pop("model"))
        # the meta device has shapes without memory
        with torch.device("meta"):
            model = kind(kind.config_class.from_dict(values))
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{folder.model / CONFIG} does not fit this version of SeqZoo: {error}; use the version that made it"
        ) from error
    sizes = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    if hasattr(model, "state_size"):
        sizes |= {f"state after {length} tokens": model.state_size(length) for length in LENGTHS}
    return sizes


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The options in which runs differ, with the value of each."""
    names = sorted(set().union(*(run.options for run in runs)))
    rows = {name: [run.options.get(name) for run in runs] for name in names if name not in OF_THE_RUN}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def facts(run: Run) -> dict[str, Any]:
    """What the table tells of a run."""
    report, environment = run.report, run.environment
    found: dict[str, Any] = {"finished": "yes" if report.get("finished") else "no"}
    for name, value in report.items():
        if name.startswith(("validation_", "test_")) and not isinstance(value, Mapping):
            found[_words(name)] = value
    for name in ("steps", "model_of_step", "seconds"):
        found[_words(name)] = report.get(name)
    if "accuracy" in run.evaluation:
        found["evaluated accuracy (test)"] = run.evaluation["accuracy"]
    for context, value in run.evaluation.get("bits_per_byte", {}).items():
        found[f"evaluated bits per byte, context {context}"] = value
    rates = [name for name in report if name.endswith("_per_second")]
    found |= {_words(name): report[name] for name in rates}
    found |= run.sizes or {"parameters": report.get("parameters")}
    for name in ("device", "processor", "threads", "torch", "seqzoo"):
        found[name] = environment.get(name)
    git = environment.get("git")
    if git:
        found["commit"] = git["commit"][:10] + (" and changes" if git.get("changed") else "")
    return found


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of a table with a column for each run; the first row names them."""
    columns = [facts(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [["", *(run.name for run in runs)]]
    rows += [[name, *(_text(column.get(name)) for column in columns)] for name in names]
    for run, column in zip(runs, range(1, len(runs) + 1), strict=True):
        for name, value in flatten(_baselines(run)).items():
            words = f"baseline {name}"
            row = next((row for row in rows if row[0] == words), None)
            if row is None:
                row = [words, *[MISSING] * len(runs)]
                rows.append(row)
            row[column] = _text(value)
    return rows


def markdown(runs: Sequence[Run]) -> str:
    """The table and the differences of the options."""
    lines = [*_markdown_table(table(runs)), ""]
    found = differences(runs)
    if found:
        rows = [["option", *(run.name for run in runs)]]
        rows += [[name, *(_text(value) for value in values)] for name, values in found.items()]
        lines += _markdown_table(rows)
    elif len(runs) > 1:
        lines.append("The runs have the same options.")
    return "\n".join(lines) + "\n"


def page(runs: Sequence[Run]) -> str:
    """The whole report as one page of HTML, which loads nothing."""
    parts = [f"<h1>{html.escape(', '.join(run.name for run in runs))}</h1>", _html_table(table(runs))]
    parts += [f"<h2>{html.escape(_words(name))}</h2>{curves(runs, name)}" for name in _drawn(runs)]
    found = differences(runs)
    if len(runs) > 1:
        parts.append("<h2>options that differ</h2>")
        rows = [["option", *(run.name for run in runs)]]
        rows += [[name, *(_text(value) for value in values)] for name, values in found.items()]
        parts.append(_html_table(rows) if found else "<p>none</p>")
    for run in runs:
        for name, picture in run.pictures.items():
            words = html.escape(f"{name.removesuffix('.png')} of {run.name}")
            data = base64.b64encode(picture).decode()
            parts.append(f'<h2>{words}</h2><img alt="{words}" src="data:image/png;base64,{data}">')
    for run in runs:
        if run.sample:
            parts.append(f"<h2>sample of {html.escape(run.name)}</h2><pre>{html.escape(run.sample)}</pre>")
    for run in runs:
        options = "\n".join(f"{name}: {value}" for name, value in run.options.items())
        summary = f"all options of {html.escape(run.name)}"
        parts.append(f"<details><summary>{summary}</summary><pre>{html.escape(options)}</pre></details>")
    return _PAGE.format(title=html.escape(", ".join(run.name for run in runs)), body="\n".join(parts))


def curves(runs: Sequence[Run], name: str) -> str:
    """One column of the tables of metrics over the steps, as SVG."""
    figure = Figure(figsize=(8.5, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for run in runs:
        points = [(step, value) for step, value in run.metrics.get(name, []) if math.isfinite(value)]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=run.name, linewidth=1.4, marker="." if len(points) < 60 else None
            )
    axes.set(xlabel="step", ylabel=_words(name))
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8.5)
    file = io.StringIO()
    # ids that depend on nothing but the picture, and no date
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    drawn = file.getvalue()
    return drawn[drawn.index("<svg") :]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(prog="seqzoo report", description="Compare runs: curves, tables, options.")
    options.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    options.add_argument("--output", type=Path, default=Path("report.html"), help="the page (%(default)s)")
    return options


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        runs = [read_run(path) for path in options.runs]
        text = markdown(runs)
        beside = options.output.with_suffix(".md")
        if beside == options.output:
            raise ValueError(f"--output names the page of HTML, got {options.output}; the Markdown is put beside it")
        for path, content in ((options.output, page(runs)), (beside, text)):
            with atomic_file(path, what=path.name) as file:
                file.write(content)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.stderr.write(f"seqzoo report: {' '.join(str(error).split())}\n")
        return 1
    sys.stdout.write(f"{text}\n{options.output} and {beside}\n")
    return 0


def _mapping(folder: RunFolder, path: Path) -> dict[str, Any]:
    values = folder.read_json(path)
    if values is not None and not isinstance(values, dict):
        raise RunFolderError(f"{path} is damaged: it holds {type(values).__name__}, not names and values")
    return values or {}


def _baselines(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in run.report.items():
        if name.startswith("baselines") and isinstance(value, Mapping):
            found |= value
    return found


def _drawn(runs: Sequence[Run]) -> list[str]:
    """Columns worth a picture: of two values at least in some run."""
    names = dict.fromkeys(name for run in runs for name in run.metrics if name != "seconds")
    return [name for name in names if any(len(run.metrics.get(name, [])) > 1 for run in runs)]


def _words(name: str) -> str:
    return name.replace("bpb", "bits per byte").replace("_", " ")


def _text(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value if isinstance(value, str) else json.dumps(value, default=str)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _markdown_table(rows: Iterable[Sequence[str]]) -> list[str]:
    head, *rest = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *rest]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = [f"<tr>{cells}</tr>"]
    for first, *values in rest:
        cells = f"<th>{html.escape(first)}</th>" + "".join(f"<td>{html.escape(value)}</td>" for value in values)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }}
th, td {{ border: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap }}
th:first-child {{ text-align: left; font-weight: 500 }}
pre {{ background: #f5f5f5; padding: 0.8rem; overflow-x: auto }}
svg, img {{ max-width: 100%; height: auto }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
