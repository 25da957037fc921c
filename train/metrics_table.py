"""metrics.csv: a row each time something is measured, on the disk at once."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from seqzoo.hub.files import WriteError, atomic_file

COLUMNS = (
    "step",
    "train_loss",
    "train_bpb",
    "validation_bpb",
    "lr",
    "bytes_per_second",
    "seconds",
    "packing",
    "validation_perplexity",
    "gradient_norm",
    "gradient_l1",
)
CLASSIFICATION_COLUMNS = (
    "step",
    "train_loss",
    "validation_loss",
    "validation_accuracy",
    "lr",
    "tokens_per_second",
    "seconds",
    "packing",
    "gradient_norm",
    "gradient_l1",
)


class MetricsTable(Logger):
    """Appends rows to a CSV file of fixed columns; what was not measured is empty.

    Args:
        path: The file.
        keep: Rows after this step are removed first: they belong to work that the checkpoint does not hold and that
            is about to be done again.
        columns: Of the file.
    """

    def __init__(self, path: Path, keep: int = 0, columns: tuple[str, ...] = COLUMNS) -> None:
        super().__init__()
        self.path = path
        self.columns = columns
        lines: list[tuple[str, ...]] = [columns]
        for row in read_metrics(path):
            if (row["step"] or 0) <= keep:
                lines.append(tuple(_cell(row, name) for name in columns))
        with atomic_file(path, what="the table of metrics") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)

    @property
    def name(self) -> str:
        """None is kept by this logger; Lightning asks for one."""
        return "metrics"

    @property
    def version(self) -> str:
        """Likewise."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration lies beside the file."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends a row of those metrics that have a column."""
        values = {name: _text(value) for name, value in metrics.items() if name in self.columns}
        if not values or step is None:
            return
        row = {"step": str(step), **values}
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(row.get(name, "") for name in self.columns)
        except OSError as error:
            raise WriteError(error.errno, f"could not add a row to {self.path}: {error.strerror}") from error


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The rows of a file, empty cells as None; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = []
    for row in csv.DictReader(io.StringIO(whole)):
        values = {name: float(value) if value else None for name, value in row.items()}
        if values.get("step") is not None:
            rows.append(values)
    return rows


def _cell(row: Mapping[str, float | None], name: str) -> str:
    # a table of an earlier version has fewer columns
    value = row.get(name)
    return "" if value is None else _text(value)


def _text(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(float(value))
