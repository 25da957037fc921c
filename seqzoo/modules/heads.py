"""What layers with a matrix state share: heads, projections, the short convolution, the norm and gate of outputs."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.linear_attention.op import check_keys
from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec
from seqzoo.modules.options import check_count, check_flags
from seqzoo.modules.short_conv import ShortConv
from seqzoo.modules.steps import StepDecay
from seqzoo.packing import Packing

GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}


def count_heads(width: int, n_heads: int | None, head_dim: int | None, default: int) -> tuple[int, int]:
    """The number and the width of the heads into which ``width`` is split.

    With neither given, a head is as wide as the largest divisor of ``width`` that is not above ``default``.

    Raises:
        ValueError: If they do not divide or do not multiply to ``width``.
    """
    for name, value in (("n_heads", n_heads), ("head_dim", head_dim)):
        if value is not None:
            check_count(name, value)
    if head_dim is None:
        if n_heads is None:
            head_dim = max(size for size in range(1, min(width, default) + 1) if width % size == 0)
        elif width % n_heads == 0:
            head_dim = width // n_heads
        else:
            raise ValueError(f"n_heads must divide the width {width}, got {n_heads}")
    if width % head_dim != 0 or n_heads not in (None, width // head_dim):
        heads = "" if n_heads is None else f"n_heads * head_dim = {n_heads} * "
        raise ValueError(f"heads must make up the width {width}, got {heads or 'head_dim = '}{head_dim}")
    return width // head_dim, head_dim


class OutputNorm(nn.Module):
    """The RMS norm of outputs over their last dimension and their gate, https://arxiv.org/abs/1910.07467.

    ``norm(o) * weight * act(gate)``, or ``norm(o * act(gate)) * weight`` where the gate comes first.

    Args:
        width: Last dimension of the outputs.
        gate: ``"silu"``, ``"sigmoid"``, or None for no gate.
        gate_first: Whether the gated outputs are normalised.
        n_groups: Parts of the last dimension that are normalised each by itself.
        eps: Added to the mean square.
    """

    def __init__(
        self,
        width: int,
        *,
        gate: str | None = "silu",
        gate_first: bool = False,
        n_groups: int = 1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.gate, self.gate_first, self.n_groups, self.eps = gate, gate_first, n_groups, eps
        self.reset_parameters()

    def forward(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        """``(..., width)`` to ``(..., width)``, of the dtype of the outputs; computed in float32 at least."""
        dtype = accumulator(o.dtype)
        values = o.to(dtype)
        factor = None if gate is None or self.gate is None else GATES[self.gate](gate.to(dtype))
        if factor is not None and self.gate_first:
            values = values * factor
        width, weight = self.weight.shape[0], self.weight.to(dtype)
        if self.n_groups == 1:
            values = F.rms_norm(values, (width,), weight, self.eps)
        else:
            groups = values.unflatten(-1, (self.n_groups, -1))
            values = F.rms_norm(groups, (width // self.n_groups,), None, self.eps).flatten(-2) * weight
        if factor is not None and not self.gate_first:
            values = values * factor
        return values.to(o.dtype)

    def reset_parameters(self) -> None:
        """A scale of 1."""
        nn.init.ones_(self.weight)


class HeadMixer(SequenceMixer):
    """q, k and v of every head from one projection, a short convolution, a recurrence, a norm a head, a gate.

    A subclass defines :meth:`recur`, the rest by options; the recurrent states follow :meth:`recurrent_spec`.

    Attributes:
        activation: What q, k and v pass through where there is no convolution: ``"silu"``, or None.
        conv_activation: What they pass through behind a convolution.
        gate: Activation of the gate on the outputs, of ``OutputNorm``; None for no gate.
    """

    activation: ClassVar[str | None] = "silu"
    conv_activation: ClassVar[str | None] = "silu"
    gate: ClassVar[str | None] = "silu"
    packs = True

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        key_dim: int,
        value_dim: int,
        d_conv: int | None,
        normalise: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model)
        check_flags(bias=bias)
        check_keys(key_dim)
        self.n_heads, self.key_dim, self.value_dim = n_heads, key_dim, value_dim
        self.widths = n_heads * key_dim, n_heads * key_dim, n_heads * value_dim
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=bias)
        self.conv1d = None
        if d_conv is not None:
            self.conv1d = ShortConv(sum(self.widths), d_conv, bias=False, activation=self.conv_activation)
        self.gate_proj = None if self.gate is None else nn.Linear(d_model, n_heads * value_dim, bias=bias)
        self.norm = OutputNorm(value_dim, gate=self.gate) if normalise else None
        self.out_proj = nn.Linear(n_heads * value_dim, d_model, bias=bias)

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        """The recurrence on q, k ``(B, T, H, K)`` and v ``(B, T, H, V)``; returns o as v and the state's tensors."""
        raise NotImplementedError(f"{type(self).__name__} must define recur()")

    def recurrent_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """The matrix of every head."""
        return {"S": ((batch_size, self.n_heads, self.key_dim, self.value_dim), accumulator(dtype))}

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Projects, remembers, reads."""
        o, after = self.remember(x, self.in_proj(x), state, packing)
        if "conv" in after:
            # under autocast the projection is narrower than x, whose dtype the state of a convolution has
            after["conv"] = after["conv"].to(x.dtype)
        return Mixed(self.read(x, o), after)

    def remember(self, x: Tensor, qkv: Tensor, state: State | None, packing: Packing | None) -> tuple[Tensor, State]:
        """Convolves and recurs: what ``in_proj`` gives, ``(B, T, sum(widths))``, to o ``(B, T, H, V)`` and the state.

        Besides q, k and v the recurrence sees x alone, through linear maps that are children of this module, or the
        first in a child of several.
        """
        after: State = {}
        if self.conv1d is not None:
            qkv, after["conv"] = self.conv1d(qkv, None if state is None else state["conv"].to(qkv.dtype), packing)
        elif self.activation is not None:
            qkv = GATES[self.activation](qkv)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in qkv.split(self.widths, dim=-1))
        o, recurrent = self.recur(x, q, k, v, state, packing)
        return o, after | recurrent

    def read(self, x: Tensor, o: Tensor) -> Tensor:
        """Normalises, gates and projects what the recurrence read, ``(B, T, H, V)`` to ``(B, T, D)``."""
        gate = None if self.gate_proj is None else self.gate_proj(x).unflatten(-1, (self.n_heads, -1))
        if self.norm is not None:
            o = self.norm(o, gate)
        return self.out_proj(o.flatten(2))

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """The convolution's last inputs, where there is one, and the recurrence's state."""
        spec = self.recurrent_spec(batch_size, dtype)
        return spec if self.conv1d is None else {"conv": self.conv1d.state_spec(batch_size, dtype), **spec}

    def reset_parameters(self) -> None:
        """PyTorch's initialisation with zero biases; decays as :class:`StepDecay` begins."""
        for part in self.modules():
            if isinstance(part, (nn.Linear, ShortConv, OutputNorm, StepDecay)):
                part.reset_parameters()
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
