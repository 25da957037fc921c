"""What S5 and LRU share: one complex diagonal state that reads all channels and that all channels read."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import COMPLEX_OF, accumulator
from seqzoo.kernels.linear_scan import linear_scan
from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec
from seqzoo.modules.convolution import Output
from seqzoo.modules.options import check_count, check_number
from seqzoo.packing import Packing


class DiagonalMixer(SequenceMixer):
    """``x_t = a x_{t-1} + g B u_t``, ``y_t = Re(C x_t) + D u_t``, a and g elementwise, then GELU and a gated map.

    Complex numbers are real tensors whose last dimension holds the two parts.

    Args:
        d_model: Width of inputs and outputs.
        size: How many complex numbers the state holds.
        lr_scale: Learning rate of the state space, in multiples of that of other parameters.
        output: ``"glu"``, or ``"none"`` for ``y_t``.
    """

    packs = True

    def __init__(self, d_model: int, *, size: int, lr_scale: float, output: Output) -> None:
        super().__init__(d_model)
        if output not in ("glu", "none"):
            raise ValueError(f"output must be glu or none, got {output!r}")
        self.size, self.output = check_count("d_state", size), output
        self.lr_scale = check_number("lr_scale", lr_scale, above=0)
        self.B = nn.Parameter(torch.empty(size, d_model, 2))
        self.C = nn.Parameter(torch.empty(d_model, size, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        if output == "glu":
            self.out_proj = nn.Linear(d_model, 2 * d_model)

    def recurrence(self) -> tuple[Tensor, Tensor]:
        """a and g, ``(N,)``, complex of float32 at least."""
        raise NotImplementedError(f"{type(self).__name__} must define recurrence()")

    @staticmethod
    def inside(radius: Tensor) -> Tensor:
        """A factor's magnitude, kept below 1 where rounding would bring it there."""
        return radius.clamp(max=1 - 2 * torch.finfo(radius.dtype).eps)

    def readout(self) -> Tensor:
        """C."""
        return self.C

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Projects, scans, projects, maps."""
        a, gain = self.recurrence()
        kind = accumulator(x.dtype)
        inputs = F.linear(x, self.B.movedim(-1, 0).flatten(0, 1).to(x.dtype))
        real, imag = inputs.to(kind).chunk(2, -1)
        added = gain * torch.complex(real, imag)
        h, final = linear_scan(a, added, None if state is None else state["x"], cu_seqlens=packing)
        real, imag = self.readout().unbind(-1)
        weight = torch.cat((real, -imag), -1).to(inputs.dtype)
        y = F.linear(torch.cat((h.real, h.imag), -1).to(inputs.dtype), weight)
        y = (y + x * self.D).to(y.dtype)
        if self.output == "glu":
            y = F.glu(self.out_proj(F.gelu(y)), dim=-1)
        return Mixed(y, {"x": final})

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """One state for all channels."""
        return {"x": ((batch_size, self.size), COMPLEX_OF[accumulator(dtype)])}

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """The state space learns at a rate of its own and does not decay; nor does the skip."""
        own = {"weight_decay": 0.0, "lr_scale": self.lr_scale}
        names = [name for name, _ in self.named_parameters(recurse=False) if name not in ("C", "D")]
        return {"D": {"weight_decay": 0.0}} | dict.fromkeys(names, own)

    def reset_parameters(self) -> None:
        """B of variance 1 / D and C of variance 1 / N, skips of variance 1, PyTorch's initialisation of the map."""
        nn.init.normal_(self.B, std=math.sqrt(0.5 / self.d_model))
        nn.init.normal_(self.C, std=math.sqrt(0.5 / self.size))
        nn.init.normal_(self.D)
        if self.output == "glu":
            self.out_proj.reset_parameters()
