"""DeltaNet: linear attention that replaces what a key already holds."""

from __future__ import annotations

from seqzoo.mixer import register
from seqzoo.modules.delta import DeltaMixer
from seqzoo.modules.heads import count_heads


@register(
    "deltanet",
    paper="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    arxiv="2406.06484",
    year=2024,
)
class DeltaNet(DeltaMixer):
    """DeltaNet, https://arxiv.org/abs/2406.06484, section 3.

    For every head, with ``q, k, v = silu(conv(W x))``, q and k divided by their lengths and ``beta = sigmoid(W_b x)``::

        S_t = S_{t-1} + beta_t k_t (v_t - k_t S_{t-1})^T        o_t = q_t S_t / sqrt(K)
        y_t = W_o norm(o_t)

    State: ``{"S": (B, H, K, K)}``, float32 (float64 for float64 inputs), and ``"conv"`` with ``d_conv``.

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads; None means as many as ``head_dim`` needs.
        head_dim: K; None means 128, or the largest divisor of ``d_model`` below.
        d_conv: Taps of the convolution; None means without.
        negative_eigenvalues: Whether beta lies in (0, 2), https://arxiv.org/abs/2411.12537.
        bias: Whether the projections have biases.
    """

    gate = None
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
        self.reset_parameters()
