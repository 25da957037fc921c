"""What layers with a vector state share: a convolution that may be left out, and the initialisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqzoo.mixer import SequenceMixer, State, StateSpec
from seqzoo.modules.heads import OutputNorm
from seqzoo.modules.short_conv import ShortConv
from seqzoo.packing import Packing


class VectorMixer(SequenceMixer):
    """A mixer around :func:`seqzoo.ops.linear_scan`, with or without a short convolution.

    Args:
        d_model: Width of inputs and outputs.
        width: Channels of the recurrence.
        conv_width: Channels of the convolution.
        d_conv: Its taps; None means without.
        conv_activation: What its outputs pass through, ``"silu"`` or None.
    """

    packs = True

    def __init__(
        self, d_model: int, *, width: int, conv_width: int, d_conv: int | None, conv_activation: str | None = "silu"
    ) -> None:
        super().__init__(d_model)
        self.width = width
        self.conv1d = None if d_conv is None else ShortConv(conv_width, d_conv, activation=conv_activation)

    def convolve(self, x: Tensor, u: Tensor, state: State | None, packing: Packing | None) -> tuple[Tensor, State]:
        """u behind the convolution, and its state in the dtype of the mixer's input x."""
        if self.conv1d is None:
            return u, {}
        # under autocast a projection is narrower than x, whose dtype the state has
        u, conv = self.conv1d(u, None if state is None else state["conv"].to(u.dtype), packing)
        return u, {"conv": conv.to(x.dtype)}

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """The convolution's last inputs, where there is one."""
        return {} if self.conv1d is None else {"conv": self.conv1d.state_spec(batch_size, dtype)}

    def reset_parameters(self) -> None:
        """PyTorch's initialisation with zero biases."""
        for part in self.modules():
            if isinstance(part, (nn.Linear, ShortConv, OutputNorm)):
                part.reset_parameters()
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
