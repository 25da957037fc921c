"""What Mamba and Longhorn share: two branches, a short convolution, the selective scan, a gate."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec
from seqzoo.modules.options import check_count, check_flags, check_number, scaled_width
from seqzoo.modules.short_conv import ShortConv
from seqzoo.packing import Packing


class SelectiveBlock(SequenceMixer):
    """A mixer around :func:`seqzoo.ops.selective_scan`; a subclass says how the step and the transition are made.

    Attributes:
        transition: That of the op.
        softplus: Whether the step is the softplus of its projection; else :meth:`step_from` makes it.
    """

    transition: ClassVar[str]
    softplus: ClassVar[bool]
    packs = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int,
        d_conv: int,
        expand: float,
        dt_rank: int | None,
        bias: bool,
        conv_bias: bool,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__(d_model)
        width = scaled_width(d_model, "expand", expand)
        if isinstance(dt_rank, str):
            raise ValueError(f"dt_rank must be a positive integer, or None for d_model / 16, got {dt_rank!r}")
        rank = -(-d_model // 16) if dt_rank is None else check_count("dt_rank", dt_rank)
        d_state = check_count("d_state", d_state)
        if norm_eps is not None:
            check_number("norm_eps (None for no norm)", norm_eps, above=0)
        check_flags(bias=bias, conv_bias=conv_bias)
        self.width, self.d_state, self.dt_rank, self.norm_eps = width, d_state, rank, norm_eps
        self.in_proj = nn.Linear(d_model, 2 * width, bias=bias)
        self.conv1d = ShortConv(width, d_conv, bias=conv_bias, activation="silu")
        self.x_proj = nn.Linear(width, rank + 2 * d_state, bias=False)
        self.dt_proj = StepProjection(rank, width)
        self.D = nn.Parameter(torch.empty(width))
        self.out_proj = nn.Linear(width, d_model, bias=bias)

    def transition_matrix(self) -> Tensor | None:
        """A of the op."""
        return None

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Projects, convolves, scans, gates, projects."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = self.conv1d(u, None if state is None else state["conv"].to(u.dtype), packing)
        delta, B, C = self.select(u)
        if not self.softplus:
            delta = self.step_from(delta)
        y, final = selective_scan(
            u,
            delta,
            self.transition_matrix(),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias if self.softplus else None,
            None if state is None else state["ssm"],
            transition=self.transition,
            delta_softplus=self.softplus,
            cu_seqlens=packing,
        )
        # under autocast the projection is narrower than x, whose dtype the state of a convolution has
        return Mixed(self.out_proj(y), {"conv": conv.to(x.dtype), "ssm": final})

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step's projection ``(B, T, E)``, B and C ``(B, T, d_state)`` of every token."""
        low, B, C = self.x_proj(u).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        if self.norm_eps is not None:
            low, B, C = (
                # CUDA's autocast widens it
                F.rms_norm(value, value.shape[-1:], eps=self.norm_eps).to(value.dtype)
                for value in (low, B, C)
            )
        return self.dt_proj(low), B, C

    def step_from(self, delta: Tensor) -> Tensor:
        """The step of its projection without the bias, where it is no softplus."""
        raise NotImplementedError(f"{type(self).__name__} must define step_from() or set softplus = True")

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """The convolution's last inputs, and ``d_state`` values a channel."""
        return {
            "conv": self.conv1d.state_spec(batch_size, dtype),
            "ssm": ((batch_size, self.width, self.d_state), accumulator(dtype)),
        }

    def flops(self, length: int) -> int:
        """2 a weight of the projections and the convolution, 9 a value of the state, for every token."""
        layers = (self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj)
        weights = sum(layer.weight.numel() for layer in layers)
        return length * (2 * weights + 9 * self.width * self.d_state)

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """The skip weights do not decay."""
        return {"D": {"weight_decay": 0.0}}

    def reset_parameters(self) -> None:
        """PyTorch's initialisation of the projections with zero biases; skip weights of 1."""
        for layer in (self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj):
            layer.reset_parameters()
        for layer in (self.in_proj, self.out_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.ones_(self.D)


class StepProjection(nn.Module):
    """The low-rank projection to the step of every channel, and the bias that the scan adds to it.

    No ``nn.Linear``: a model-wide initialisation that zeroes the biases of linear layers would set every time scale to
    the same value.
    """

    def __init__(self, dt_rank: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dt_rank))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., dt_rank)`` to ``(..., width)``, without the bias."""
        return F.linear(x, self.weight)

    def reset_parameters(self) -> None:
        """Uniform within ``dt_rank ** -0.5``, as PyTorch's linear layers."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
