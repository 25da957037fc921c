"""Learning rates from the gradients of an earlier run: "When, Why and How Much? Adaptive Learning Rate Scheduling by
Refinement", https://arxiv.org/abs/2310.07831.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seqzoo.train.metrics_table import read_metrics

NORM = "gradient_l1"
# the share of the run over which the median is taken
SMOOTHING = 0.1
FEWEST = 10


class RefinedSchedule:
    """The factor on the learning rate over a run, from 0 to 1 with its greatest value 1.

    Args:
        places: Where in the run the values are, from 0 to 1, increasing.
        values: The factors there; between them it is linear.
    """

    def __init__(self, places: NDArray[np.float64], values: NDArray[np.float64]) -> None:
        self.places, self.values = places, values

    def __call__(self, done: float) -> float:
        """The factor where a share ``done`` of the run is over."""
        return float(np.interp(done, self.places, self.values))

    @classmethod
    def of_run(cls, run: Path) -> RefinedSchedule:
        """The schedule that the gradient norms in a run's ``metrics.csv`` ask for.

        Raises:
            ValueError: If there is no such file, or it holds too few norms.
        """
        path = run / "metrics.csv"
        if not path.is_file():
            raise ValueError(f"refined_from must be the folder of a run, which has a metrics.csv, got {str(run)!r}")
        rows = [(row["step"], row.get(NORM)) for row in read_metrics(path)]
        found = [(step, norm) for step, norm in rows if step is not None and norm is not None]
        if len(found) < FEWEST:
            raise ValueError(
                f"{path} holds {len(found)} gradient norms (column {NORM}); a schedule needs at least {FEWEST}: take a "
                "longer run, or one with a smaller trainer.log_every_n_steps"
            )
        steps = np.array([step for step, _ in found])
        return cls(steps / steps[-1], refine([norm for _, norm in found]))


def refine(norms: Sequence[float], smoothing: float = SMOOTHING, power: float = 1.0) -> NDArray[np.float64]:
    """The schedule that is best for a run in which gradients were as large as this.

    The norms are smoothed by a median filter, to G_t. Weights are w_t = G_t^-power, and the factor at t is
    w_t (w_{t+1} + ... + w_T), divided by the greatest: Algorithm 2, for Adam, with norms that sum absolute values and
    a power of 1. Algorithm 1, for gradient descent, takes the Euclidean norms and a power of 2. Norms that stay the
    same give the linear schedule.

    Args:
        norms: Positive, in the order of the steps.
        smoothing: The filter's width as a share of all norms.
        power: Of the norms in the weights.

    Returns:
        As many factors, from 0 to 1; the last is 0.

    Raises:
        ValueError: If a norm is not positive and finite.
    """
    values = np.asarray(norms, dtype=np.float64)
    wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if wrong.size:
        raise ValueError(
            f"gradient norms must be positive and finite, number {wrong[0]} is {values[wrong[0]]}; refine from a run "
            "that has not diverged"
        )
    weights = _median_filter(values, smoothing) ** -power
    behind = np.append(np.cumsum(weights[::-1])[::-1][1:], 0.0)
    factors = weights * behind
    return factors / factors.max()


def _median_filter(values: NDArray[np.float64], smoothing: float) -> NDArray[np.float64]:
    """Medians of an odd width; before the first stands the first, behind the last the values mirrored."""
    reach = min(math.floor(smoothing * values.size) // 2, values.size - 1)
    padded = np.concatenate([np.repeat(values[:1], reach), values, values[-2 : -2 - reach : -1]])
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)
