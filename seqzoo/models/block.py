"""One layer of a model: a mixer and an MLP, each with a norm and a residual connection."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqzoo.mixer import SequenceMixer, State
from seqzoo.models.parallel_mixers import ParallelMixers
from seqzoo.modules.experts import Experts
from seqzoo.modules.mlp import MLPS, hidden_units
from seqzoo.modules.norm import EPS, NORMS
from seqzoo.modules.routing import PartLinear
from seqzoo.packing import Packing


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``; with ``norm_position="post"`` ``norm(x + mixer(x))``.

    Args:
        mixer: Any mixer; its ``d_model`` is the block's.
        mlp: ``"gated"``, ``"plain"``, ``"experts"`` or ``"none"``.
        mlp_ratio: Hidden units of the MLP in multiples of ``d_model``; None means its default.
        mlp_chunk_size: Tokens whose hidden units exist at once; None means all. The MLP and the norm before it run over
            pieces of so many tokens, which the backward pass computes anew: "Mini-Sequence Transformer",
            https://arxiv.org/abs/2407.15892, section 3. Results are the same.
        n_experts: Of an MLP of experts.
        top_k: Experts that a token goes to.
        norm: ``"rms"``, ``"layer"`` or ``"batch"``.
        norm_eps: Epsilon of the norms.
        norm_position: ``"pre"`` or ``"post"``.
        dropout: Probability with which outputs of mixer and MLP are dropped in training.
        branches: Branches that add to the residual in the whole stack. With norms before the branches the residual's
            variance grows with each of them, so output projections start at ``branches ** -0.5`` of their size. They
            are found by name: the linear layers called ``out_proj``, of the MLP and anywhere inside the mixer, that end
            in ``d_model`` features; of parallel mixers the scales, which their outputs' sizes come from. A mixer
            without one (minGRU as wide as the model) keeps its own scale.
    """

    def __init__(
        self,
        mixer: SequenceMixer,
        *,
        mlp: str = "gated",
        mlp_ratio: float | None = None,
        mlp_chunk_size: int | None = None,
        n_experts: int = 8,
        top_k: int = 2,
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
        self.mlp_chunk_size = mlp_chunk_size
        if mlp == "none":
            self.mlp_norm = self.mlp = None
            return
        network, ratio = MLPS["gated" if mlp == "experts" else mlp]
        hidden = hidden_units(d_model, ratio if mlp_ratio is None else mlp_ratio)
        self.mlp_norm = NORMS[norm](d_model, norm_eps)
        self.mlp = Experts(d_model, hidden, n_experts, top_k) if mlp == "experts" else network(d_model, hidden)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | Packing | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None, Tensor]:
        """Maps ``(B, T, D)`` to ``(B, T, D)``, the mixer's state or None, and the auxiliary losses' sum, a scalar.

        Raises:
            ValueError: If batch norm meets a state.
        """
        if self.batch_norm and (state is not None or return_state):
            raise ValueError("norm='batch' takes whole sequences and no state; use norm='rms' or 'layer'")
        mixed, state, auxiliary = self.mixer(
            self.mixer_norm(x) if self.pre else x,
            state,
            cu_seqlens=cu_seqlens,
            return_state=return_state,
            return_auxiliary=True,
        )
        y, loss = self._feed_forward(x, mixed)
        return y, state, auxiliary if loss is None else auxiliary + loss

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Decodes one token: ``(B, D)`` and a state to ``(B, D)`` and the next state."""
        if self.batch_norm:
            raise ValueError("norm='batch' takes whole sequences alone and cannot step; use norm='rms' or 'layer'")
        mixed, state = self.mixer.step(self.mixer_norm(x) if self.pre else x, state)
        return self._feed_forward(x, mixed)[0], state

    def _feed_forward(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x + self.dropout(mixed)
        if not self.pre:
            x = self.mixer_norm(x)
        if self.mlp is None or self.mlp_norm is None:
            return x, None
        if self.mlp_chunk_size is None:
            y, loads = self._mlp(x)
        else:
            pieces = [self._piece(piece) for piece in x.flatten(0, -2).split(self.mlp_chunk_size)]
            y = torch.cat([y for y, _ in pieces]).view(x.shape)
            found = [loads for _, loads in pieces if loads is not None]
            loads = torch.stack(found).sum(0) if found else None
        # dropped here, not in the pieces, whose masks would be others than those of the whole
        x = x + self.dropout(y)
        loss = self.mlp.imbalance(loads) if isinstance(self.mlp, Experts) and loads is not None else None
        return x if self.pre else self.mlp_norm(x), loss

    def _piece(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return checkpoint(self._mlp, x, use_reentrant=False) if torch.is_grad_enabled() else self._mlp(x)

    def _mlp(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The MLP, after its norm where that comes before, and what a mixture of experts tells of its choices."""
        if self.mlp is None or self.mlp_norm is None:
            raise RuntimeError("a block without an MLP was asked to run it")
        y = self.mlp(self.mlp_norm(x) if self.pre else x)
        return y if isinstance(self.mlp, Experts) else (y, None)

    def reset_parameters(self) -> None:
        """The parts' own initialisations, then the output projections scaled as ``branches`` says."""
        for part in (self.mixer_norm, self.mixer, self.mlp_norm, self.mlp):
            if part is not None:
                part.reset_parameters()
        if self.pre:
            with torch.no_grad():
                for projection in self.output_projections():
                    cast("Tensor", projection.weight).mul_(self.branches**-0.5)

    def output_projections(self) -> list[nn.Module]:
        """The layers that end a branch, whose weights ``reset_parameters`` scales."""
        found: list[nn.Module] = []
        inside: set[nn.Module] = set()
        for name, module in self.named_modules():
            if isinstance(module, ParallelMixers):
                # their outputs are normalised: the projections before that have no say in the size
                inside.update(module.mixers.modules())
                found += module.norms
            if name.rpartition(".")[2] != "out_proj" or module in inside:
                continue
            if isinstance(module, nn.Linear | PartLinear) and module.weight.shape[-2] == self.mixer.d_model:
                found.append(module)
        return found
