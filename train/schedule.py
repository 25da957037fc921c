"""The learning rate as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable

# the share of a run in which "wsd" falls
FALL = 0.2

# of the share of the steps behind the warm-up that are done, from 0 to 1
_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
    "wsd": lambda done: 1.0 if done <= 1.0 - FALL else 1.0 - math.sqrt((done - 1.0 + FALL) / FALL),
    "rex": lambda done: (1.0 - done) / (0.5 + 0.5 * (1.0 - done)),
    "constant": lambda done: 1.0,
}
# that of the schedule-free optimiser has no fall, for its average of weights takes that place
_SHAPES["schedule_free"] = _SHAPES["constant"]
SCHEDULES = (*_SHAPES, "inverse_sqrt", "refined")


def rate_factor(
    step: int,
    warmup_steps: int,
    total_steps: int,
    schedule: str = "cosine",
    refined: Callable[[float], float] | None = None,
) -> float:
    """The factor on the learning rate of update ``step``, which counts from 0.

    It rises linearly to 1 over ``warmup_steps``. Then it falls to nearly 0 at ``total_steps``: along a ``"cosine"``
    (https://arxiv.org/abs/1608.03983), a line (``"linear"``), along ``"rex"``, which stays high for longer
    (https://arxiv.org/abs/2107.04197), or all in the last fifth, as one minus a square root (``"wsd"``,
    https://arxiv.org/abs/2405.18392); ``"constant"`` stays, and ``"inverse_sqrt"`` falls with the root of the steps,
    whatever their number. ``"schedule_free"`` stays too: its optimiser averages the weights instead
    (https://arxiv.org/abs/2405.15682). The rise does not depend on ``total_steps``, so it may become known during it.

    ``"refined"`` is another run's (:class:`seqzoo.train.refinement.RefinedSchedule`), from its first step to its last
    and with its own rise, which that of ``warmup_steps`` multiplies; 0 leaves it as it is.

    Args:
        step: The update, from 0.
        warmup_steps: Updates of the rise.
        total_steps: Updates of the whole run; at most 0 means that it has no known end, and the rate stays at 1.
        schedule: One of ``SCHEDULES``.
        refined: For ``"refined"``, the factor where a share of the run is over.

    Raises:
        ValueError: If a refined schedule lacks ``refined`` or a number of steps.
    """
    if schedule == "refined":
        if refined is None or total_steps <= 0:
            raise ValueError(
                f"schedule='refined' needs refined_from and a number of steps (trainer.max_steps), got {total_steps}"
            )
        return min((step + 1) / (warmup_steps + 1), 1.0) * refined((step + 1) / (total_steps + 1))
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "inverse_sqrt":
        return math.sqrt((warmup_steps + 1) / (step + 1))
    if total_steps <= 0:
        return 1.0
    done = (step - warmup_steps + 1) / (max(total_steps - warmup_steps, 1) + 1)
    # rounding must not leave a rate below zero
    return max(_SHAPES[schedule](min(done, 1.0)), 0.0)
