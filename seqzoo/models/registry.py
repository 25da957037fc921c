"""The kinds of models, by the name under which a checkpoint tells its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from seqzoo.mixer import nearest

_kinds: dict[str, type[nn.Module]] = {}
_Model = TypeVar("_Model", bound=type[nn.Module])


def register_model(name: str) -> Callable[[_Model], _Model]:
    """Class decorator under which a kind of model can be saved and loaded.

    The class is built from one argument, an instance of its ``config_class`` (a dataclass that extends
    BackboneConfig), keeps it as ``config``, and has ``reset_parameters``.
    """

    def enter(model: _Model) -> _Model:
        if name in _kinds:
            raise ValueError(f"the name {name!r} is taken by {_kinds[name].__qualname__}")
        _kinds[name] = model
        return model

    return enter


def model_class(name: str) -> type[Any]:
    """The class of a kind of model.

    Raises:
        ValueError: If there is none of that name; the message gives the nearest.
    """
    if name not in _kinds:
        raise ValueError(f"there is no model {name!r}; {nearest(str(name), _kinds)}")
    return _kinds[name]


def model_name(model: nn.Module) -> str:
    """The name of a model's kind.

    Raises:
        TypeError: If its class is not registered.
    """
    for name, known in _kinds.items():
        if type(model) is known:
            return name
    raise TypeError(f"{type(model).__name__} is none of the models that can be saved: {', '.join(sorted(_kinds))}")
