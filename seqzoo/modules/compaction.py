"""Compaction: the tokens of a batch that something is done with, as packed sequences without the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqzoo.packing import Packing


class Compaction(NamedTuple):
    """Active tokens behind one another, in the order of their sequences and of time.

    Counting them needs the host, and on a GPU waits for it. Where shapes may not depend on values, in compiled code and
    on the meta device, and of a batch of none, all tokens are kept: those that are not active come last, as one more
    sequence.

    Attributes:
        order: int64 ``(n,)``, which of the batch's tokens, row by row, lies at each place.
        packing: Of the S sequences, and where all are kept of that one more.
    """

    order: Tensor
    packing: Packing

    @classmethod
    def of(cls, active: Tensor, packing: Packing | None) -> Compaction:
        """Finds the active tokens, bool ``(B, T)``; those of S = B rows, or of packed sequences."""
        batch, total = active.shape
        if packing is None:
            rows, row = batch, torch.arange(batch, device=active.device)[:, None].expand(batch, total).flatten()
        else:
            rows, row = packing.n_sequences, packing.sequence_index
        keys = torch.where(active.flatten(), row, rows)
        # stable: inside a sequence time goes on
        sorted_keys, order = keys.sort(stable=True)
        edges = torch.arange(rows + 1, device=active.device)
        bounds = torch.searchsorted(sorted_keys, edges, out_int32=True)
        # without rows there would be no sequence, of which a Packing has one at least
        if torch.compiler.is_compiling() or active.is_meta or rows == 0:
            bounds = torch.cat((bounds, bounds.new_full((1,), batch * total)))
            return cls(order, Packing.from_cu_seqlens(bounds, batch * total))
        count = int(bounds[-1])
        return cls(order[:count], Packing.from_cu_seqlens(bounds, count))

    def gather(self, x: Tensor) -> Tensor:
        """``(B, T, ...)`` to ``(1, n, ...)``."""
        return x.flatten(0, 1).index_select(0, self.order)[None]

    def scatter(self, y: Tensor, active: Tensor) -> Tensor:
        """``(1, n, ...)`` to ``(B, T, ...)``, zero where tokens are not active, bool ``(B, T)``."""
        batch, total = active.shape
        flat = y.new_zeros(batch * total, *y.shape[2:]).index_copy(0, self.order, y[0]).unflatten(0, (batch, total))
        return torch.where(active.view(batch, total, *[1] * (y.dim() - 2)), flat, 0)
