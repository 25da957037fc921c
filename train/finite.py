"""Finds the layer that made a loss NaN or infinite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class NonFiniteLoss(RuntimeError):
    """A training loss is NaN or infinite."""


def check_finite(loss: Tensor, model: nn.Module, *inputs: Tensor, step: int, batch: int, **options: Any) -> None:
    """Raises unless a loss is finite.

    Args:
        loss: A scalar.
        model: What made it.
        inputs: With which to call the model again, to find the layer.
        step: The update, for the message.
        batch: The number of the batch, from 0, likewise.
        options: Arguments by name with which to call the model again.

    Raises:
        NonFiniteLoss: Names step and batch, and the parameter or the layer that is not finite first.
    """
    if torch.isfinite(loss):
        return
    raise NonFiniteLoss(
        f"the loss of step {step + 1} is {loss.item()}; {first_culprit(model, *inputs, **options)}; "
        f"it is batch {batch + 1}, of inputs {tuple(inputs[0].shape)}; "
        "a lower learning rate (--model.lr) or a longer warm-up (--model.warmup_steps) may help"
    )


def first_culprit(model: nn.Module, *inputs: Tensor, **options: Any) -> str:
    """Words for where a model's numbers cease to be finite: a parameter, else the first module that runs."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the parameter {name} is not finite, so the update before made it so"
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if not found and not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                found.append(f"{name} ({type(module).__name__})")

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        # compiled layers would not call the hooks
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(*inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
    return f"the first layer whose output is not finite is {found[0]}" if found else "every layer's output is finite"
