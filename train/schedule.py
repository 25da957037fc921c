"""The learning rate as a function of the step alone."""

from __future__ import annotations

import math


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """The factor on the learning rate of update ``step``, which counts from 0.

    It rises linearly to 1 over ``warmup_steps`` and then falls along a cosine to nearly 0 at ``total_steps``. The rise
    does not depend on ``total_steps``, so it may become known during the rise.

    Args:
        step: The update, from 0.
        warmup_steps: Updates of the rise.
        total_steps: Updates of the whole run; at most 0 means that it has no known end, and the rate stays at 1.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if total_steps <= 0:
        return 1.0
    done = (step - warmup_steps + 1) / (max(total_steps - warmup_steps, 1) + 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
