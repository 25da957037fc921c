"""What S4, S4D and DSS share: a state space a channel, as a convolution, a scan or a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from seqzoo.kernels.checks import COMPLEX_OF, accumulator
from seqzoo.kernels.ssm_kernel import ssm_kernel
from seqzoo.kernels.ssm_scan import ssm_scan
from seqzoo.mixer import State, StateSpec
from seqzoo.modules.convolution import ConvolutionMixer, Output
from seqzoo.modules.options import check_count, check_number
from seqzoo.packing import Packing


class StateSpaceMixer(ConvolutionMixer):
    """``x' = A x + B u``, ``y = Re(C x) + D u`` for every channel, of which half of the conjugate pairs is kept.

    A whole sequence is convolved with :func:`seqzoo.ops.ssm_kernel`; where there is a state or sequences are packed,
    :func:`seqzoo.ops.ssm_scan` runs. Complex numbers are real tensors whose last dimension holds the two parts.

    Args:
        d_model: Width of inputs and outputs.
        d_state: N, even.
        dt_min: Least step to begin with.
        dt_max: Greatest step to begin with.
        lr_scale: Learning rate of A, B and the step, in multiples of that of other parameters.
        output: As of :class:`ConvolutionMixer`.
    """

    fp32_parameters = ("log_dt", "log_A_real", "A_imag", "B", "C", "D")
    discretisation = "zoh"

    def __init__(
        self, d_model: int, *, d_state: int, dt_min: float, dt_max: float, lr_scale: float, output: Output
    ) -> None:
        super().__init__(d_model, output=output)
        if check_count("d_state", d_state) % 2:
            raise ValueError(f"d_state must be even, for states come in conjugate pairs, got {d_state}")
        if check_number("dt_min", dt_min, above=0) > check_number("dt_max", dt_max, above=0):
            raise ValueError(f"dt_min must not be above dt_max, got {dt_min} and {dt_max}")
        self.d_state, self.steps, self.lr_scale = d_state, (dt_min, dt_max), check_number("lr_scale", lr_scale, above=0)
        pairs = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.log_A_real = nn.Parameter(torch.empty(d_model, pairs))
        self.A_imag = nn.Parameter(torch.empty(d_model, pairs))
        self.C = nn.Parameter(torch.empty(d_model, pairs, 2))

    # -- what a layer defines --

    def inputs(self, poles: Tensor, step: Tensor) -> Tensor:
        """B, ``(D, N / 2)``, complex."""
        raise NotImplementedError(f"{type(self).__name__} must define inputs()")

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """What makes the transition more than diagonal."""
        return None

    # -- what follows --

    def poles(self) -> Tensor:
        """The diagonal of A, ``(D, N / 2)``, complex; to the left of the imaginary axis whatever the parameters."""
        return torch.complex(-torch.exp(self.log_A_real), self.A_imag)

    def space(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, Any]]:
        """The arguments of the ops."""
        poles, step = self.poles(), torch.exp(self.log_dt)
        options = {"low_rank": self.low_rank(), "discretisation": self.discretisation, "conjugate_pairs": True}
        return (poles, self.inputs(poles, step), torch.view_as_complex(self.C), step), options

    def kernel(self, length: int) -> Tensor:
        """The response to an impulse."""
        arguments, options = self.space()
        return ssm_kernel(*arguments, length, **options)

    def recur(
        self, u: Tensor, state: State | None, packing: Packing | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """The scan."""
        arguments, options = self.space()
        given = None if state is None else state["x"]
        y, final = ssm_scan(u, *arguments, given, cu_seqlens=packing, **options)
        return y, {"x": final}

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """Half of a state for every channel."""
        return {"x": ((batch_size, self.d_model, self.d_state // 2), COMPLEX_OF[accumulator(dtype)])}

    def flops(self, length: int) -> int:
        """Those of the map, and for every state and token the four products of a step."""
        of_map = 4 * self.d_model**2 if self.output == "glu" else 0
        return length * (of_map + 8 * self.d_model * self.d_state)

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """A, B and the step learn at a rate of their own and do not decay; C is a readout like any other."""
        own = {"weight_decay": 0.0, "lr_scale": self.lr_scale}
        names = [name for name, _ in self.named_parameters(recurse=False) if name not in ("C", "D")]
        return super().parameter_options() | dict.fromkeys(names, own)

    def set_poles(self, poles: Tensor) -> None:
        """Gives all channels the same poles ``(N / 2,)``."""
        with torch.no_grad():
            self.log_A_real.copy_(poles.real.neg().log().expand_as(self.log_A_real))
            self.A_imag.copy_(poles.imag.expand_as(self.A_imag))

    def reset_parameters(self) -> None:
        """Steps drawn log-uniformly, readouts from a complex normal distribution of variance 1."""
        super().reset_parameters()
        low, high = map(math.log, self.steps)
        nn.init.uniform_(self.log_dt, low, high)
        nn.init.normal_(self.C, std=math.sqrt(0.5))
