"""Short training, for small tasks that tell models apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from seqzoo.models import LanguageModel, SequenceClassifier
from seqzoo.parameters import parameter_groups
from seqzoo.train.data.windows import IGNORED
from seqzoo.train.schedule import rate_factor

# at this accuracy where it is trained nothing more is to be learned
SOLVED = 0.999
# peak of the learning rate
RATE = 3e-3
# updates between two looks at what is learned
PATIENCE = 100

Draw = Callable[[int], tuple[Tensor, Tensor]]


def train_briefly(
    model: LanguageModel | SequenceClassifier,
    draw: Draw,
    steps: int,
    *,
    rate: float = RATE,
    learned: Callable[[], float] | None = None,
) -> int:
    """Trains by AdamW with a cosine schedule after a short warm-up; the updates that were made.

    Args:
        model: What is trained, in place.
        draw: Makes a step's batch from its number.
        steps: Updates, at most.
        rate: Peak of the learning rate.
        learned: Measures accuracy now and then; training ends where nothing more is to be learned. None never ends it.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, rate, 0.1), betas=(0.9, 0.95))
    peaks = [group["lr"] for group in optimizer.param_groups]
    warmup = min(100, steps // 10)
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_factor(step, warmup, steps)
        loss = cast("Tensor", model.loss(*draw(step)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if learned is not None and (step + 1) % PATIENCE == 0 and learned() >= SOLVED:
            return step + 1
    return steps


@torch.inference_mode()
def accuracy(model: LanguageModel | SequenceClassifier, batch: tuple[Tensor, Tensor]) -> float:
    """The share of labels that the model's first choice hits."""
    x, labels = batch
    model.eval()
    found = model(x)
    logits = found[0] if isinstance(found, tuple) else found
    model.train()
    asked = labels != IGNORED
    return float((logits.argmax(-1) == labels)[asked].float().mean())
