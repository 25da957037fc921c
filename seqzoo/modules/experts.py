"""A mixture of experts in place of an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.modules.routing import PartLinear, Router, Streams


class Experts(nn.Module):
    """Experts, each a gated MLP, of which every token goes to a few::

        p = softmax(W_r x)        chosen = the top_k experts of greatest p        w = p over its sum over chosen
        y = sum over chosen e of w_e W_o^e (silu(W_g^e x) * W_v^e x)

    "Outrageously Large Neural Networks", https://arxiv.org/abs/1701.06538, section 2.1, with the router and the loss of
    "Switch Transformers", https://arxiv.org/abs/2101.03961, section 2. No expert has a capacity and no token is
    dropped, so what a token gets depends on no other token.

    The choice is hard: outputs jump where two experts are equally probable, so comparisons in float32 need a margin
    between the last chosen probability and the next, as with the mixers that say ``discontinuous``. With ``top_k=1``
    the weight is 1 whatever the router says, which then learns from the auxiliary loss alone.

    Args:
        d_model: Width of the tokens.
        hidden: Hidden units of each expert.
        n_experts: Experts, E.
        top_k: Experts that a token goes to.

    Raises:
        ValueError: If a number is below 1, or ``top_k`` exceeds ``n_experts``.
    """

    def __init__(self, d_model: int, hidden: int, n_experts: int, top_k: int) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.router = Router(d_model, n_experts, top_k)
        self.in_proj = PartLinear(d_model, 2 * hidden, n_experts)
        self.out_proj = PartLinear(hidden, d_model, n_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(..., D)`` to ``(..., D)`` and ``(2, E)``: choices and sums of probabilities, for :meth:`imbalance`."""
        tokens = x.flatten(0, -2)
        choices, weights, probabilities = self.router(tokens)
        one_sequence = torch.zeros(tokens.shape[0], dtype=torch.int64, device=x.device)
        streams = Streams.of(choices, probabilities.shape[1], one_sequence, 1)
        gate, value = self.in_proj(tokens, streams).chunk(2, dim=-1)
        # the hidden units lie in the order of the streams already
        sorted_ = torch.arange(streams.order.shape[0], device=x.device)
        y = self.out_proj(F.silu(gate) * value, streams._replace(order=sorted_, place=sorted_, source=sorted_))
        y = streams.gather(y, weights).to(y.dtype).view(x.shape)
        counts = streams.bounds.diff().to(probabilities.dtype)
        return y, torch.stack((counts, probabilities.sum(0)))

    def imbalance(self, loads: Tensor) -> Tensor:
        """The auxiliary loss ``E sum_e f_e P_e``, https://arxiv.org/abs/2101.03961, section 2.2; a scalar.

        f_e is the share of the choices that fell on expert e, P_e the mean of its probability: 1 where all have the
        same share. A product of means over all tokens of a call, so that of a sequence is not the mean of its pieces'.

        Args:
            loads: ``(2, E)``, the sum of what :meth:`forward` gave for all tokens.
        """
        shares, means = loads / loads.sum(1, keepdim=True).clamp(min=1)
        return loads.shape[1] * (shares * means).sum()

    def reset_parameters(self) -> None:
        """The router's, and for every expert that of PyTorch's linear layers."""
        for part in (self.router, self.in_proj, self.out_proj):
            part.reset_parameters()
