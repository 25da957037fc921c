"""S4: a state space whose transition is diagonal but for a low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqzoo.mixer import register
from seqzoo.modules.convolution import Output
from seqzoo.modules.hippo import MEASURES, diagonalise, hippo
from seqzoo.modules.state_space import StateSpaceMixer


@register("s4", paper="Efficiently Modeling Long Sequences with Structured State Spaces", arxiv="2111.00396", year=2021)
class S4(StateSpaceMixer):
    """S4, https://arxiv.org/abs/2111.00396, section 3: for every channel, with N / 2 poles and their conjugates::

        A = diag(-exp(log_A_real) + i A_imag) - sum_r P_r P_r^*        dt = exp(log_dt)
        x_t = (I - dt/2 A)^-1 ((I + dt/2 A) x_{t-1} + dt B u_t)
        y_t = 2 Re(C x_t) + D u_t              out_t = glu(W gelu(y_t))

    From the parameters of the authors' code: ``log_dt (D,)`` is its ``inv_dt``, ``log_A_real (D, N / 2)`` its
    ``A_real``, ``A_imag`` the negative of its ``A_imag``, ``B`` and ``C (D, N / 2, 2)`` its ``B`` and ``C``,
    ``P (D, R, N / 2, 2)`` its ``P`` with R behind the channels, ``D (D,)`` its ``D``. Where channels share A, B and P
    theirs have a dimension of 1, or of fewer copies, to be repeated. Its C is what a kernel of length L needs,
    ``C (I - A_d^L)``; here it is C.

    State: ``{"x": (B, D, N / 2)}``, complex64 (complex128 for float64 inputs). A dense sequence without a state is
    convolved by Fourier transforms, in which later inputs move an output by ``8 eps max|u| |k|_1`` at most.

    Args:
        d_model: Width of inputs and outputs.
        d_state: N, even.
        measure: HiPPO's, with which A, B and P begin: ``"legs"``, ``"legt"`` or ``"fourier"``.
        dt_min: Least step to begin with.
        dt_max: Greatest step to begin with.
        lr_scale: Learning rate of A, B and the step, in multiples of that of other parameters.
        output: ``"glu"``, or ``"none"`` for ``y_t``.
    """

    fp32_parameters = (*StateSpaceMixer.fp32_parameters, "P")
    discretisation = "bilinear"
    variants = (
        {"d_state": 4},
        {"d_state": 6, "measure": "legt", "output": "none"},
        {"d_state": 4, "measure": "fourier"},
    )

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        measure: str = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        lr_scale: float = 0.1,
        output: Output = "glu",
    ) -> None:
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        super().__init__(d_model, d_state=d_state, dt_min=dt_min, dt_max=dt_max, lr_scale=lr_scale, output=output)
        self.measure = measure
        self.B = nn.Parameter(torch.empty(d_model, d_state // 2, 2))
        self.P = nn.Parameter(torch.empty(d_model, 2 if measure == "legt" else 1, d_state // 2, 2))
        self.reset_parameters()

    def inputs(self, poles: Tensor, step: Tensor) -> Tensor:
        """B."""
        return torch.view_as_complex(self.B)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """P and its conjugate, so that it always takes from the states' energy."""
        P = torch.view_as_complex(self.P)
        return P, P

    def reset_parameters(self) -> None:
        """HiPPO's matrices for every channel, in the basis of the normal part."""
        super().reset_parameters()
        matrices = hippo(self.measure, self.d_state)
        normal = diagonalise(matrices)
        self.set_poles(normal.poles)
        with torch.no_grad():
            self.B.copy_(torch.view_as_real(normal.V.mH @ matrices.B.to(normal.V.dtype)))
            self.P.copy_(torch.view_as_real(matrices.P.to(normal.V.dtype) @ normal.V.conj()))
