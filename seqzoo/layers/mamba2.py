"""Mamba-2: a selective state space model with one decay a head, which is linear attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.kernels.linear_attention.op import check_keys
from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec, register
from seqzoo.modules.heads import OutputNorm, count_heads
from seqzoo.modules.options import check_count, check_flags, check_number, check_pair, scaled_width
from seqzoo.modules.short_conv import ShortConv
from seqzoo.modules.steps import check_steps, reset_rates, reset_step_bias, step_of
from seqzoo.packing import Packing


@register(
    "mamba2",
    paper="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    arxiv="2405.21060",
    year=2024,
)
class Mamba2(SequenceMixer):
    """Mamba-2, "Transformers are SSMs", https://arxiv.org/abs/2405.21060, section 7.

    With ``E = expand * d_model`` channels in H heads of ``head_dim``, and G groups of heads that share B and C::

        [z, x, B, C, dt] = W_in u          E, E, G d_state, G d_state and H values a token
        [x, B, C] = silu(conv([x, B, C]))
        step = softplus(dt + dt_bias), within ``dt_limit``
        S_t = exp(-exp(A_log) step) S_{t-1} + B_t (step x_t)^T        (d_state, head_dim) a head
        y_t = W_out (norm((C_t S_t + D x_t) silu(z_t)))                  the norm over each group's channels

    State: ``{"conv": (B, d_conv - 1, E + 2 G d_state), "S": (B, H, d_state, head_dim)}``, the first of the inputs'
    dtype, the second float32 (float64 for float64 inputs).

    Parameters have the names and shapes of published Mamba-2 weights. A_log, D and dt_bias stay float32.

    Args:
        d_model: Width of inputs and outputs.
        d_state: Rows of a head's state.
        d_conv: Taps of the convolution, 2 to 8.
        expand: Channels in multiples of ``d_model``.
        n_heads: Heads; None means as many as ``head_dim`` needs.
        head_dim: Channels of a head; None means 64, or the largest divisor of E below.
        n_groups: Groups of heads.
        dt_min: Least step at the beginning of training; steps are drawn log-uniformly.
        dt_max: Greatest step at the beginning of training.
        dt_init_floor: Steps drawn below are raised to this.
        dt_limit: Range into which steps are clamped.
        A_range: Range of the rates of decay at the beginning of training.
        norm_eps: Epsilon of the norm.
        bias: Whether W_in and W_out have biases.
        conv_bias: Whether the convolution has one.
    """

    packs = True
    fp32_parameters = ("A_log", "D", "dt_bias")
    variants = (
        {"d_state": 4, "n_heads": 2},
        {"d_state": 3, "n_heads": 4, "n_groups": 2, "d_conv": 2, "dt_limit": (0.01, 0.5), "bias": True},
    )

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        n_heads: int | None = None,
        head_dim: int | None = None,
        n_groups: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        A_range: tuple[float, float] = (1.0, 16.0),
        norm_eps: float = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
    ) -> None:
        super().__init__(d_model)
        check_steps(dt_min, dt_max, dt_init_floor)
        width = scaled_width(d_model, "expand", expand)
        heads, size = count_heads(width, n_heads, head_dim, 64)
        check_flags(bias=bias, conv_bias=conv_bias)
        check_keys(check_count("d_state", d_state))
        check_number("norm_eps", norm_eps, above=0)
        if heads % check_count("n_groups", n_groups) != 0:
            raise ValueError(f"n_groups must divide the {heads} heads, got {n_groups}")
        low, high = check_pair("dt_limit", dt_limit)
        if not 0 <= low < high:
            raise ValueError(f"dt_limit must be a range of positive numbers, got {dt_limit}")
        low, high = check_pair("A_range", A_range)
        if not 0 < low <= high < float("inf"):
            raise ValueError(f"A_range must be a range of positive numbers, got {A_range}")
        self.width, self.n_heads, self.head_dim, self.n_groups, self.d_state = width, heads, size, n_groups, d_state
        self.steps, self.dt_limit, self.A_range = (dt_min, dt_max, dt_init_floor), tuple(dt_limit), tuple(A_range)
        convolved = width + 2 * n_groups * d_state
        self.in_proj = nn.Linear(d_model, width + convolved + heads, bias=bias)
        self.conv1d = ShortConv(convolved, d_conv, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = OutputNorm(width, gate_first=True, n_groups=n_groups, eps=norm_eps)
        self.out_proj = nn.Linear(width, d_model, bias=bias)
        self.reset_parameters()

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Projects, convolves, runs the state space, normalises what is gated, projects."""
        convolved = self.width + 2 * self.n_groups * self.d_state
        z, xBC, dt = self.in_proj(x).split((self.width, convolved, self.n_heads), dim=-1)
        xBC, conv = self.conv1d(xBC, None if state is None else state["conv"].to(xBC.dtype), packing)
        groups = self.n_groups * self.d_state
        u, B, C = xBC.split((self.width, groups, groups), dim=-1)
        u = u.unflatten(-1, (self.n_heads, -1))
        B, C = (value.unflatten(-1, (self.n_groups, -1)) for value in (B, C))
        step = step_of(dt, self.dt_bias)
        if self.dt_limit != (0.0, float("inf")):
            step = step.clamp(*self.dt_limit)
        log_decay = -torch.exp(self.A_log.to(step.dtype)) * step
        values = (u * step[..., None]).to(u.dtype)
        o, after = self.recur(C, B, values, log_decay, u, state, packing)
        y = o + (u * self.D.to(step.dtype)[:, None]).to(o.dtype)
        y = self.out_proj(self.norm(y.flatten(2), z))
        # under autocast the projection is narrower than x, whose dtype copies of inputs have
        kinds = self.state_spec(x.shape[0], x.dtype)
        return Mixed(y, {name: value.to(kinds[name][1]) for name, value in {"conv": conv, **after}.items()})

    def recur(
        self,
        C: Tensor,
        B: Tensor,
        values: Tensor,
        log_decay: Tensor,
        u: Tensor,
        state: State | None,
        packing: Packing | None,
    ) -> tuple[Tensor, State]:
        """The state space.

        Args:
            C: ``(B, T, G, d_state)``.
            B: ``(B, T, G, d_state)``.
            values: ``(B, T, H, head_dim)``, the inputs times their steps.
            log_decay: ``(B, T, H)``.
            u: ``(B, T, H, head_dim)``, the inputs.
            state: Of the layer.
            packing: Of packed sequences.

        Returns:
            What is read, ``(B, T, H, head_dim)``, and the state but for the convolution's.
        """
        given = None if state is None else state["S"]
        o, S = linear_attention(C, B, values, log_decay, given, scale=1.0, cu_seqlens=packing)
        return o, {"S": S}

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """The convolution's last inputs, and the matrix of every head."""
        shape = batch_size, self.n_heads, self.d_state, self.head_dim
        return {"conv": self.conv1d.state_spec(batch_size, dtype), "S": (shape, accumulator(dtype))}

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """Neither A_log nor D nor dt_bias decays."""
        return {name: {"weight_decay": 0.0} for name in ("A_log", "D", "dt_bias")}

    def reset_parameters(self) -> None:
        """PyTorch's initialisation of the projections with zero biases; skip weights of 1."""
        for layer in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            layer.reset_parameters()
        for layer in (self.in_proj, self.out_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.ones_(self.D)
        reset_rates(self.A_log, *self.A_range)
        reset_step_bias(self.dt_bias, *self.steps)
