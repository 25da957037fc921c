"""S4D: S4 with a diagonal transition."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from seqzoo.mixer import register
from seqzoo.modules.convolution import Output
from seqzoo.modules.hippo import diagonalise, hippo
from seqzoo.modules.options import check_flags
from seqzoo.modules.state_space import StateSpaceMixer

INITIALISATIONS = ("lin", "inv", "legs")


@register(
    "s4d",
    paper="On the Parameterization and Initialization of Diagonal State Space Models",
    arxiv="2206.11893",
    year=2022,
)
class S4D(StateSpaceMixer):
    """S4D, https://arxiv.org/abs/2206.11893, section 4: for every channel, with N / 2 poles and their conjugates::

        A = -exp(log_A_real) + i A_imag        dt = exp(log_dt)
        x_t = exp(dt A) x_{t-1} + (exp(dt A) - 1) / A B u_t
        y_t = 2 Re(C x_t) + D u_t              out_t = glu(W gelu(y_t))

    The parameters ``log_dt (D,)``, ``log_A_real`` and ``A_imag (D, N / 2)``, ``C (D, N / 2, 2)`` and ``D (D,)`` are
    those of the authors' shortest code, one to one, with B of 1. Their other code has ``B (1, N / 2, 2)`` or one a
    channel, and maps as :class:`S4` says.

    State: ``{"x": (B, D, N / 2)}``, complex64 (complex128 for float64 inputs). A dense sequence without a state is
    convolved by Fourier transforms, in which later inputs move an output by ``8 eps max|u| |k|_1`` at most.

    Args:
        d_model: Width of inputs and outputs.
        d_state: N, even.
        initialisation: ``"lin"``, ``A_n = -1/2 + i pi n``; ``"inv"``, ``-1/2 + i N / pi (N / (2 n + 1) - 1)``; or
            ``"legs"``, the poles of S4's.
        dt_min: Least step to begin with.
        dt_max: Greatest step to begin with.
        train_B: Whether B is trained; else it is 1.
        lr_scale: Learning rate of A, B and the step, in multiples of that of other parameters.
        output: ``"glu"``, or ``"none"`` for ``y_t``.
    """

    variants = (
        {"d_state": 4},
        {"d_state": 6, "initialisation": "inv", "train_B": False, "output": "none"},
    )

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        initialisation: str = "lin",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        train_B: bool = True,
        lr_scale: float = 0.1,
        output: Output = "glu",
    ) -> None:
        if initialisation not in INITIALISATIONS:
            raise ValueError(f"initialisation must be one of {', '.join(INITIALISATIONS)}, got {initialisation!r}")
        check_flags(train_B=train_B)
        super().__init__(d_model, d_state=d_state, dt_min=dt_min, dt_max=dt_max, lr_scale=lr_scale, output=output)
        self.initialisation = initialisation
        self.B = nn.Parameter(torch.empty(d_model, d_state // 2, 2)) if train_B else None
        self.reset_parameters()

    def inputs(self, poles: Tensor, step: Tensor) -> Tensor:
        """B."""
        return torch.ones_like(poles) if self.B is None else torch.view_as_complex(self.B)

    def reset_parameters(self) -> None:
        """The poles of the initialisation for every channel, and inputs of 1."""
        super().reset_parameters()
        self.set_poles(_poles(self.initialisation, self.d_state))
        if self.B is not None:
            with torch.no_grad():
                self.B.copy_(self.B.new_tensor([1.0, 0.0]))


def _poles(initialisation: str, size: int) -> Tensor:
    if initialisation == "legs":
        return diagonalise(hippo("legs", size)).poles
    index = torch.arange(size // 2, dtype=torch.float64, device="cpu")
    imag = math.pi * index if initialisation == "lin" else size / math.pi * (size / (2 * index + 1) - 1)
    return torch.complex(torch.full_like(imag, -0.5), imag)
