"""The stack of blocks that every model puts its heads on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqzoo.kernels.checks import accumulator
from seqzoo.mixer import SequenceMixer, State
from seqzoo.models.block import Block
from seqzoo.models.config import BackboneConfig
from seqzoo.models.positions import LearnedPositions
from seqzoo.modules.norm import NORMS
from seqzoo.packing import Packing, check_form


class Backbone(nn.Module):
    """``n_layers`` blocks over the mixers of a pattern, and a last norm where the blocks begin with theirs.

    Its state is the list of the mixers' states; with ``max_positions`` the state of the positions follows as the last
    entry.

    Entries of the pattern with one ``shared`` word are one block at several depths, as in "Zamba",
    https://arxiv.org/abs/2405.16712, section 3: ``blocks`` holds it once, ``order`` tells the block of every depth, and
    every depth has its own state. Zamba's shared block also reads the embeddings beside the residual; this one reads
    the residual alone.

    Args:
        config: What to build.

    Attributes:
        blocks: Every block once.
        order: The place in ``blocks`` of the block at every depth.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.positions = (
            None if config.max_positions is None else LearnedPositions(config.max_positions, config.d_model)
        )
        layers, mixers = config.layers(), config.mixers()
        branches = sum(1 if layer.mlp == "none" else 2 for layer in layers)
        # shared blocks have the same mixer
        built = dict(zip(mixers, layers, strict=True))
        places = {mixer: index for index, mixer in enumerate(built)}
        self.order = [places[mixer] for mixer in mixers]
        self.blocks = nn.ModuleList(
            Block(
                mixer,
                mlp=layer.mlp,
                mlp_ratio=config.mlp_ratio,
                mlp_chunk_size=config.mlp_chunk_size,
                n_experts=config.n_experts,
                top_k=config.top_k,
                norm=config.norm,
                norm_eps=config.norm_eps,
                norm_position=config.norm_position,
                dropout=config.dropout,
                branches=branches,
            )
            for mixer, layer in built.items()
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
            The outputs, the state or None, and the sum of the auxiliary losses of mixers and experts.

        Raises:
            ValueError: If the state has not one entry a block, or what mixers and blocks raise.
        """
        packing = None
        if cu_seqlens is not None:
            bare = cu_seqlens.cu_seqlens if isinstance(cu_seqlens, Packing) else cu_seqlens
            check_form(bare, x.shape[0], x.device)
            packing = Packing.from_cu_seqlens(cu_seqlens, x.shape[1])
        given = [None] * len(self.order) if state is None else self.mixer_states(state)
        states: list[State] = []
        losses: list[Tensor] = []
        place = None
        if self.positions is not None:
            x, place = self.positions(x, None if state is None else state[-1], packing)
        x = self._residual(x)
        for block, one in zip(self._blocks(), given, strict=True):
            run = functools.partial(checkpoint, block, use_reentrant=False) if self._checkpoints() else block
            x, after, loss = run(x, one, cu_seqlens=packing, return_state=return_state)
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
        given = self.mixer_states(state)
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
        states = [mixer.init_state(batch_size, device=device, dtype=dtype) for mixer in self.mixers()]
        return states if self.positions is None else [*states, self.positions.init_state(batch_size, device)]

    def state_size(self, length: int) -> int:
        """Numbers that a sequence carries after ``length`` tokens."""
        return sum(mixer.state_size(length) for mixer in self.mixers()) + (self.positions is not None)

    def reset_parameters(self) -> None:
        """Initialises every parameter and buffer."""
        for part in (self.positions, *self.blocks, self.norm):
            if part is not None:
                cast("Block", part).reset_parameters()

    def mixer_states(self, state: Sequence[State]) -> Sequence[State]:
        """The part of a model's state that belongs to the mixers, one entry a depth.

        Raises:
            TypeError: If the state is no list.
            ValueError: If it has another number of entries.
        """
        if not isinstance(state, (list, tuple)):
            raise TypeError(f"a model's state is the list of its mixers' states, got {type(state).__name__}")
        expected = len(self.order) + (self.positions is not None)
        if len(state) != expected:
            words = "one a mixer" if self.positions is None else "one a mixer and the positions'"
            raise ValueError(f"the state must have {expected} entries, {words}, got {len(state)}")
        return state[: len(self.order)]

    def mixers(self) -> list[SequenceMixer]:
        """The mixer of every depth."""
        return [block.mixer for block in self._blocks()]

    def _residual(self, x: Tensor) -> Tensor:
        """What the blocks add to: the norms before the branches bring it back to the parameters' dtype."""
        return x.to(accumulator(x.dtype)) if self.config.residual_in_fp32 else x

    def _blocks(self) -> list[Block]:
        """The block of every depth."""
        return [cast("Block", self.blocks[place]) for place in self.order]

    def _checkpoints(self) -> bool:
        return self.config.checkpoint_blocks and self.training and torch.is_grad_enabled()
