"""Longhorn: a state space model whose transition is the closed-form solution of online regression."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.mixer import register
from seqzoo.modules.selective_block import SelectiveBlock


@register("longhorn", paper="Longhorn: State Space Models are Amortized Online Learners", arxiv="2407.14207", year=2024)
class Longhorn(SelectiveBlock):
    """Longhorn, "Longhorn: State Space Models are Amortized Online Learners", https://arxiv.org/abs/2407.14207.

    Section 3, with the diagonal approximation of section 3.3. With ``E = expand * d_model`` channels and
    ``[u, z] = W_in x``::

        u = silu(conv(u))                    depthwise, causal, d_conv taps
        [r, k, q] = W_x u                    dt_rank, d_state and d_state values a token
        beta = sigmoid(W_dt r + b_dt)        (E,), the weight of recalling this token
        eps = beta / (1 + beta |k|^2)
        h_t = (1 - eps k_t^2) h_{t-1} + eps u_t k_t     (E, d_state), products over both taken elementwise
        y_t = W_out ((h_t q_t + D u_t) silu(z_t))

    The factors lie in (0, 1) whatever the weights, so there is neither an A nor a forget gate.

    State: ``{"conv": (B, d_conv - 1, E), "ssm": (B, E, d_state)}``, the first of the inputs' dtype, the second float32
    (float64 for float64 inputs).

    Args:
        d_model: Width of inputs and outputs.
        d_state: Size of the keys, and values of the state a channel.
        d_conv: Taps of the convolution, 2 to 8.
        expand: Channels in multiples of ``d_model``.
        dt_rank: Rank of beta's projection; None means ``d_model / 16``, rounded up.
        bias: Whether W_in and W_out have biases.
        conv_bias: Whether the convolution has one.
    """

    transition = "longhorn"
    softplus = False
    fp32_parameters = ("D",)
    variants = ({}, {"d_state": 3, "d_conv": 2, "expand": 1.5, "dt_rank": 2, "bias": True})

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
    ) -> None:
        super().__init__(
            d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank, bias=bias, conv_bias=conv_bias
        )
        self.reset_parameters()

    def step_from(self, delta: Tensor) -> Tensor:
        """A sigmoid."""
        return torch.sigmoid(delta + self.dt_proj.bias)
