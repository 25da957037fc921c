"""Configuration files: finding them by their short names, and combining a task with a model."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from seqzoo.mixer import nearest

if TYPE_CHECKING:
    from importlib.abc import Traversable

# the configurations of the quickstart, and what each is there to name
QUICKSTART = {
    "task/stdlib": ("model.class_path", "data.class_path"),
    "model/min_gru": ("model.init_args.config.pattern",),
}


class ConfigurationError(ValueError):
    """A configuration file or an option is wrong; the message says which and what is expected."""


class _Loader(yaml.SafeLoader):
    """YAML that reads ``1e-3`` as a number, as its version 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def shipped() -> dict[str, Traversable]:
    """The configuration files that come with the package, by short name: ``task/stdlib``."""
    found: dict[str, Traversable] = {}

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                found[prefix + entry.name.removesuffix(".yaml")] = entry

    walk(importlib.resources.files("seqzoo.configs"), "")
    return dict(sorted(found.items()))


def load(name: str) -> dict[str, Any]:
    """One configuration, by short name or path.

    Raises:
        ConfigurationError: If there is no such file, or it holds something else than a mapping.
    """
    known = shipped()
    short = name.removesuffix(".yaml")
    path = Path(name).expanduser()
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif short in known:
        text = known[short].read_text(encoding="utf-8")
    else:
        raise ConfigurationError(
            f"there is no configuration {name!r}, neither a file nor shipped; {nearest(short, known)}"
        )
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the configuration {name!r} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(
            f"the configuration {name!r} must be a mapping of options, got {type(values).__name__}"
        )
    return values


def combine(names: Sequence[str]) -> dict[str, Any]:
    """Loads configurations one over the other; what names no data or no model gets the quickstart's.

    The option ``name``, of which the run's folder is named, is by default made of the configurations' names.
    """
    loaded = [(name, load(name)) for name in names]
    for name, wanted in reversed(QUICKSTART.items()):
        given = [option for _, values in loaded for option, _ in flatten(values)]
        if not all(any(option.startswith(one) for option in given) for one in wanted):
            loaded.insert(0, (name, load(name)))
    merged: dict[str, Any] = {}
    for _, values in loaded:
        merged = merge(merged, values)
    merged.setdefault("name", "-".join(re.sub(r"\.ya?ml$", "", Path(name).name) for name, _ in loaded))
    return merged


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge entry by entry; anything else above replaces what is below.

    So does the description of an object of another class, since options of one class mean nothing to another.
    """
    if "class_path" in below and below["class_path"] != above.get("class_path", below["class_path"]):
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested mappings with dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML text of plain data, in the given order."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000)
