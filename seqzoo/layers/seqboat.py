"""SeqBoat: a state space that decides which tokens attend to one another."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.ssm_scan import ssm_scan
from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec, register
from seqzoo.modules.compaction import Compaction
from seqzoo.modules.key_values import attend_to_ring, ring_spec
from seqzoo.modules.options import check_count, check_number, scaled_width
from seqzoo.packing import Packing


@register(
    "seqboat",
    paper="Sparse Modular Activation for Efficient Sequence Modeling",
    arxiv="2306.11197",
    year=2023,
)
class SeqBoat(SequenceMixer):
    """SeqBoat, "Sparse Modular Activation", https://arxiv.org/abs/2306.11197, section 3.

    With a moving average in ``d_state`` dimensions a channel (Mega, https://arxiv.org/abs/2209.10655, section 3.1)::

        m_t = silu(sum over n of gamma_n h_t^n / sqrt(d_state) + omega x_t)
        h_t^n = (1 - a_n d_n) h_{t-1}^n + a_n beta_n x_t        a = sigmoid(alpha), d = sigmoid(delta)

        [l_t, s_t] = W_m m_t        w_t = softmax(l_t / exp(log_temperature))[1], of two
        a token is active where w_t > 1 / 2; for the others h_t = 0

        [z, r, v] = silu(W_a m_t), for active tokens alone
        h_t = W_h (r * attention of z * scale_q + shift_q to z * scale_k + shift_k, of values v)
        y_t = W_o silu(s_t + w_t h_t + x_t)

    A token attends to the last ``window`` active tokens, however long ago they were. Tokens that are not active cost
    nothing but the moving average and W_m: the others are taken together, and lie behind one another. Attention is the
    paper's softmax variant, of one head; there are no positions but those that the moving average makes. W_o is not in
    the paper: with it deep models of residual blocks begin near their inputs.

    The router learns through the weight alone. Its decisions are hard: rounding can flip one where both
    probabilities are nearly equal, and the outputs jump.

    State: ``{"x": (B, D, d_state), "k": (B, window, 1, key_dim), "v": (B, window, 1, E), "length": (B,)}``: the moving
    averages, float32 (float64 for float64 inputs), keys and values of the last active tokens, of the inputs' dtype, and
    the number of active tokens so far.

    Args:
        d_model: Width of inputs and outputs, D.
        window: Active tokens that a token sees, its own included.
        d_state: Averages of every channel.
        key_dim: Width of queries and keys.
        expand: Values E in multiples of ``d_model``.
        temperature: Temperature of the router at the beginning of training, in multiples of ``sqrt(d_model)``.
    """

    packs = True
    discontinuous = True
    fp32_parameters = ("alpha", "delta", "beta", "gamma", "omega", "log_temperature")
    variants = (
        {"window": 3, "d_state": 2, "key_dim": 6},
        {"window": 8, "d_state": 3, "key_dim": 8, "expand": 1, "temperature": 1.0},
    )

    def __init__(
        self,
        d_model: int,
        *,
        window: int = 128,
        d_state: int = 16,
        key_dim: int = 64,
        expand: float = 2,
        temperature: float = 0.3,
    ) -> None:
        super().__init__(d_model)
        self.window, self.d_state = check_count("window", window), check_count("d_state", d_state)
        self.key_dim, self.width = check_count("key_dim", key_dim), scaled_width(d_model, "expand", expand)
        self.temperature = check_number("temperature", temperature, above=0)
        self.alpha = nn.Parameter(torch.empty(d_model, d_state))
        self.delta = nn.Parameter(torch.empty(d_model, d_state))
        self.beta = nn.Parameter(torch.empty(d_model, d_state))
        self.gamma = nn.Parameter(torch.empty(d_model, d_state))
        self.omega = nn.Parameter(torch.empty(d_model))
        self.m_proj = nn.Linear(d_model, 2 + d_model)
        self.log_temperature = nn.Parameter(torch.empty(()))
        self.a_proj = nn.Linear(d_model, key_dim + 2 * self.width)
        self.scale = nn.Parameter(torch.empty(2, key_dim))
        self.shift = nn.Parameter(torch.empty(2, key_dim))
        self.h_proj = nn.Linear(self.width, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Averages, decides, lets the active tokens attend, adds up."""
        m, averages = self.average(x, state, packing)
        logits, skip = self.m_proj(m).split((2, self.d_model), dim=-1)
        kind = accumulator(x.dtype)
        gap = logits[..., 1].to(kind) - logits[..., 0].to(kind)
        weight, active = torch.sigmoid(gap * torch.exp(-self.log_temperature.to(kind))), gap > 0
        given = None
        if state is not None:
            given = {name: state[name] for name in ("k", "v", "length")}
        h, ring = self.attend(m, active, given, packing, return_state)
        y = self.out_proj(F.silu(skip + (h * weight[..., None]).to(h.dtype) + x))
        if ring is None:
            return Mixed(y)
        # under autocast the projections are narrower than x, whose dtype copies of inputs have
        return Mixed(y, {"x": averages, **ring, "k": ring["k"].to(x.dtype), "v": ring["v"].to(x.dtype)})

    def average(self, x: Tensor, state: State | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """The moving average and its activation, of x's dtype, and the averages after the last token."""
        kind = accumulator(x.dtype)
        alpha, delta, beta, gamma = (
            value.to(kind) for value in (self.alpha.sigmoid(), self.delta.sigmoid(), self.beta, self.gamma)
        )
        # x' = A x + b u held for a step of 1: exp(A) = 1 - alpha delta, and b is what makes an input count alpha beta
        pole = torch.log1p(-alpha * delta)
        inputs = beta * pole / -delta
        zero = torch.zeros_like(pole)
        poles, b, c = (torch.complex(value, zero) for value in (pole, inputs, gamma / math.sqrt(self.d_state)))
        given = None
        if state is not None:
            given = torch.complex(state["x"], torch.zeros_like(state["x"]))
        averaged, after = ssm_scan(x, poles, b, c, torch.ones_like(pole[:, 0]), given, cu_seqlens=packing)
        return F.silu(averaged + (self.omega * x).to(x.dtype)), after.real.contiguous()

    def attend(
        self, m: Tensor, active: Tensor, ring: State | None, packing: Packing | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """Gated attention of active tokens, zero for the others, and the ring of keys and values.

        Args:
            m: ``(B, T, D)``.
            active: bool ``(B, T)``.
            ring: Of the layer's state.
            packing: Of packed sequences.
            return_state: Whether the ring is wanted.
        """
        chosen = Compaction.of(active, packing)
        widths = (self.key_dim, self.width, self.width)
        z, r, v = F.silu(self.a_proj(chosen.gather(m))).split(widths, dim=-1)
        q, k = (z * self.scale[index] + self.shift[index] for index in range(2))
        rows = m.shape[0] if packing is None else packing.n_sequences
        q, k, v = (value.to(z.dtype)[:, :, None] for value in (q, k, v))
        if ring is not None:
            ring = {**ring, "k": ring["k"].to(k.dtype), "v": ring["v"].to(v.dtype)}
        elif return_state:
            ring = {
                "k": k.new_zeros(rows, self.window, 1, self.key_dim),
                "v": v.new_zeros(rows, self.window, 1, self.width),
                "length": torch.zeros(rows, dtype=torch.int64, device=m.device),
            }
        o, after = attend_to_ring(q, k, v, ring, chosen.packing, return_state, self.window)
        return chosen.scatter(self.h_proj(o[:, :, 0] * r), active), after

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """The averages, and the ring."""
        averages = ((batch_size, self.d_model, self.d_state), accumulator(dtype))
        return {"x": averages, **ring_spec(batch_size, self.window, 1, self.key_dim, self.width, dtype)}

    def flops(self, length: int) -> int:
        """Where every token is active: 2 a matrix weight and token, scores and sums, 4 a moving average."""
        weights = sum(layer.weight.numel() for layer in (self.m_proj, self.a_proj, self.h_proj, self.out_proj))
        seen = min(length, self.window)
        pairs = seen * (seen + 1) // 2 + (length - seen) * self.window
        return 2 * length * weights + 2 * pairs * (self.key_dim + self.width) + 4 * length * self.d_model * self.d_state

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """The moving average does not decay, nor what scales queries and keys."""
        names = ("alpha", "delta", "beta", "gamma", "scale", "shift")
        return {name: {"weight_decay": 0.0} for name in names}

    def reset_parameters(self) -> None:
        """As in Mega's moving average; PyTorch's initialisation of the maps with zero biases."""
        for layer in (self.m_proj, self.a_proj, self.h_proj, self.out_proj):
            layer.reset_parameters()
            nn.init.zeros_(layer.bias)
        for parameter in (self.alpha, self.delta):
            nn.init.normal_(parameter, std=0.2)
        with torch.no_grad():
            # signs that alternate, so that the averages differ
            signs = 1 - 2 * (torch.arange(self.d_state, device=self.beta.device) % 2)
            self.beta.normal_(std=0.02).add_(signs)
            self.log_temperature.fill_(math.log(self.temperature * math.sqrt(self.d_model)))
        nn.init.normal_(self.gamma)
        nn.init.normal_(self.omega)
        nn.init.normal_(self.scale, std=0.02)
        nn.init.zeros_(self.shift)
