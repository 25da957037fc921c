"""What layers have in common whose mixing is a convolution with a kernel of their own: S4, S4D, DSS, LongConv."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.long_conv import long_conv
from seqzoo.mixer import Mixed, SequenceMixer, State
from seqzoo.packing import Packing

Output = Literal["glu", "none"]


class ConvolutionMixer(SequenceMixer):
    """``y = k * u + D u``, then GELU, a linear map to twice the width, and a gated linear unit.

    A whole sequence without a state is convolved by Fourier transforms, which mix all positions: an output moves with
    later inputs by what rounding makes of them, at most ``8 eps max|u| |k|_1``.

    Args:
        d_model: Width of inputs and outputs.
        output: ``"glu"``, or ``"none"`` for the convolution alone.
    """

    packs = True

    def __init__(self, d_model: int, *, output: Output) -> None:
        super().__init__(d_model)
        if output not in ("glu", "none"):
            raise ValueError(f"output must be glu or none, got {output!r}")
        self.output: Output = output
        self.D = nn.Parameter(torch.empty(d_model))
        if output == "glu":
            self.out_proj = nn.Linear(d_model, 2 * d_model)

    # -- what a layer defines --

    def kernel(self, length: int) -> Tensor:
        """The convolution's first taps, ``(D, length)``."""
        raise NotImplementedError(f"{type(self).__name__} must define kernel()")

    def recur(
        self, u: Tensor, state: State | None, packing: Packing | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """The convolution where there is a state, or sequences are packed."""
        raise NotImplementedError(f"{type(self).__name__} must define recur()")

    # -- what follows --

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Convolves in the way that fits, adds the skip, maps."""
        if state is None and packing is None and not return_state:
            return Mixed(self.map(x, long_conv(x, self.kernel(x.shape[1]))))
        y, after = self.recur(x, state, packing, return_state)
        return Mixed(self.map(x, y), after)

    def mix_both(self, reverse: ConvolutionMixer, x: Tensor, packing: Packing | None) -> Tensor:
        """The convolutions from both ends, this one's and another's from the last token on, under this one's map.

        Of a dense batch one convolution with a kernel of two sides.
        """
        if packing is None:
            length = x.shape[1]
            y = long_conv(x, self.kernel(length), kernel_reverse=reverse.kernel(length))
        else:
            places = packing.reversal()
            turned, _ = reverse.recur(x[:, places], None, packing, False)
            y = self.recur(x, None, packing, False)[0] + turned[:, places]
        return self.map(x, y, self.D + reverse.D)

    def map(self, x: Tensor, y: Tensor, skip: Tensor | None = None) -> Tensor:
        """What follows the convolution."""
        y = (y + x * (self.D if skip is None else skip)).to(y.dtype)
        return y if self.output == "none" else F.glu(self.out_proj(F.gelu(y)), dim=-1)

    def remove_map(self) -> None:
        """Leaves the convolution and its skip alone, as built with ``output="none"``."""
        if self.output == "glu":
            self.output = "none"
            del self.out_proj

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """The skip does not decay."""
        return {"D": {"weight_decay": 0.0}}

    def reset_parameters(self) -> None:
        """Skips drawn from a normal distribution, PyTorch's initialisation of the map."""
        nn.init.normal_(self.D)
        if self.output == "glu":
            self.out_proj.reset_parameters()
