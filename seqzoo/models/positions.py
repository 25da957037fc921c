"""Learned positions, added to a model's inputs; the one place of a model that numbers tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.mixer import State
from seqzoo.modules.positions import count_positions
from seqzoo.packing import Packing


class LearnedPositions(nn.Module):
    """Adds to every token a learned vector of its place in its sequence.

    State: ``{"position": (B,)}``, int64, the tokens that each sequence has seen.

    Args:
        max_positions: Places, hence the longest sequence.
        d_model: Width.
    """

    def __init__(self, max_positions: int, d_model: int) -> None:
        super().__init__()
        self.max_positions = max_positions
        self.weight = nn.Parameter(torch.empty(max_positions, d_model))

    def forward(self, x: Tensor, state: State | None, packing: Packing | None) -> tuple[Tensor, State]:
        """Maps ``(B, T, D)`` to the same with positions added, and the state after the last token.

        Raises:
            ValueError: If a sequence grows longer than ``max_positions``; not on a GPU, where it is a device-side
                assertion.
        """
        rows = x.shape[0] if packing is None else packing.n_sequences
        places, end = count_positions(x, None if state is None else self._start(state, rows), packing)
        if state is None and packing is None:
            self._check(x.shape[1])
        elif rows:
            self._check(end.amax())
        return x + F.embedding(places, self.weight), {"position": end}

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> State:
        """The state before the first token."""
        device = self.weight.device if device is None else device
        return {"position": torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def reset_parameters(self) -> None:
        """Normal of deviation 0.02, as the embeddings."""
        nn.init.normal_(self.weight, std=0.02)

    def _start(self, state: State, rows: int) -> Tensor:
        if state.keys() != {"position"}:
            raise ValueError(f"the state of the positions has the key 'position', got {sorted(state)}")
        start = state["position"]
        if tuple(start.shape) != (rows,):
            raise ValueError(
                f"state['position'] must have shape ({rows},) for {rows} sequences, got {tuple(start.shape)}"
            )
        return start

    def _check(self, longest: Tensor | int) -> None:
        if isinstance(longest, Tensor) and (longest.device.type != "cpu" or torch.compiler.is_compiling()):
            torch.ops.aten._assert_async.msg(longest <= self.max_positions, "a sequence is longer than max_positions")
        elif longest > self.max_positions:
            raise ValueError(f"a sequence of {int(longest)} tokens is longer than max_positions, {self.max_positions}")
