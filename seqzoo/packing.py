"""Packed sequences: several sequences of unequal length behind one another in one row, and what derives from that.

The convention is FlashAttention's: tokens lie in a batch of one, ``(1, T, ...)``, and ``cu_seqlens``, int32 of one more
entry than there are sequences, runs from 0 to T. An empty sequence repeats an entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def check_values(cu_seqlens: Tensor, total: int) -> None:
    """Raises ValueError unless ``cu_seqlens`` (on the host) runs from 0 to ``total`` without descending."""
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {first}")
    falls = cu_seqlens[1:] < cu_seqlens[:-1]
    if bool(falls.any()):
        index = int(falls.nonzero()[0])
        start, end = cu_seqlens[index : index + 2].tolist()
        raise ValueError(f"cu_seqlens must not descend, got {start} then {end} at entries {index} and {index + 1}")
    if last != total:
        raise ValueError(f"cu_seqlens must end at the number of tokens, {total}, got {last}")


def check_form(cu_seqlens: Tensor, batch: int, device: torch.device) -> None:
    """Raises unless ``cu_seqlens`` has the dtype, rank and device that packing needs; looks at no value."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a Tensor or a Packing, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}; convert it with .to(torch.int32)")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must be one-dimensional with at least 2 entries, got shape {tuple(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(f"packed sequences lie in a batch of 1, got a batch of {batch}; flatten it to (1, B * T, ...)")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, the sequence on {device}; move one of them")


@dataclass(frozen=True, eq=False)
class Packing:
    """Boundaries of packed sequences, with all that derives from them built once.

    A pytree of tensors alone, so that ``torch.compile`` and ``torch.export`` take it as an input and other lengths do
    not recompile. Build one with :meth:`from_lengths` (no synchronisation on any device) or :meth:`from_cu_seqlens`.

    Attributes:
        cu_seqlens: int32 ``(S + 1,)``, on the tokens' device.
        sequence_index: int64 ``(T,)``, the sequence that each token belongs to.
        positions: int64 ``(T,)``, the place of each token in its sequence, from 0.
        host: int32 ``(S + 1,)``, a copy of ``cu_seqlens`` on the CPU, or None where making one would synchronise.
        prefix_lengths: int64 ``(S,)``, the length of each sequence's prefix for prefix-non-causal mixers, or None.
    """

    cu_seqlens: Tensor
    sequence_index: Tensor
    positions: Tensor
    host: Tensor | None = None
    prefix_lengths: Tensor | None = None

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Tensor, *, device: torch.device | str | None = None) -> Packing:
        """Builds the packing of sequences of the given lengths (host integers), on ``device`` without synchronising."""
        lengths = torch.as_tensor(lengths, device="cpu")
        if lengths.dim() != 1 or lengths.numel() == 0:
            raise ValueError(f"lengths must be a non-empty list of integers, got shape {tuple(lengths.shape)}")
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths must be integers, got {lengths.dtype}")
        lengths = lengths.to(torch.int64)
        if int(lengths.min()) < 0:
            raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
        if int(lengths.sum()) >= 2**31:
            raise ValueError(f"boundaries are int32: lengths must add up to less than 2**31, got {int(lengths.sum())}")
        host = torch.zeros(lengths.numel() + 1, dtype=torch.int32)
        host[1:] = lengths.cumsum(0)
        packing = cls._derive(host, int(host[-1]), host)
        return packing if device is None else packing.to(device)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor | Packing, total: int) -> Packing:
        """Builds the packing of ``total`` tokens from boundaries; a Packing is returned as it is.

        Values are checked where they already are on the host. For a bare CUDA tensor the check is a device-side
        assertion, nothing synchronises, and ``host`` stays None.
        """
        if isinstance(cu_seqlens, Packing):
            if cu_seqlens.positions.shape[0] != total:
                raise ValueError(
                    f"the Packing describes {cu_seqlens.positions.shape[0]} tokens, the sequence has {total}"
                )
            return cu_seqlens
        check_form(cu_seqlens, 1, cu_seqlens.device if isinstance(cu_seqlens, Tensor) else torch.device("cpu"))
        if torch.compiler.is_compiling():
            return cls._derive(cu_seqlens, total, cu_seqlens if cu_seqlens.device.type == "cpu" else None)
        if cu_seqlens.device.type == "cpu":
            check_values(cu_seqlens, total)
            cu_seqlens = cu_seqlens.clone()  # the caller may write to theirs
            return cls._derive(cu_seqlens, total, cu_seqlens)
        assert_values(cu_seqlens, total)
        return cls._derive(cu_seqlens, total, None)

    @classmethod
    def _derive(cls, cu_seqlens: Tensor, total: int, host: Tensor | None) -> Packing:
        tokens = torch.arange(total, device=cu_seqlens.device)
        # right=True steps over empty sequences: a token belongs to the last sequence that starts at or before it
        sequence_index = torch.bucketize(tokens, cu_seqlens[1:].to(torch.int64), right=True)
        positions = tokens - cu_seqlens.to(torch.int64)[sequence_index]
        return cls(cu_seqlens, sequence_index, positions, host)

    @property
    def n_sequences(self) -> int:
        """The number of sequences, empty ones included."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """int32 ``(S,)``, on the tokens' device."""
        return self.cu_seqlens.diff()

    def bounds(self) -> list[int]:
        """The boundaries as Python integers; synchronises once when no host copy exists."""
        return (self.cu_seqlens if self.host is None else self.host).tolist()

    def reversal(self) -> Tensor:
        """int64 ``(T,)``, the index that reverses every sequence in place; it is its own inverse."""
        starts = self.cu_seqlens.to(torch.int64)
        return starts[self.sequence_index] + starts[self.sequence_index + 1] - 1 - self._tokens()

    def _tokens(self) -> Tensor:
        return torch.arange(self.positions.shape[0], device=self.positions.device)

    def to(self, device: torch.device | str) -> Packing:
        """The same packing with its tensors on ``device``; the host copy stays where it is."""
        # a copy to the host that does not block could be read before it is there
        later = torch.device(device).type != "cpu"
        host = self.host if self.host is not None or self.cu_seqlens.device.type != "cpu" else self.cu_seqlens
        prefix = self.prefix_lengths
        return Packing(
            self.cu_seqlens.to(device, non_blocking=later),
            self.sequence_index.to(device, non_blocking=later),
            self.positions.to(device, non_blocking=later),
            host,
            None if prefix is None else prefix.to(device, non_blocking=later),
        )


pytree.register_dataclass(Packing)


def assert_values(cu_seqlens: Tensor, total: int) -> None:
    """The checks of :func:`check_values` as device-side assertions, which do not synchronise."""
    check = torch.ops.aten._assert_async.msg
    check(cu_seqlens[0] == 0, "cu_seqlens must start at 0")
    check((cu_seqlens.diff() >= 0).all(), "cu_seqlens must not descend")
    check(cu_seqlens[-1] == total, "cu_seqlens must end at the number of tokens")


def boundaries(cu_seqlens: Tensor | Packing | None, batch: int, total: int, device: torch.device) -> Tensor | None:
    """What an op takes from its ``cu_seqlens`` argument: the checked boundary tensor, or None for a dense batch."""
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, Packing):
        check_form(cu_seqlens.cu_seqlens, batch, device)
        return Packing.from_cu_seqlens(cu_seqlens, total).cu_seqlens
    check_form(cu_seqlens, batch, device)
    return cu_seqlens
