"""``seqzoo list``: the zoo as a table, from the registry."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from seqzoo.mixer import GUARANTEES, SequenceMixer, create, list_mixers, registration

WIDTH = 512
HEADER = ("name", "paper", "year", f"parameters at d_model {WIDTH}", "state", "keeps")


def rows() -> list[tuple[str, str, int, int, str, str]]:
    """A row a registered mixer, with the columns of ``HEADER``; the state counts numbers a sequence carries."""
    found = []
    for name in list_mixers():
        entry = registration(name)
        with torch.device("meta"):
            mixer = create(name, d_model=WIDTH)
        size = sum(parameter.numel() for parameter in mixer.parameters())
        found.append((name, entry.paper, entry.year, size, _state(mixer), _words(entry.keeps)))
    return found


def _state(mixer: SequenceMixer) -> str:
    one, two = mixer.state_size(1024), mixer.state_size(2048)
    return f"{one:,}" if one == two else f"{(two - one) / 1024:,.0f} a token"


def _words(keeps: tuple[str, ...]) -> str:
    lost = [name for name in GUARANTEES if name not in keeps]
    return "all" if not lost else "all but " + ", ".join(lost)


def markdown() -> str:
    """The table as README.md holds it."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for name, paper, year, size, state, keeps in rows():
        arxiv = registration(name).arxiv
        title = f"[{paper}](https://arxiv.org/abs/{arxiv})" if arxiv else paper
        lines.append(f"| `{name}` | {title} | {year} | {size:,} | {state} | {keeps} |")
    return "\n".join(lines)


def plain() -> str:
    """The table in aligned columns."""
    table = [HEADER] + [(n, p, str(y), f"{s:,}", state, keeps) for n, p, y, s, state, keeps in rows()]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", _legend()])


def _legend() -> str:
    return "guarantees: " + "; ".join(f"{name} {words}" for name, words in GUARANTEES.items())


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser("seqzoo list", description="Prints the zoo as a table.")
    parser.add_argument("--markdown", action="store_true", help="as README.md holds it")
    if parser.parse_args(arguments).markdown:
        print(markdown())  # noqa: T201 - a command prints
        return 0
    # which stands above this module
    from seqzoo.models.presets import table

    print(plain(), table(), sep="\n\n")  # noqa: T201
    return 0
