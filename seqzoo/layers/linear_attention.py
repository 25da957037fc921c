"""Linear attention: the softmax's kernel replaced by a product of features, so that keys and values fit a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.kernels.linear_attention.op import WIDEST_KEY
from seqzoo.mixer import State, StateSpec, nearest, register
from seqzoo.modules.heads import HeadMixer, count_heads
from seqzoo.modules.options import check_flags
from seqzoo.packing import Packing


def _taylor(x: Tensor) -> Tensor:
    """Features whose product is ``1 + s + s^2 / 2`` of ``s = q.k / sqrt(K)``; mixed squares once, times sqrt(2)."""
    size = x.shape[-1]
    x = x * size**-0.25
    rows, columns = torch.triu_indices(size, size, 1, device=x.device)
    squares = torch.cat((x.square() * math.sqrt(0.5), x[..., rows] * x[..., columns]), dim=-1)
    return torch.cat((torch.ones_like(x[..., :1]), x, squares), dim=-1)


# the features of a head, and how many there are of so many dimensions
FEATURE_MAPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int], int]]] = {
    "elu+1": (lambda x: F.elu(x) + 1, lambda size: size),
    "relu": (F.relu, lambda size: size),
    "taylor": (_taylor, lambda size: 1 + size + size * (size + 1) // 2),
    "learned": (lambda x: torch.cat((x.softmax(-1), (-x).softmax(-1)), dim=-1), lambda size: 2 * size),
}


@register(
    "linear_attention",
    paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    arxiv="2006.16236",
    year=2020,
)
class LinearAttention(HeadMixer):
    """Linear attention, "Transformers are RNNs", https://arxiv.org/abs/2006.16236, section 3.2.

    For every head, with features phi of queries and keys::

        S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)
        o_t = phi(q_t) S_t / (phi(q_t) z_t)   without ``normalise``: phi(q_t) S_t, then an RMS norm

    State: ``{"S": (B, H, features, head_dim), "z": (B, H, features)}``, float32 (float64 for float64 inputs), and
    ``"conv"`` with ``d_conv``.

    Args:
        d_model: Width of inputs and outputs.
        n_heads: Heads; None means as many as ``head_dim`` needs.
        head_dim: Width of a head; None means 64, with the Taylor map 16, or the largest divisor of ``d_model`` below.
        feature_map: ``"elu+1"`` as in the paper; ``"relu"``; ``"taylor"``, the exponential's second order
            (https://arxiv.org/abs/2402.18668, section 3.1); ``"learned"``, softmaxes of a learned projection of each
            head and of its negative (https://arxiv.org/abs/2402.04347, section 4).
        normalise: Whether outputs are divided by the sum of their weights.
        d_conv: Taps of a convolution before q, k and v are split; None means without.
        bias: Whether the projections have biases.
    """

    activation = None
    # a SiLU ends at -0.28: elu + 1 of it would hardly tell one key from another
    conv_activation = None
    gate = None
    variants = (
        {"n_heads": 2},
        {"feature_map": "taylor", "head_dim": 4, "d_conv": 3},
        {"feature_map": "learned", "n_heads": 2, "normalise": False, "bias": True},
    )

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        feature_map: str = "elu+1",
        normalise: bool = True,
        d_conv: int | None = None,
        bias: bool = False,
    ) -> None:
        check_flags(normalise=normalise)
        if not isinstance(feature_map, str) or feature_map not in FEATURE_MAPS:
            raise ValueError(f"there is no feature map {feature_map!r}; {nearest(str(feature_map), FEATURE_MAPS)}")
        heads, size = count_heads(d_model, n_heads, head_dim, 16 if feature_map == "taylor" else 64)
        self.feature_map, self.features = feature_map, FEATURE_MAPS[feature_map][1](size)
        if self.features > WIDEST_KEY:
            raise ValueError(
                f"{feature_map} makes {self.features} features of heads of {size}, at most {WIDEST_KEY} fit; "
                "choose a smaller head_dim"
            )
        super().__init__(
            d_model,
            n_heads=heads,
            key_dim=size,
            value_dim=size,
            d_conv=d_conv,
            normalise=not normalise,
            bias=bias,
        )
        learned = torch.empty(2, heads, size, size) if feature_map == "learned" else None
        self.feature_proj = None if learned is None else nn.Parameter(learned)
        self.divide = normalise
        self.reset_parameters()

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        """The features, and the sum of the keys as one more column of the values."""
        if self.feature_proj is not None:
            q, k = (
                torch.einsum("bthk,hkl->bthl", value, weight.to(value.dtype))
                for value, weight in zip((q, k), self.feature_proj, strict=True)
            )
        q, k = (FEATURE_MAPS[self.feature_map][0](value).to(v.dtype) for value in (q, k))
        if not self.divide:
            o, S = linear_attention(q, k, v, None, _entry(state, "S"), cu_seqlens=packing)
            return o, {"S": S}
        dtype = v.dtype
        if dtype == torch.float16:  # which the sum of many features exceeds
            q, k, v = q.float(), k.float(), v.float()
        given = None if state is None else torch.cat((state["S"], state["z"][..., None]), dim=-1)
        o, S = linear_attention(q, k, F.pad(v, (0, 1), value=1.0), None, given, scale=1.0, cu_seqlens=packing)
        o, total = o[..., :-1], o[..., -1:]
        o = (o / total.clamp(min=torch.finfo(accumulator(v.dtype)).tiny ** 0.5)).to(dtype)
        return o, {"S": S[..., :-1], "z": S[..., -1]}

    def recurrent_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """The matrix of every head, and the sum of its keys."""
        rows, kind = (batch_size, self.n_heads, self.features), accumulator(dtype)
        spec: StateSpec = {"S": ((*rows, self.value_dim), kind)}
        return {**spec, "z": (rows, kind)} if self.divide else spec

    def reset_parameters(self) -> None:
        """PyTorch's initialisation with zero biases; learned features start as the heads themselves."""
        super().reset_parameters()
        if self.feature_proj is not None:
            with torch.no_grad():
                self.feature_proj.copy_(
                    torch.eye(self.key_dim, device=self.feature_proj.device).expand_as(self.feature_proj)
                )


def _entry(state: State | None, name: str) -> Any:
    return None if state is None else state[name]
