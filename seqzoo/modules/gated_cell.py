"""What minGRU and minLSTM share: a short convolution, one projection, the fused gated scan, an output projection."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.gated_scan import gated_scan
from seqzoo.kernels.gated_scan.op import CELLS, check_range
from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec
from seqzoo.modules.options import check_flags, scaled_width
from seqzoo.modules.short_conv import ShortConv
from seqzoo.packing import Packing


class GatedCell(SequenceMixer):
    """A mixer around :func:`seqzoo.ops.gated_scan`; a subclass names its ``cell``."""

    cell: ClassVar[str]
    packs = True
    variants = ({}, {"expand": 1.5, "gate_range": (-1.0, 1.0), "bias": True}, {"d_conv": 4})

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 1.0,
        output_projection: bool | None = None,
        gate_range: tuple[float, float] = (0.0, 1.0),
        bias: bool = False,
        d_conv: int | None = None,
    ) -> None:
        super().__init__(d_model)
        width = scaled_width(d_model, "expand", expand)
        check_flags(bias=bias)
        lo, hi = check_range(gate_range)
        project = width != d_model if output_projection is None else output_projection
        if not project and width != d_model:
            raise ValueError(f"output_projection=False needs expand=1, got expand={expand}")
        self.width = width
        self.gate_range = (lo, hi)
        self.conv1d = None if d_conv is None else ShortConv(d_model, d_conv)
        self.in_proj = nn.Linear(d_model, CELLS[self.cell] * width, bias=bias)
        self.out_proj = nn.Linear(width, d_model, bias=bias) if project else nn.Identity()
        self.reset_parameters()

    def mix(self, x: torch.Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Convolves where it does, projects, scans, projects."""
        following: State = {}
        if self.conv1d is not None:
            x, following["conv"] = self.conv1d(x, None if state is None else state["conv"], packing)
        h, following["h"] = gated_scan(
            self.in_proj(x),
            None if state is None else state["h"],
            cell=self.cell,
            gate_range=self.gate_range,
            cu_seqlens=packing,
        )
        return Mixed(self.out_proj(h), following)

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """The last inputs of the convolution, one value a channel of the recurrence."""
        spec: StateSpec = {} if self.conv1d is None else {"conv": self.conv1d.state_spec(batch_size, dtype)}
        return spec | {"h": ((batch_size, self.width), accumulator(dtype))}

    def reset_parameters(self) -> None:
        """PyTorch's initialisation; biases of the projections, where there are any, zero: gates start half open."""
        if self.conv1d is not None:
            self.conv1d.reset_parameters()
        for layer in (self.in_proj, self.out_proj):
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
