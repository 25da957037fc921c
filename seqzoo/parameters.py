"""Optimiser groups from what the modules say of their parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from seqzoo.mixer import nearest


def parameter_groups(model: nn.Module, lr: float | Tensor, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups the parameters of a model for a PyTorch optimiser, with the options that each module asks for.

    A module's ``parameter_options()`` maps names of its parameters to ``weight_decay`` (absolute) and ``lr_scale``
    (times ``lr``). Without an option, matrices decay and everything of fewer dimensions (norms, biases) does not. A
    parameter that several modules share counts once, with the options of the first.

    Args:
        model: Any module.
        lr: Learning rate of parameters without ``lr_scale``.
        weight_decay: Of parameters without their own.

    Returns:
        Dictionaries of ``params``, ``names``, ``lr`` and ``weight_decay``, in a fixed order.

    Raises:
        ValueError: If an option names no parameter, or is not known.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        options = getattr(module, "parameter_options", dict)()
        for name, wanted in options.items():
            if name not in own:
                raise ValueError(f"{type(module).__name__} has no parameter {name!r}; {nearest(name, own)}")
            for option in wanted:
                if option not in ("weight_decay", "lr_scale"):
                    raise ValueError(
                        f"{type(module).__name__}.{name} asks for {option!r}; known are weight_decay, lr_scale"
                    )
        for name, parameter in own.items():
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            wanted = options.get(name, {})
            decay = wanted.get("weight_decay", weight_decay if parameter.dim() >= 2 else 0.0)
            scale = wanted.get("lr_scale", 1.0)
            fresh = {"params": [], "names": [], "lr": lr * scale, "weight_decay": decay}
            # by the scale: a rate that is a tensor equals none but itself
            group = groups.setdefault((scale, decay), fresh)
            group["params"].append(parameter)
            group["names"].append(f"{prefix}.{name}" if prefix else name)
    return [groups[key] for key in sorted(groups, reverse=True)]
