"""Where tokens are in their sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.packing import Packing


def count_positions(x: Tensor, start: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """The position of every token, and how many tokens each sequence has seen after them.

    Args:
        x: ``(B, T, ...)``.
        start: int64, the tokens that each sequence has seen before, ``(B,)`` or one a packed sequence; zero when
            omitted.
        packing: Of packed sequences.

    Returns:
        int64 ``(B, T)``, or ``(1, T)`` where all rows are alike; and int64, one a sequence.
    """
    batch, total = x.shape[:2]
    if packing is None:
        places = torch.arange(total, device=x.device)[None]
        if start is None:
            return places, torch.full((batch,), total, device=x.device)
        return places + start[:, None], start + total
    if start is None:
        return packing.positions[None], packing.lengths.to(torch.int64)
    return (packing.positions + start[packing.sequence_index])[None], start + packing.lengths
