"""S5: one diagonal state space for all channels."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from seqzoo.kernels.checks import COMPLEX_OF
from seqzoo.kernels.ssm_kernel.discretise import diagonal_steps, state_space
from seqzoo.mixer import register
from seqzoo.modules.convolution import Output
from seqzoo.modules.diagonal import DiagonalMixer
from seqzoo.modules.hippo import diagonalise, hippo
from seqzoo.modules.options import check_count, check_number


@register("s5", paper="Simplified State Space Layers for Sequence Modeling", arxiv="2208.04933", year=2022)
class S5(DiagonalMixer):
    """S5, https://arxiv.org/abs/2208.04933, section 3: with N / 2 poles and their conjugates::

        A = -exp(log_A_real) + i A_imag        dt = exp(log_dt), one a state
        x_t = exp(dt A) x_{t-1} + (exp(dt A) - 1) / A (B u_t)
        y_t = 2 Re(C x_t) + D u_t              out_t = glu(W gelu(y_t))

    A begins as blocks of HiPPO-LegS in the basis of its normal part, and B and C as random matrices in that basis. A
    packed sequence begins with the state given, as a reset does in reinforcement learning
    (https://arxiv.org/abs/2303.03982).

    State: ``{"x": (B, N / 2)}``, complex64 (complex128 for float64 inputs).

    Args:
        d_model: Width of inputs and outputs.
        d_state: N, even.
        n_blocks: How many blocks A has; each has an even size.
        discretisation: ``"zoh"`` or ``"bilinear"``.
        dt_min: Least step to begin with.
        dt_max: Greatest step to begin with.
        lr_scale: Learning rate of all but C and the map, in multiples of that of other parameters.
        output: ``"glu"``, or ``"none"`` for ``y_t``.
    """

    fp32_parameters = ("log_A_real", "A_imag", "log_dt")
    variants = ({"d_state": 8, "n_blocks": 2}, {"d_state": 4, "discretisation": "bilinear", "output": "none"})

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        n_blocks: int = 1,
        discretisation: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        lr_scale: float = 1 / 3,
        output: Output = "glu",
    ) -> None:
        if check_count("d_state", d_state) % (2 * check_count("n_blocks", n_blocks)):
            raise ValueError(
                f"d_state must be a multiple of 2 n_blocks = {2 * n_blocks}, for states come in conjugate pairs, got "
                f"{d_state}"
            )
        if discretisation not in ("zoh", "bilinear"):
            raise ValueError(f"discretisation must be zoh or bilinear, got {discretisation!r}")
        if check_number("dt_min", dt_min, above=0) > check_number("dt_max", dt_max, above=0):
            raise ValueError(f"dt_min must not be above dt_max, got {dt_min} and {dt_max}")
        super().__init__(d_model, size=d_state // 2, lr_scale=lr_scale, output=output)
        self.n_blocks, self.discretisation, self.steps = n_blocks, discretisation, (dt_min, dt_max)
        self.log_A_real, self.A_imag, self.log_dt = (nn.Parameter(torch.empty(self.size)) for _ in range(3))
        self.reset_parameters()

    def recurrence(self) -> tuple[Tensor, Tensor]:
        """The discretised factors and what they make of an input."""
        poles = torch.complex(-torch.exp(self.log_A_real), self.A_imag)[:, None]
        one = torch.ones_like(poles)
        space = state_space(poles, one, one, torch.exp(self.log_dt), None, self.discretisation, False)
        exponents, inputs = diagonal_steps(space)
        kind = self.log_dt.dtype
        radius = self.inside(exponents.real.exp().to(kind))
        return torch.polar(radius, exponents.imag.to(kind))[:, 0], inputs.to(COMPLEX_OF[kind])[:, 0]

    def readout(self) -> Tensor:
        """C, twice for the conjugates."""
        return 2 * self.C

    def reset_parameters(self) -> None:
        """Blocks of HiPPO-LegS, random B and C in their basis, steps drawn log-uniformly."""
        super().reset_parameters()
        normal = diagonalise(hippo("legs", 2 * self.size // self.n_blocks))
        low, high = map(math.log, self.steps)
        nn.init.uniform_(self.log_dt, low, high)
        with torch.no_grad():
            poles = normal.poles.repeat(self.n_blocks)
            self.log_A_real.copy_(poles.real.neg().log())
            self.A_imag.copy_(poles.imag)
            V = torch.block_diag(*[normal.V] * self.n_blocks)  # (N, N / 2)
            B = torch.randn(len(V), self.d_model, dtype=torch.float64, device="cpu") / math.sqrt(self.d_model)
            C = torch.randn(self.d_model, len(V), dtype=torch.float64, device="cpu") / math.sqrt(len(V))
            self.B.copy_(torch.view_as_real(V.mH @ B.to(V.dtype)))
            self.C.copy_(torch.view_as_real(C.to(V.dtype) @ V))
