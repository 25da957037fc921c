"""LRU: a complex diagonal recurrence whose factors begin on a ring."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from seqzoo.mixer import register
from seqzoo.modules.convolution import Output
from seqzoo.modules.diagonal import DiagonalMixer
from seqzoo.modules.options import check_number


@register("lru", paper="Resurrecting Recurrent Neural Networks for Long Sequences", arxiv="2303.06349", year=2023)
class LRU(DiagonalMixer):
    """LRU, https://arxiv.org/abs/2303.06349, section 3::

        a = exp(-exp(nu_log) + i exp(theta_log))
        x_t = a x_{t-1} + exp(gamma_log) B u_t
        y_t = Re(C x_t) + D u_t                out_t = glu(W gelu(y_t))

    ``|a| < 1`` whatever the parameters. ``gamma_log`` begins at ``sqrt(1 - |a|^2)``'s logarithm, with which the states
    of a stationary input have its variance.

    State: ``{"x": (B, N)}``, complex64 (complex128 for float64 inputs).

    Args:
        d_model: Width of inputs and outputs.
        d_state: N; None means ``d_model``.
        r_min: Inner radius of the ring that a is drawn from, uniformly by area.
        r_max: Outer radius, below 1.
        max_phase: Greatest angle.
        lr_scale: Learning rate of all but C and the map, in multiples of that of other parameters.
        output: ``"glu"``, or ``"none"`` for ``y_t``.
    """

    fp32_parameters = ("nu_log", "theta_log", "gamma_log")
    variants = ({"d_state": 6}, {"d_state": 5, "r_min": 0.5, "r_max": 0.9, "output": "none"})

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        r_min: float = 0.0,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
        lr_scale: float = 0.25,
        output: Output = "glu",
    ) -> None:
        if not 0 <= check_number("r_min", r_min) < check_number("r_max", r_max) < 1:
            raise ValueError(f"radii must be 0 <= r_min < r_max < 1, got {r_min} and {r_max}")
        super().__init__(d_model, size=d_model if d_state is None else d_state, lr_scale=lr_scale, output=output)
        self.radii, self.max_phase = (r_min, r_max), check_number("max_phase", max_phase, above=0)
        self.nu_log, self.theta_log, self.gamma_log = (nn.Parameter(torch.empty(self.size)) for _ in range(3))
        self.reset_parameters()

    def recurrence(self) -> tuple[Tensor, Tensor]:
        """Factors inside the unit circle, and the normalisation."""
        a = torch.polar(self.inside(torch.exp(-torch.exp(self.nu_log))), torch.exp(self.theta_log))
        return a, torch.exp(self.gamma_log)

    def reset_parameters(self) -> None:
        """The ring."""
        super().reset_parameters()
        with torch.no_grad():
            # exp(-nu) is the radius; not 0, whose logarithm is none
            inner, outer = (radius**2 for radius in self.radii)
            area = torch.rand_like(self.nu_log).clamp_(min=1e-6) * (outer - inner) + inner
            self.nu_log.copy_((-0.5 * area.log()).log())
            angle = torch.rand_like(self.theta_log).clamp_(min=1e-6) * self.max_phase
            self.theta_log.copy_(angle.log())
            self.gamma_log.copy_(0.5 * torch.log1p(-area))
