"""Checks of the options that layers take."""

from __future__ import annotations

import math
import operator
from typing import Any


def check_count(name: str, value: Any) -> int:
    """A positive integer, NumPy's among them.

    Raises:
        ValueError: If it is none.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if isinstance(value, bool) or count < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return count


def check_number(name: str, value: Any, *, above: float = -math.inf) -> float:
    """A finite number greater than ``above``.

    Raises:
        ValueError: If it is none.
    """
    if not _is_number(value) or not math.isfinite(value) or value <= above:
        bound = "" if above == -math.inf else f" greater than {above}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return value


def check_pair(name: str, value: Any) -> tuple[float, float]:
    """Two numbers, infinite ones among them.

    Raises:
        ValueError: If it is anything else.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(_is_number(end) for end in value):
        raise ValueError(f"{name} must be two numbers, got {value!r}")
    return value[0], value[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_flags(**flags: Any) -> None:
    """True or False, each.

    Raises:
        ValueError: If one is neither.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def scaled_width(d_model: int, name: str, factor: Any) -> int:
    """``factor * d_model``, an integer but for the rounding of a factor such as 464 / 112.

    Raises:
        ValueError: If it is no positive integer.
    """
    exact = check_number(name, factor, above=0) * d_model
    width = round(exact)
    if width < 1 or abs(width - exact) > 1e-9 * exact:
        raise ValueError(f"{name} * d_model must be a positive integer, got {factor} * {d_model}")
    return width
