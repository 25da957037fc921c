"""Gated DeltaNet: the delta rule on a state that decays."""

from __future__ import annotations

from torch import Tensor, nn

from seqzoo.mixer import register
from seqzoo.modules.delta import DeltaMixer
from seqzoo.modules.heads import count_heads
from seqzoo.modules.options import scaled_width
from seqzoo.modules.steps import StepDecay


@register(
    "gated_deltanet", paper="Gated Delta Networks: Improving Mamba2 with Delta Rule", arxiv="2412.06464", year=2024
)
class GatedDeltaNet(DeltaMixer):
    """Gated DeltaNet, https://arxiv.org/abs/2412.06464, section 3.

    For every head, with ``q, k, v = silu(conv(W x))``, q and k divided by their lengths and ``beta = sigmoid(W_b x)``::

        log_decay_t = -exp(A_log) softplus(W_a x_t + dt_bias)
        S' = exp(log_decay_t) S_{t-1}
        S_t = S' + beta_t k_t (v_t - k_t S')^T        o_t = q_t S_t / sqrt(K)
        y_t = W_o (norm(o_t) silu(W_g x_t))

    State: ``{"S": (B, H, K, V)}``, float32 (float64 for float64 inputs), and ``"conv"`` with ``d_conv``.

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads; None means as many as ``head_dim`` needs.
        expand_k: Keys of all heads in multiples of ``d_model``.
        head_dim: K; None means 256, or the largest divisor of the keys below.
        expand_v: V in multiples of K.
        d_conv: Taps of the convolution; None means without.
        negative_eigenvalues: Whether beta lies in (0, 2), https://arxiv.org/abs/2411.12537.
        bias: Whether the projections have biases.
    """

    fp32_parameters = ("decay.A_log", "decay.dt_bias")
    variants = (
        {"n_heads": 2},
        {"n_heads": 4, "expand_k": 1, "expand_v": 1, "d_conv": None, "negative_eigenvalues": True, "bias": True},
    )

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        expand_k: float = 0.75,
        head_dim: int | None = None,
        expand_v: float = 2,
        d_conv: int | None = 4,
        negative_eigenvalues: bool = False,
        bias: bool = False,
    ) -> None:
        heads, size = count_heads(scaled_width(d_model, "expand_k", expand_k), n_heads, head_dim, 256)
        super().__init__(
            d_model,
            n_heads=heads,
            key_dim=size,
            value_dim=scaled_width(size, "expand_v", expand_v),
            d_conv=d_conv,
            negative_eigenvalues=negative_eigenvalues,
            bias=bias,
        )
        self.decay_proj = nn.Linear(d_model, heads, bias=False)
        self.decay = StepDecay(heads, heads)
        self.reset_parameters()

    def log_decay(self, x: Tensor) -> Tensor:
        """One a head."""
        return self.decay(self.decay_proj(x))
