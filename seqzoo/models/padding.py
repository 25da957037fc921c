"""Padded batches as packed sequences: a model takes the padding out, runs packed and puts it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqzoo.packing import Packing


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a padded batch ``(B, T)`` lie.

    Attributes:
        index: int64, the place of every token among the ``B * T`` of the flattened batch.
        packing: The packing of the tokens, one sequence a row, empty ones included.
        shape: ``(B, T)``.
    """

    index: Tensor
    packing: Packing
    shape: tuple[int, int]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Tensor, ids: Tensor) -> Padding:
        """The padding of rows that end after ``lengths`` tokens. Lengths on a GPU are brought to the host.

        Raises:
            ValueError: If there is not one length a row, or a length is negative or exceeds the row.
        """
        batch, total = ids.shape
        counts = torch.as_tensor(lengths).cpu()
        if counts.is_floating_point() or counts.dtype == torch.bool:
            raise TypeError(f"lengths must be integers, got {counts.dtype}")
        if tuple(counts.shape) != (batch,):
            raise ValueError(f"lengths must have shape (B,) = ({batch},), got {tuple(counts.shape)}")
        if batch and (int(counts.min()) < 0 or int(counts.max()) > total):
            raise ValueError(f"lengths must lie between 0 and {total}, got {counts.tolist()}")
        return cls._from_host(torch.arange(total) < counts[:, None], ids)

    @classmethod
    def from_mask(cls, mask: Tensor, ids: Tensor) -> Padding:
        """The padding that a mask shows, true or 1 where a token is. A mask on a GPU is brought to the host.

        Raises:
            ValueError: If the mask has another shape than ``ids``, values other than 0 and 1, or a hole in a row.
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"attention_mask must be a Tensor, got {type(mask).__name__}")
        if mask.shape != ids.shape:
            raise ValueError(f"attention_mask must have the shape of ids, {tuple(ids.shape)}, got {tuple(mask.shape)}")
        mask = mask.cpu()
        kept = mask != 0
        if bool((kept & (mask != 1)).any()):
            raise ValueError("attention_mask must be 1 at tokens and 0 at padding")
        # a run of tokens begins wherever a token has none before it
        begins = kept.clone()
        begins[:, 1:] &= ~kept[:, :-1]
        broken = torch.nonzero(begins.sum(1) > 1)
        if broken.numel() > 0:
            raise ValueError(
                f"attention_mask must not have holes, row {int(broken[0])} has one: pad on the left or on the right"
            )
        return cls._from_host(kept, ids)

    @classmethod
    def _from_host(cls, kept: Tensor, ids: Tensor) -> Padding:
        batch, total = ids.shape
        index = torch.nonzero(kept.flatten())[:, 0].to(ids.device)
        return cls(index, Packing.from_lengths(kept.sum(1), device=ids.device), (batch, total))

    def pack(self, tokens: Tensor) -> Tensor:
        """``(B, T, ...)`` to ``(1, total, ...)``."""
        return tokens.flatten(0, 1)[self.index][None]

    def pad(self, packed: Tensor) -> Tensor:
        """``(1, total, ...)`` to ``(B, T, ...)``, zero at the padding."""
        batch, total = self.shape
        flat = packed.new_zeros((batch * total, *packed.shape[2:]))
        return flat.index_copy(0, self.index, packed[0]).unflatten(0, (batch, total))
