"""DSS: diagonal state spaces whose kernel is normalised by a softmax over positions."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.mixer import register
from seqzoo.modules.convolution import Output
from seqzoo.modules.hippo import diagonalise, hippo
from seqzoo.modules.options import check_count
from seqzoo.modules.state_space import StateSpaceMixer


@register(
    "dss", paper="Diagonal State Spaces are as Effective as Structured State Spaces", arxiv="2203.14343", year=2022
)
class DSS(StateSpaceMixer):
    """DSS, https://arxiv.org/abs/2203.14343, section 3: for every channel, with N / 2 poles and their conjugates::

        A = -exp(log_A_real) + i A_imag        dt = exp(log_dt)
        k_l = 2 Re(C / A softmax_l(dt A l))    y = k * u + D u         out_t = glu(W gelu(y_t))

    The softmax runs over ``kernel_length`` positions, or all there are: a geometric series, ``exp(dt A l)
    (1 - exp(dt A)) / (1 - exp(dt A kernel_length))``. So the kernel is that of a state space with the input
    ``B = 1 / (exp(dt A kernel_length) - 1)``, and does not depend on how a sequence is cut.

    State: ``{"x": (B, D, N / 2)}``, complex64 (complex128 for float64 inputs). A dense sequence without a state is
    convolved by Fourier transforms, in which later inputs move an output by ``8 eps max|u| |k|_1`` at most.

    Args:
        d_model: Width of inputs and outputs.
        d_state: N, even.
        kernel_length: Positions that the softmax runs over; None means infinitely many.
        dt_min: Least step to begin with.
        dt_max: Greatest step to begin with.
        lr_scale: Learning rate of A, B and the step, in multiples of that of other parameters.
        output: ``"glu"``, or ``"none"`` for ``y_t``.
    """

    variants = ({"d_state": 4}, {"d_state": 6, "kernel_length": 40, "output": "none"})

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        kernel_length: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        lr_scale: float = 0.1,
        output: Output = "glu",
    ) -> None:
        super().__init__(d_model, d_state=d_state, dt_min=dt_min, dt_max=dt_max, lr_scale=lr_scale, output=output)
        self.kernel_length = None if kernel_length is None else check_count("kernel_length", kernel_length)
        self.reset_parameters()

    def inputs(self, poles: Tensor, step: Tensor) -> Tensor:
        """What the softmax divides by, as an input."""
        if self.kernel_length is None:
            return -torch.ones_like(poles)
        # where this is nearly 0 the difference would be of equal numbers in float32
        whole = (self.kernel_length * step[:, None] * poles).to(torch.complex128)
        return (1 / (whole.exp() - 1)).to(poles.dtype)

    def reset_parameters(self) -> None:
        """The poles of HiPPO-LegS for every channel."""
        super().reset_parameters()
        self.set_poles(diagonalise(hippo("legs", self.d_state)).poles)
