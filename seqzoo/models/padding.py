"""Batches as the backbone takes them: a model takes the padding out, runs packed and puts it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.packing import Packing, check_form


class Inputs(NamedTuple):
    """Tokens ``(B, T, ...)`` as the backbone takes them, and the padding that was taken out."""

    tokens: Tensor
    packing: Packing | None
    padding: Padding | None


def unpad(
    tokens: Tensor,
    cu_seqlens: Tensor | Packing | None,
    lengths: Sequence[int] | Tensor | None,
    attention_mask: Tensor | None,
) -> Inputs:
    """Takes the padding out of a batch, or reads its boundaries.

    Raises:
        ValueError: If more than one of the three is given, or it does not fit the batch.
    """
    given = {"cu_seqlens": cu_seqlens, "lengths": lengths, "attention_mask": attention_mask}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"at most one of cu_seqlens, lengths and attention_mask may be given, got {', '.join(names)}")
    padding = None
    if lengths is not None:
        padding = Padding.from_lengths(lengths, tokens)
    elif attention_mask is not None:
        padding = Padding.from_mask(attention_mask, tokens)
    if padding is not None:
        return Inputs(padding.pack(tokens), padding.packing, padding)
    if cu_seqlens is None:
        return Inputs(tokens, None, None)
    bare = cu_seqlens.cu_seqlens if isinstance(cu_seqlens, Packing) else cu_seqlens
    check_form(bare, tokens.shape[0], tokens.device)
    return Inputs(tokens, Packing.from_cu_seqlens(cu_seqlens, tokens.shape[1]), None)


def check_ids(name: str, ids: Tensor, rank: int | None = None, letters: str = "") -> None:
    """Raises unless ``ids`` are integers, and of ``rank`` dimensions."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")
    if rank is not None and ids.dim() != rank:
        raise ValueError(f"{name} must have shape {letters}, got {tuple(ids.shape)}")


def embed(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """The vectors of tokens.

    Raises:
        ValueError: If an id lies outside the vocabulary, where the embedding notices (on the CPU).
    """
    try:
        return embedding(ids)
    except IndexError as error:
        raise ValueError(
            f"ids must lie between 0 and {embedding.num_embeddings - 1}, got {int(ids.min())} to {int(ids.max())}"
        ) from error


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
    def from_lengths(cls, lengths: Sequence[int] | Tensor, tokens: Tensor) -> Padding:
        """The padding of rows that end after ``lengths`` tokens. Lengths on a GPU are brought to the host.

        Raises:
            ValueError: If there is not one length a row, or a length is negative or exceeds the row.
        """
        batch, total = tokens.shape[:2]
        counts = torch.as_tensor(lengths).cpu()
        if counts.is_floating_point() or counts.dtype == torch.bool:
            raise TypeError(f"lengths must be integers, got {counts.dtype}")
        if tuple(counts.shape) != (batch,):
            raise ValueError(f"lengths must have shape (B,) = ({batch},), got {tuple(counts.shape)}")
        if batch and (int(counts.min()) < 0 or int(counts.max()) > total):
            raise ValueError(f"lengths must lie between 0 and {total}, got {counts.tolist()}")
        return cls._from_host(torch.arange(total) < counts[:, None], tokens)

    @classmethod
    def from_mask(cls, mask: Tensor, tokens: Tensor) -> Padding:
        """The padding that a mask shows, true or 1 where a token is. A mask on a GPU is brought to the host.

        Raises:
            ValueError: If the mask has another shape than the batch, values other than 0 and 1, or a hole in a row.
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"attention_mask must be a Tensor, got {type(mask).__name__}")
        if mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"attention_mask must have shape (B, T) = {tuple(tokens.shape[:2])}, got {tuple(mask.shape)}"
            )
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
        return cls._from_host(kept, tokens)

    @classmethod
    def _from_host(cls, kept: Tensor, tokens: Tensor) -> Padding:
        batch, total = tokens.shape[:2]
        index = torch.nonzero(kept.flatten())[:, 0].to(tokens.device)
        return cls(index, Packing.from_lengths(kept.sum(1), device=tokens.device), (batch, total))

    def pack(self, tokens: Tensor) -> Tensor:
        """``(B, T, ...)`` to ``(1, total, ...)``."""
        return tokens.flatten(0, 1)[self.index][None]

    def pad(self, packed: Tensor) -> Tensor:
        """``(1, total, ...)`` to ``(B, T, ...)``, zero at the padding."""
        batch, total = self.shape
        flat = packed.new_zeros((batch * total, *packed.shape[2:]))
        return flat.index_copy(0, self.index, packed[0]).unflatten(0, (batch, total))
