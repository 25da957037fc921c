"""Packed sequences: several sequences of unequal length behind one another in one row, and what derives from that.

The convention is FlashAttention's: tokens lie in a batch of one, ``(1, T, ...)``, and ``cu_seqlens``, int32 of one more
entry than there are sequences, runs from 0 to T. An empty sequence repeats an entry.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        prefix_lengths: int64 ``(S,)``, the length of each sequence's prefix for prefix-non-causal mixers, or None; see
            :meth:`with_prefixes`.
    """

    cu_seqlens: Tensor
    sequence_index: Tensor
    positions: Tensor
    host: Tensor | None = None
    prefix_lengths: Tensor | None = None

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int] | Tensor,
        *,
        prefix_lengths: Sequence[int] | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Packing:
        """Builds the packing of sequences of the given lengths (host integers), on ``device`` without synchronising.

        With ``prefix_lengths`` as by :meth:`with_prefixes`.
        """
        lengths = _integers("lengths", lengths)
        if int(lengths.min()) < 0:
            raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
        if int(lengths.sum()) >= 2**31:
            raise ValueError(f"boundaries are int32: lengths must add up to less than 2**31, got {int(lengths.sum())}")
        host = torch.zeros(lengths.numel() + 1, dtype=torch.int32)
        host[1:] = lengths.cumsum(0)
        packing = cls._derive(host, int(host[-1]), host)
        if prefix_lengths is not None:
            packing = packing.with_prefixes(prefix_lengths)
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
    def from_position_ids(cls, position_ids: Tensor) -> Packing:
        """Builds the packing of tokens whose positions, ``(T,)`` or ``(1, T)``, grow by one inside a sequence.

        transformers tells sequences so. It need not count from 0; where positions do not go on, a sequence begins.
        Synchronises, as the next one does.
        """
        places = _row("position_ids", position_ids)
        return cls._from_starts(places.diff() != 1, places)

    @classmethod
    def from_seq_idx(cls, seq_idx: Tensor) -> Packing:
        """Builds the packing of tokens with the number of their sequence, ``(T,)`` or ``(1, T)``, as in mamba_ssm."""
        numbers = _row("seq_idx", seq_idx)
        return cls._from_starts(numbers.diff() != 0, numbers)

    @classmethod
    def _from_starts(cls, starts: Tensor, tokens: Tensor) -> Packing:
        """Of which tokens behind the first begin a sequence."""
        total = tokens.shape[0]
        edges = [0, *(starts.nonzero()[:, 0] + 1).tolist(), total] if total else [0, 0]
        return cls.from_lengths(torch.tensor(edges).diff(), device=tokens.device)

    def to_huggingface(self) -> dict[str, Tensor | int]:
        """What transformers' models and kernels take for packed sequences, by name.

        ``position_ids`` int64 ``(1, T)``, ``cu_seq_lens_q`` and ``_k`` int32 ``(S + 1,)``, ``max_length_q`` and ``_k``,
        and ``seq_idx`` int32 ``(1, T)``, as ``DataCollatorWithFlattening`` makes them.
        """
        bounds = self.bounds()
        longest = max(end - start for start, end in itertools.pairwise(bounds))
        return {
            "position_ids": self.positions[None],
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": self.sequence_index[None].to(torch.int32),
        }

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

    def with_prefixes(self, prefix_lengths: Sequence[int] | Tensor) -> Packing:
        """The same packing, whose sequences begin with prefixes that a prefix-non-causal mixer may see as a whole.

        Synchronises once when no host copy of the boundaries exists.

        Args:
            prefix_lengths: The tokens of each sequence's prefix (host integers), from 0 to all of them.

        Raises:
            TypeError: If they are no integers.
            ValueError: If there is not one a sequence, or one is negative or longer than its sequence: a prefix lies
                in one piece.
        """
        prefix = _integers("prefix_lengths", prefix_lengths)
        lengths = torch.tensor(self.bounds()).diff()
        if prefix.shape != lengths.shape:
            raise ValueError(f"prefix_lengths must have one entry a sequence, {len(lengths)}, got {len(prefix)}")
        wrong = (prefix < 0) | (prefix > lengths)
        if bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            raise ValueError(
                f"the prefix of sequence {index} must have from 0 to {int(lengths[index])} tokens, the length of the "
                f"sequence, got {int(prefix[index])}; a prefix lies in one piece: pass all of it in one call"
            )
        device = self.cu_seqlens.device
        return replace(self, prefix_lengths=prefix.to(device, non_blocking=device.type != "cpu"))

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


def _row(name: str, values: Tensor) -> Tensor:
    """One integer a token, ``(T,)``."""
    if not isinstance(values, Tensor) or values.is_floating_point() or values.is_complex():
        raise TypeError(f"{name} must be a Tensor of integers, got {getattr(values, 'dtype', type(values).__name__)}")
    if values.dim() not in (1, 2) or (values.dim() == 2 and values.shape[0] != 1):
        raise ValueError(f"{name} must have shape (T,) or (1, T), got {tuple(values.shape)}; flatten the batch")
    return values.flatten().to(torch.int64)


def _integers(name: str, values: Sequence[int] | Tensor) -> Tensor:
    """A non-empty list of integers as int64 on the host."""
    values = torch.as_tensor(values, device="cpu")
    if values.dim() != 1 or values.numel() == 0:
        raise ValueError(f"{name} must be a non-empty list of integers, got shape {tuple(values.shape)}")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {values.dtype}")
    return values.to(torch.int64, copy=True)


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
