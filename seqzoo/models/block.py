"""One layer of a model: a mixer and an MLP, each with a norm and a residual connection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqzoo.mixer import SequenceMixer, State
from seqzoo.modules.mlp import MLPS, hidden_units
from seqzoo.modules.norm import EPS, NORMS
from seqzoo.packing import Packing


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``; with ``norm_position="post"`` ``norm(x + mixer(x))``.

    Args:
        mixer: Any mixer; its ``d_model`` is the block's.
        mlp: ``"gated"``, ``"plain"`` or ``"none"``.
        mlp_ratio: Hidden units of the MLP in multiples of ``d_model``; None means its default.
        norm: ``"rms"``, ``"layer"`` or ``"batch"``.
        norm_eps: Epsilon of the norms.
        norm_position: ``"pre"`` or ``"post"``.
        dropout: Probability with which outputs of mixer and MLP are dropped in training.
        branches: Branches that add to the residual in the whole stack. With norms before the branches the residual's
            variance grows with each of them, so output projections start at ``branches ** -0.5`` of their size. They
            are found by name: the linear layers called ``out_proj``, of the MLP and anywhere inside the mixer, that end
            in ``d_model`` features. A mixer without one (minGRU as wide as the model) keeps its own scale.
    """

    def __init__(
        self,
        mixer: SequenceMixer,
        *,
        mlp: str = "gated",
        mlp_ratio: float | None = None,
        norm: str = "rms",
        norm_eps: float = EPS,
        norm_position: str = "pre",
        dropout: float = 0.0,
        branches: int = 1,
    ) -> None:
        super().__init__()
        d_model = mixer.d_model
        self.pre, self.batch_norm, self.branches = norm_position == "pre", norm == "batch", branches
        self.mixer_norm = NORMS[norm](d_model, norm_eps)
        self.mixer = mixer
        self.dropout = nn.Dropout(dropout)
        if mlp == "none":
            self.mlp_norm = self.mlp = None
        else:
            network, ratio = MLPS[mlp]
            self.mlp_norm = NORMS[norm](d_model, norm_eps)
            self.mlp = network(d_model, hidden_units(d_model, ratio if mlp_ratio is None else mlp_ratio))

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | Packing | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None, Tensor]:
        """Maps ``(B, T, D)`` to ``(B, T, D)``, the mixer's state or None, and its auxiliary loss, a scalar.

        Raises:
            ValueError: If batch norm meets packing or a state.
        """
        if self.batch_norm and (cu_seqlens is not None or state is not None or return_state):
            raise ValueError("norm='batch' takes dense batches, no packing and no state; use norm='rms' or 'layer'")
        mixed, state, auxiliary = self.mixer(
            self.mixer_norm(x) if self.pre else x,
            state,
            cu_seqlens=cu_seqlens,
            return_state=return_state,
            return_auxiliary=True,
        )
        return self._feed_forward(x, mixed), state, auxiliary

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Decodes one token: ``(B, D)`` and a state to ``(B, D)`` and the next state."""
        if self.batch_norm:
            raise ValueError("norm='batch' takes whole sequences alone and cannot step; use norm='rms' or 'layer'")
        mixed, state = self.mixer.step(self.mixer_norm(x) if self.pre else x, state)
        return self._feed_forward(x, mixed), state

    def _feed_forward(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(mixed)
        if not self.pre:
            x = self.mixer_norm(x)
        if self.mlp is None or self.mlp_norm is None:
            return x
        if self.pre:
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))

    def reset_parameters(self) -> None:
        """The parts' own initialisations, then the output projections scaled as ``branches`` says."""
        for part in (self.mixer_norm, self.mixer, self.mlp_norm, self.mlp):
            if part is not None:
                part.reset_parameters()
        if self.pre:
            with torch.no_grad():
                for projection in self.output_projections():
                    projection.weight.mul_(self.branches**-0.5)

    def output_projections(self) -> list[nn.Linear]:
        """The linear layers that end a branch, which ``reset_parameters`` scales."""
        return [
            module
            for name, module in self.named_modules()
            if name.rpartition(".")[2] == "out_proj"
            and isinstance(module, nn.Linear)
            and module.out_features == self.mixer.d_model
        ]
