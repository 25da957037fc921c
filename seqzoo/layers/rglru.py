"""RG-LRU: the real-gated linear recurrent unit of Griffin, in its recurrent block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.linear_scan import linear_scan
from seqzoo.mixer import Mixed, State, StateSpec, register
from seqzoo.modules.heads import count_heads
from seqzoo.modules.options import check_number, scaled_width
from seqzoo.modules.vector_mixer import VectorMixer
from seqzoo.packing import Packing


@register(
    "rglru",
    paper="Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
    arxiv="2402.19427",
    year=2024,
)
class RGLRU(VectorMixer):
    """The recurrent block of Griffin around the RG-LRU, https://arxiv.org/abs/2402.19427, sections 2.3 and 2.4.

    With ``E = expand * d_model`` channels, ``u = conv(W_x x)`` and block-diagonal W_r, W_i::

        r_t = sigmoid(W_r u_t + b_r)        i_t = sigmoid(W_i u_t + b_i)
        log a_t = -c softplus(Lambda) r_t
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)
        y_t = W_o (h_t gelu(W_g x_t))

    State: ``{"h": (B, E)}``, float32 (float64 for float64 inputs), and ``"conv"`` ``(B, d_conv - 1, E)``.

    Args:
        d_model: Width of inputs and outputs.
        expand: E in multiples of ``d_model``; the paper's is 4/3, rounded.
        n_heads: Blocks of W_r and W_i; None means blocks of 128, or of the largest divisor of E below.
        c: Power of the decay.
        d_conv: Taps of the convolution; None means without.
        bias: Whether the outer projections have biases.
    """

    fp32_parameters = ("Lambda",)
    variants = ({"n_heads": 2}, {"expand": 1.5, "n_heads": 4, "d_conv": None, "bias": True})

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 1,
        n_heads: int | None = None,
        c: float = 8.0,
        d_conv: int | None = 4,
        bias: bool = False,
    ) -> None:
        width = scaled_width(d_model, "expand", expand)
        super().__init__(d_model, width=width, conv_width=width, d_conv=d_conv, conv_activation=None)
        check_number("c", c, above=0)
        self.c = c
        heads, size = count_heads(width, n_heads, None, 128)
        self.in_proj = nn.Linear(d_model, 2 * width, bias=bias)
        self.gates_weight = nn.Parameter(torch.empty(2, heads, size, size))
        self.gates_bias = nn.Parameter(torch.empty(2, heads, size))
        self.Lambda = nn.Parameter(torch.empty(width))
        self.out_proj = nn.Linear(width, d_model, bias=bias)
        self.reset_parameters()

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Projects, convolves, scans, gates, projects."""
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u, after = self.convolve(x, u, state, packing)
        blocks = u.unflatten(-1, (self.gates_weight.shape[1], -1))
        raw = torch.einsum("bthk,ghkl->gbthl", blocks, self.gates_weight.to(u.dtype))
        raw = raw.to(accumulator(u.dtype)) + self.gates_bias[:, None, None].to(accumulator(u.dtype))
        recurrence, enter = torch.sigmoid(raw).flatten(3)
        log_a = -self.c * F.softplus(self.Lambda.to(recurrence.dtype)) * recurrence
        # 1 - a^2 without cancelling; a root of zero has no gradient
        weight = torch.sqrt(-torch.expm1(2 * log_a).clamp(max=-torch.finfo(log_a.dtype).tiny))
        addend = (weight * enter * u).to(u.dtype)
        h, final = linear_scan(torch.exp(log_a), addend, None if state is None else state["h"], cu_seqlens=packing)
        return Mixed(self.out_proj(h * F.gelu(gate)), after | {"h": final})

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """One value a channel."""
        return super().state_spec(batch_size, dtype) | {"h": ((batch_size, self.width), accumulator(dtype))}

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """Lambda does not decay."""
        return {"Lambda": {"weight_decay": 0.0}}

    def reset_parameters(self) -> None:
        """Fan-in scaling with zero biases; a^c between 0.9 and 0.999 where the gate is open (section 2.4)."""
        super().reset_parameters()
        bound = self.gates_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.gates_weight, -bound, bound)
        nn.init.zeros_(self.gates_bias)
        with torch.no_grad():
            drawn = torch.empty_like(self.Lambda, dtype=torch.float32).uniform_(0.9, 0.999)
            # softplus(Lambda) = -log(drawn) / c, hence Lambda = log(expm1(..))
            self.Lambda.copy_(torch.log(torch.expm1(-torch.log(drawn) / self.c)))
