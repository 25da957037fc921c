"""Which parameters the optimiser treats alike, for a table at the start of a run and in its folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from torch import nn

EXAMPLES = 3


def describe_groups(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups of an optimiser as plain data: ``lr``, ``weight_decay``, ``tensors``, ``parameters``, ``names``.

    Args:
        model: Whose parameters they are.
        groups: As :func:`seqzoo.parameter_groups` returns them.

    Raises:
        ValueError: If a parameter that is trained is in no group, in two, or not the model's; names it.
    """
    check_groups(model, groups)
    return [
        {
            "lr": float(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
            "tensors": len(group["params"]),
            "parameters": sum(parameter.numel() for parameter in group["params"]),
            "names": list(group["names"]),
        }
        for group in groups
    ]


def check_groups(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError unless every parameter of a model that is trained is in exactly one group, and no other is."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    times = dict.fromkeys(names, 0)
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            if id(parameter) not in times:
                raise ValueError(
                    f"group {index} of the optimiser has a parameter of shape {tuple(parameter.shape)} that the model "
                    "does not train; groups hold the model's own parameters"
                )
            times[id(parameter)] += 1
    wrong = [f"{names[key]} is in {count}" for key, count in times.items() if count != 1]
    if wrong:
        raise ValueError(
            f"every parameter must be in one group of the optimiser: {', '.join(wrong[:EXAMPLES])}"
            + (f" and {len(wrong) - EXAMPLES} more" if len(wrong) > EXAMPLES else "")
        )


def groups_table(described: Sequence[Mapping[str, Any]]) -> Table:
    """The table that is shown at the start, a row a group and some names of each."""
    table = Table("group", "tensors", "parameters", "learning rate", "weight decay")
    table.add_column("for example", overflow="fold")
    for index, group in enumerate(described):
        # of layers that are alike one is enough
        kinds = {re.sub(r"\d+", "*", name): name for name in reversed(group["names"])}
        some = [*list(kinds.values())[: -EXAMPLES - 1 : -1], *(["..."] if len(kinds) > EXAMPLES else [])]
        row = (
            index,
            group["tensors"],
            f"{group['parameters']:,}",
            f"{group['lr']:.3g}",
            f"{group['weight_decay']:.3g}",
        )
        table.add_row(*map(str, row), ", ".join(some))
    return table
