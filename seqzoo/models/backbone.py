"""The stack of blocks that every model puts its heads on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.mixer import State
from seqzoo.models.block import Block
from seqzoo.models.config import BackboneConfig
from seqzoo.models.positions import LearnedPositions
from seqzoo.modules.norm import NORMS
from seqzoo.packing import Packing, check_form


class Backbone(nn.Module):
    """``n_layers`` blocks over the mixers of a pattern, and a last norm where the blocks begin with theirs.

    Its state is the list of the mixers' states; with ``max_positions`` the state of the positions follows as the last
    entry.

    Args:
        config: What to build.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        branches = config.n_layers * (1 if config.mlp == "none" else 2)
        self.positions = (
            None if config.max_positions is None else LearnedPositions(config.max_positions, config.d_model)
        )
        self.blocks = nn.ModuleList(
            Block(
                mixer,
                mlp=config.mlp,
                mlp_ratio=config.mlp_ratio,
                norm=config.norm,
                norm_eps=config.norm_eps,
                norm_position=config.norm_position,
                dropout=config.dropout,
                branches=branches,
            )
            for mixer in config.mixers()
        )
        self.norm = NORMS[config.norm](config.d_model, config.norm_eps) if config.norm_position == "pre" else None
        if not any(parameter.is_meta for parameter in self.parameters()):
            self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: Sequence[State] | None = None,
        *,
        cu_seqlens: Tensor | Packing | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, list[State] | None, Tensor]:
        """Maps ``(B, T, D)`` to ``(B, T, D)``.

        Args:
            x: ``(B, T, D)``.
            state: The state before the first token, as an earlier call or :meth:`init_state` made it; packed, one row a
                sequence.
            cu_seqlens: Boundaries of packed sequences, int32 ``(S + 1,)``, or a Packing; B is then 1.
            return_state: Whether to return the state after the last token.

        Returns:
            The outputs, the state or None, and the sum of the mixers' auxiliary losses.

        Raises:
            ValueError: If the state has not one entry a block, or what mixers and blocks raise.
        """
        packing = None
        if cu_seqlens is not None:
            bare = cu_seqlens.cu_seqlens if isinstance(cu_seqlens, Packing) else cu_seqlens
            check_form(bare, x.shape[0], x.device)
            packing = Packing.from_cu_seqlens(cu_seqlens, x.shape[1])
        given = [None] * len(self.blocks) if state is None else self._mixer_states(state)
        states: list[State] = []
        losses: list[Tensor] = []
        place = None
        if self.positions is not None:
            x, place = self.positions(x, None if state is None else state[-1], packing)
        x = self._residual(x)
        for block, one in zip(self._blocks(), given, strict=True):
            x, after, loss = block(x, one, cu_seqlens=packing, return_state=return_state)
            losses.append(loss)
            if after is not None:
                states.append(after)
        if place is not None:
            states.append(place)
        if self.norm is not None:
            x = self.norm(x)
        return x, states if return_state else None, torch.stack(losses).sum()

    def step(self, x: Tensor, state: Sequence[State]) -> tuple[Tensor, list[State]]:
        """Decodes one token: ``(B, D)`` and a state to ``(B, D)`` and the next state."""
        given = self._mixer_states(state)
        states: list[State] = []
        place = None
        if self.positions is not None:
            positioned, place = self.positions(x[:, None], state[-1], None)
            x = positioned[:, 0]
        x = self._residual(x)
        for block, one in zip(self._blocks(), given, strict=True):
            x, after = block.step(x, one)
            states.append(after)
        if place is not None:
            states.append(place)
        return x if self.norm is None else self.norm(x), states

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> list[State]:
        """The state before the first token of ``batch_size`` sequences of inputs of ``dtype``."""
        states = [block.mixer.init_state(batch_size, device=device, dtype=dtype) for block in self._blocks()]
        return states if self.positions is None else [*states, self.positions.init_state(batch_size, device)]

    def reset_parameters(self) -> None:
        """Initialises every parameter and buffer."""
        for part in (self.positions, *self._blocks(), self.norm):
            if part is not None:
                part.reset_parameters()

    def _residual(self, x: Tensor) -> Tensor:
        """What the blocks add to: the norms before the branches bring it back to the parameters' dtype."""
        return x.to(accumulator(x.dtype)) if self.config.residual_in_fp32 else x

    def _blocks(self) -> list[Block]:
        return [cast("Block", block) for block in self.blocks]

    def _mixer_states(self, state: Sequence[State]) -> Sequence[State]:
        """The part of a model's state that belongs to the mixers."""
        if not isinstance(state, (list, tuple)):
            raise TypeError(f"a model's state is the list of its mixers' states, got {type(state).__name__}")
        expected = len(self.blocks) + (self.positions is not None)
        if len(state) != expected:
            words = "one a mixer" if self.positions is None else "one a mixer and the positions'"
            raise ValueError(f"the state must have {expected} entries, {words}, got {len(state)}")
        return state[: len(self.blocks)]
