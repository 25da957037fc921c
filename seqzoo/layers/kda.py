"""Kimi Delta Attention: the delta rule on a state whose rows decay each at its own rate."""

from __future__ import annotations

from torch import Tensor, nn

from seqzoo.mixer import register
from seqzoo.modules.delta import DeltaMixer
from seqzoo.modules.heads import count_heads
from seqzoo.modules.steps import StepDecay


@register("kda", paper="Kimi Linear: An Expressive, Efficient Attention Architecture", arxiv="2510.26692", year=2025)
class KimiDeltaAttention(DeltaMixer):
    """Kimi Delta Attention, "Kimi Linear", https://arxiv.org/abs/2510.26692, sections 3 and 4.

    For every head, with ``q, k, v = silu(conv(W x))``, q and k divided by their lengths and ``beta = sigmoid(W_b x)``::

        log_decay_t = -exp(A_log) softplus(W_2 W_1 x_t + dt_bias)        (K,)
        S' = diag(exp(log_decay_t)) S_{t-1}
        S_t = S' + beta_t k_t (v_t - k_t S')^T        o_t = q_t S_t / sqrt(K)
        y_t = W_o (norm(o_t) sigmoid(G_2 G_1 x_t))

    State: ``{"S": (B, H, K, K)}``, float32 (float64 for float64 inputs), and ``"conv"`` with ``d_conv``.

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads; None means as many as ``head_dim`` needs.
        head_dim: K, and the rank of the decay's and the gate's projections; None means 128, or the largest divisor of
            ``d_model`` below.
        d_conv: Taps of the convolution; None means without.
        negative_eigenvalues: Whether beta lies in (0, 2), https://arxiv.org/abs/2411.12537.
        bias: Whether the projections have biases (the gate's always has).
    """

    gate = "sigmoid"
    fp32_parameters = ("decay.A_log", "decay.dt_bias")
    variants = ({"n_heads": 2}, {"n_heads": 4, "d_conv": None, "negative_eigenvalues": True, "bias": True})

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        d_conv: int | None = 4,
        negative_eigenvalues: bool = False,
        bias: bool = False,
    ) -> None:
        heads, size = count_heads(d_model, n_heads, head_dim, 128)
        super().__init__(
            d_model,
            n_heads=heads,
            key_dim=size,
            value_dim=size,
            d_conv=d_conv,
            negative_eigenvalues=negative_eigenvalues,
            bias=bias,
        )
        self.decay_proj = nn.Sequential(nn.Linear(d_model, size, bias=False), nn.Linear(size, d_model, bias=False))
        self.decay = StepDecay(heads, d_model)
        self.gate_proj = nn.Sequential(nn.Linear(d_model, size, bias=False), nn.Linear(size, d_model))
        self.reset_parameters()

    def log_decay(self, x: Tensor) -> Tensor:
        """One a key of every head."""
        return self.decay(self.decay_proj(x))
