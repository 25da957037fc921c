"""What the layers on the delta rule share: normalised queries and keys, and the weight of what is written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.delta_rule import delta_rule
from seqzoo.mixer import State
from seqzoo.modules.heads import HeadMixer
from seqzoo.modules.options import check_flags
from seqzoo.packing import Packing


class DeltaMixer(HeadMixer):
    """A mixer around :func:`seqzoo.ops.delta_rule`; a subclass defines its decay, if it has one.

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads.
        key_dim: Keys of a head.
        value_dim: Values of a head.
        d_conv: Taps of the convolution; None means without.
        negative_eigenvalues: Whether beta lies in (0, 2) instead of (0, 1), which tracking a state needs.
        bias: Whether the projections have biases.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        key_dim: int,
        value_dim: int,
        d_conv: int | None,
        negative_eigenvalues: bool,
        bias: bool,
    ) -> None:
        super().__init__(d_model, n_heads=n_heads, key_dim=key_dim, value_dim=value_dim, d_conv=d_conv, bias=bias)
        check_flags(negative_eigenvalues=negative_eigenvalues)
        self.negative_eigenvalues = negative_eigenvalues
        self.beta_proj = nn.Linear(d_model, n_heads, bias=bias)

    def log_decay(self, x: Tensor) -> Tensor | None:
        """That of the op."""
        return None

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        """The delta rule on queries and keys of length 1."""
        dtype = accumulator(q.dtype)
        q, k = (F.normalize(value.to(dtype), dim=-1, eps=1e-6).to(v.dtype) for value in (q, k))
        beta = torch.sigmoid(self.beta_proj(x).to(dtype))
        if self.negative_eigenvalues:
            beta = 2 * beta
        o, S = delta_rule(q, k, v, beta, self.log_decay(x), None if state is None else state["S"], cu_seqlens=packing)
        return o, {"S": S}
