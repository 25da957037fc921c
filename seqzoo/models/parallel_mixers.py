"""Several mixers beside one another in one block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec
from seqzoo.modules.norm import RMSNorm
from seqzoo.packing import Packing


class ParallelMixers(SequenceMixer):
    """Mixers that all read the same inputs, "Hymba", https://arxiv.org/abs/2411.13676, section 2.1::

        y = 1/n sum over mixers i of beta_i * rms_norm(mixer_i(x))

    with a learned scale beta_i a channel, 1 at the beginning (in a deep stack what :class:`Block` makes of it). In the
    paper the heads of all mixers share their input and output projections; here every mixer keeps its own.

    State: the mixers' states in one, the key ``"k"`` of the first mixer as ``"0.k"``, ``"h"`` of the second as
    ``"1.h"``. The auxiliary losses add up. What one of the mixers cannot do by its mathematics, all together cannot.

    Args:
        mixers: Two or more, of one ``d_model``.

    Raises:
        ValueError: If there are fewer, or their widths differ.
    """

    packs = True

    def __init__(self, mixers: Sequence[SequenceMixer]) -> None:
        if len(mixers) < 2:
            raise ValueError(f"parallel mixers must be at least 2, got {len(mixers)}; name a single one by itself")
        widths = [mixer.d_model for mixer in mixers]
        if len(set(widths)) > 1:
            raise ValueError(f"parallel mixers need one d_model, got {widths}")
        super().__init__(widths[0])
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(RMSNorm(self.d_model) for _ in mixers)
        limits = [mixer.limits for mixer in mixers]
        self.limits = {  # pyright: ignore - those of these mixers
            ability: f"{type(mixer).__name__}: {one[ability]}"
            for mixer, one in zip(mixers, limits, strict=True)
            for ability in one
        }
        self.discontinuous = any(mixer.discontinuous for mixer in mixers)  # pyright: ignore - as above

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Runs every mixer, normalises, weighs."""
        outputs, losses = [], []
        after: State = {}
        for index, (mixer, given) in enumerate(zip(self._mixers(), self._divided(state), strict=True)):
            y, own, loss = mixer(x, given, cu_seqlens=packing, return_state=return_state, return_auxiliary=True)
            outputs.append(y)
            losses.append(loss)
            after |= _prefixed(index, own or {})
        return Mixed(self._merged(outputs), after if return_state else None, torch.stack(losses).sum())

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Decodes one token: ``(B, D)`` and a state to ``(B, D)`` and the next state."""
        self._refuse("step")
        self._check_input(x, 2, "(B, D)")
        self._check_state(state, x.shape[0], x)
        outputs = []
        after: State = {}
        for index, (mixer, given) in enumerate(zip(self._mixers(), self._divided(state), strict=True)):
            y, own = mixer.step(x, given or {})
            outputs.append(y)
            after |= _prefixed(index, own)
        return self._merged(outputs), after

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """That of every mixer, the keys prefixed by its number."""
        return {
            f"{index}.{key}": entry
            for index, mixer in enumerate(self._mixers())
            for key, entry in mixer.state_spec(batch_size, dtype).items()
        }

    def flops(self, length: int) -> int:
        """The sum of the mixers'."""
        return sum(mixer.flops(length) for mixer in self._mixers())

    def reset_parameters(self) -> None:
        """The mixers' own initialisations, scales of 1."""
        for part in (*self._mixers(), *self.norms):
            cast("SequenceMixer | RMSNorm", part).reset_parameters()

    def _merged(self, outputs: list[Tensor]) -> Tensor:
        return torch.stack([norm(y) for norm, y in zip(self.norms, outputs, strict=True)]).mean(0)

    def _mixers(self) -> list[SequenceMixer]:
        return [cast("SequenceMixer", mixer) for mixer in self.mixers]

    def _divided(self, state: State | None) -> list[State | None]:
        if state is None:
            return [None] * len(self.mixers)
        return [
            {key.partition(".")[2]: value for key, value in state.items() if key.partition(".")[0] == str(index)}
            for index in range(len(self.mixers))
        ]


def _prefixed(index: int, state: State) -> State:
    return {f"{index}.{key}": value for key, value in state.items()}
