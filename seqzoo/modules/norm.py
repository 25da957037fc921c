"""The normalisations between the mixers, chosen by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


class RMSNorm(nn.RMSNorm):
    """``x / rms(x) * scale`` over the last dimension, https://arxiv.org/abs/1910.07467.

    The mean square is float32 for float16 and bfloat16 inputs; the scale starts at 1.
    """

    def __init__(self, d_model: int, eps: float = EPS) -> None:
        super().__init__(d_model, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``, of the scale's dtype (that of a residual, or under autocast, may differ)."""
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation, https://arxiv.org/abs/1607.06450; statistics are float32 for float16 and bfloat16 inputs."""

    def __init__(self, d_model: int, eps: float = EPS) -> None:
        super().__init__(d_model, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``, of the scale's dtype."""
        return super().forward(input.to(self.weight.dtype))


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over batch and time, https://arxiv.org/abs/1502.03167.

    In training every token is normalised by statistics of all others, the later ones and those of other sequences
    included. Of packed sequences, as which models run padded ones, those are the true tokens; implementations that
    pad have padding in their statistics.
    """

    def __init__(self, d_model: int, eps: float = EPS) -> None:
        super().__init__(d_model, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """``(B, T, D)`` to ``(B, T, D)``, of the scale's dtype."""
        flat = input.flatten(0, 1).to(self.weight.dtype)
        return super().forward(flat).view(input.shape)


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "batch": BatchNorm}
