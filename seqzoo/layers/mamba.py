"""Mamba: a selective state space model whose step, B and C follow from the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqzoo.mixer import register
from seqzoo.modules.selective_block import SelectiveBlock
from seqzoo.modules.steps import check_steps, reset_step_bias


@register(
    "mamba", paper="Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arxiv="2312.00752", year=2023
)
class Mamba(SelectiveBlock):
    """Mamba, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", https://arxiv.org/abs/2312.00752.

    Sections 3.4 and 3.6. With ``E = expand * d_model`` channels and ``[u, z] = W_in x``::

        u = silu(conv(u))                    depthwise, causal, d_conv taps
        [r, B, C] = W_x u                    dt_rank, d_state and d_state values a token
        step = softplus(W_dt r + b_dt)       (E,)
        h_t = exp(step A) h_{t-1} + step u_t B_t        (E, d_state), A = -exp(A_log)
        y_t = W_out ((h_t C_t + D u_t) silu(z_t))

    State: ``{"conv": (B, d_conv - 1, E), "ssm": (B, E, d_state)}``, the first of the inputs' dtype, the second float32
    (float64 for float64 inputs).

    Parameters have the names and shapes of published Mamba weights. A_log, D and the bias of the step stay float32.

    Args:
        d_model: Width of inputs and outputs.
        d_state: Values of the state a channel.
        d_conv: Taps of the convolution, 2 to 8.
        expand: Channels in multiples of ``d_model``.
        dt_rank: Rank of the step's projection; None means ``d_model / 16``, rounded up.
        dt_min: Least step at the beginning of training; steps are drawn log-uniformly.
        dt_max: Greatest step at the beginning of training.
        dt_init_floor: Steps drawn below are raised to this.
        bias: Whether W_in and W_out have biases.
        conv_bias: Whether the convolution has one.
        norm_eps: r, B and C pass through an RMS norm without weights of this epsilon, as in Falcon Mamba
            (https://arxiv.org/abs/2410.05355, section 2.2); None means without.
    """

    transition = "exponential"
    softplus = True
    fp32_parameters = ("A_log", "D", "dt_proj.bias")
    variants = ({}, {"d_state": 3, "d_conv": 2, "expand": 1.5, "dt_rank": 2, "bias": True, "norm_eps": 1e-6})

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            bias=bias,
            conv_bias=conv_bias,
            norm_eps=norm_eps,
        )
        check_steps(dt_min, dt_max, dt_init_floor)
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.A_log = nn.Parameter(torch.empty(self.width, d_state))
        self.reset_parameters()

    def transition_matrix(self) -> Tensor:
        """Negative whatever A_log is."""
        return -torch.exp(self.A_log)

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """Neither A_log nor D decays."""
        return super().parameter_options() | {"A_log": {"weight_decay": 0.0}}

    def reset_parameters(self) -> None:
        """S4D's real initialisation, ``A_n = -n``, and steps between ``dt_min`` and ``dt_max`` (section 3.6)."""
        super().reset_parameters()
        with torch.no_grad():
            rates = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.A_log.device)
            self.A_log.copy_(rates.log().expand_as(self.A_log))
        reset_step_bias(self.dt_proj.bias, self.dt_min, self.dt_max, self.dt_init_floor)
