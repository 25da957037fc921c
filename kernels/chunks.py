"""Sequences cut into chunks of equal length, and what decays inside one: for recurrences on a matrix, in PyTorch.

The sum of ``log_decay`` over the tokens between two is always taken over just those tokens. A difference of two
cumulative sums would round at the size of the whole chunk's decay, and what the smallest decays leave of the state, and
every gradient of a strong decay, would be lost in that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def chunk_length(limit: int, total: int, sequences: int) -> int:
    """The power of two at or above the mean length of a sequence, at most ``limit``."""
    mean = -(-total // max(1, sequences))
    return min(limit, 1 << max(0, mean - 1).bit_length())


class Chunks:
    """Where the tokens of a batch, dense or packed, are in chunks that each lie in one sequence.

    Tokens that fill up a sequence's last chunk are zero; with ``ragged_first`` its first one, so that all the others,
    the last among them, are full. Of packed sequences nothing is read on the host: there are as many chunks as
    sequences of any lengths might need, and some remain empty.

    Attributes:
        size: C, the tokens of a chunk.
        missing: How many tokens a sequence lacks of whole chunks, ``(S,)``.
        rows: The sequence of every chunk, ``(N, B)``.
        first: Whether it is the sequence's first, ``(N, B)``.
        last: Whether it is the sequence's last, ``(N, B)``.
    """

    def __init__(
        self,
        batch: int,
        total: int,
        cu_seqlens: Tensor | None,
        size: int,
        device: torch.device | None = None,
        ragged_first: bool = False,
    ) -> None:
        self.batch, self.total, self.ragged_first = batch, total, ragged_first
        sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.size = size
        if cu_seqlens is None:
            self.number = -(-total // self.size)
            self.rows = torch.arange(batch, device=device).expand(self.number, batch)
            index = torch.arange(self.number, device=device)[:, None].expand(self.number, batch)
            self.first, self.last = index == 0, index == self.number - 1
            self._places = None
            self.missing = torch.full((batch,), self.number * self.size - total, device=device)
            return
        bounds = cu_seqlens.to(torch.int64)
        self.number = (total + sequences * (self.size - 1)) // self.size
        counts = (bounds.diff() + self.size - 1) // self.size
        ends = counts.cumsum(0)
        starts = ends - counts
        self.missing = counts * self.size - bounds.diff()
        shift = self.missing if ragged_first else torch.zeros_like(self.missing)
        chunks = torch.arange(self.number, device=device)
        # the chunks that remain are beyond the end of the last sequence
        rows = torch.bucketize(chunks, ends, right=True).clamp(max=sequences - 1)
        index = chunks - starts[rows]
        tokens = (bounds[rows] - shift[rows] + index * self.size)[:, None] + torch.arange(self.size, device=device)
        self.rows, self.last = rows[:, None], (chunks == ends[rows] - 1)[:, None]
        self.first = ((index == 0) & (chunks < ends[-1]))[:, None]
        self._filled = ((tokens >= bounds[rows, None]) & (tokens < bounds[rows + 1, None]))[:, None, None, :, None]
        self._sources = tokens.clamp(min=0, max=max(total - 1, 0)).flatten()
        row = torch.bucketize(torch.arange(total, device=device), bounds[1:], right=True)
        self._places = torch.arange(total, device=device) - bounds[row] + shift[row] + starts[row] * self.size

    def cut(self, values: Tensor) -> Tensor:
        """``(B, T, H, X)`` as ``(N, B, H, C, X)``."""
        if self._places is None:
            extra = self.number * self.size - self.total
            # a compiled graph is for all lengths
            if torch.compiler.is_compiling() or extra:
                values = pad(values, (0, 0, 0, 0, *((extra, 0) if self.ragged_first else (0, extra))))
            return values.unflatten(1, (self.number, self.size)).permute(1, 0, 3, 2, 4)
        if self.total == 0:
            return values.new_zeros((self.number, 1, values.shape[2], self.size, values.shape[3]))
        found = values[0].index_select(0, self._sources).unflatten(0, (self.number, 1, self.size)).transpose(2, 3)
        return torch.where(self._filled, found, 0)

    def join(self, values: Tensor) -> Tensor:
        """``(N, B, H, C, X)`` as ``(B, T, H, X)``."""
        if self._places is None:
            extra = self.number * self.size - self.total
            first = extra if self.ragged_first else 0
            return values.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, first : first + self.total]
        return values.transpose(2, 3).flatten(0, 2).index_select(0, self._places)[None]

    def enter(self, chunk: int, given: Tensor, carry: Tensor) -> Tensor:
        """The states ``(B, ...)`` before a chunk, from those of the sequences and those after the chunk before."""
        return _select(self.first[chunk], given[self.rows[chunk]], carry)

    def leave(self, chunk: int, given: Tensor, carry: Tensor) -> Tensor:
        """:meth:`enter` from the other side: the gradients in the states behind a chunk."""
        return _select(self.last[chunk], given[self.rows[chunk]], carry)

    def keep(self, where: Tensor, values: Tensor, given: Tensor) -> Tensor:
        """Of ``(N, B, ...)`` those of the sequences' first or last chunks, as marked; without one the given."""
        # the last row takes those of all other chunks
        kept = torch.cat((given, given.new_zeros((1, *given.shape[1:]))))
        kept.index_copy_(0, torch.where(where, self.rows, given.shape[0]).flatten(), values.flatten(0, 1))
        return kept[:-1].contiguous()


def _select(where: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(where.reshape(-1, *[1] * (yes.dim() - 1)), yes, no)


class Decay:
    """The decay of the state in every chunk, the same for all keys; :class:`KeyDecay` has one for each.

    Args:
        log_decay: ``(..., C, 1)``, or ``(..., C, K)`` for the subclass.

    Attributes:
        reach: What is left at a token of the state before the chunk, shaped like ``log_decay``.
        rest: What is left behind the chunk of a token's addition to the state.
        whole: What is left behind the chunk of the state before it, ``(..., 1, 1)`` or ``(..., K, 1)``.
    """

    def __init__(self, log_decay: Tensor) -> None:
        self.log_decay = log_decay
        self.reach, self.rest = log_decay.cumsum(-2).exp(), _after(log_decay).exp()
        self.whole = self.reach[..., -1:, :].transpose(-1, -2)
        self._prepare()

    def _prepare(self) -> None:
        size = self.log_decay.shape[-2]
        # down a column the sum from the token behind it
        self._factors = self.log_decay.expand(*self.log_decay.shape[:-1], size).tril(-1).cumsum(-2).exp().tril()

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """``(..., C, C)``: ``a_i`` times what is left at token i of ``b_j``, for j up to i, else 0."""
        return (a @ b.transpose(-1, -2)) * self._factors

    def grade_pairs(self, gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in a, b and ``log_decay`` of :meth:`pairs`, from one that is 0 where j is beyond i.

        A pair's share goes to the tokens between its two: sums of shares, and never a difference of sums.
        """
        inner = gradient * self._factors
        shares = inner * (a @ b.transpose(-1, -2))
        between = shares.flip(-2).cumsum(-2).flip(-2).tril(-1).sum(-1, keepdim=True)
        return inner @ b, inner.transpose(-1, -2) @ a, between

    def grade_edges(self, reach: Tensor, rest: Tensor, whole: Tensor) -> Tensor:
        """The gradient in ``log_decay`` from those in the logarithms of the three attributes, by keys."""
        return self._by_decay(reach.flip(-2).cumsum(-2).flip(-2) + _before(rest) + whole.transpose(-1, -2))

    def _by_decay(self, gradient: Tensor) -> Tensor:
        return gradient.sum(-1, keepdim=True)


class KeyDecay(Decay):
    """A decay for every key.

    What is left of ``b_j`` at token i is no longer a factor on the product of two rows. A chunk is cut into halves: for
    a pair of one token in each the decay up to the cut belongs to b and the rest to a, which leaves a product of two
    matrices. Then every half is cut likewise, down to single tokens.
    """

    def _prepare(self) -> None:
        size = self.log_decay.shape[-2]
        self._factors = []
        while size > 1:
            size //= 2
            early, late = self.log_decay.unflatten(-2, (-1, 2, size)).unbind(-3)
            self._factors.append((_after(early).exp(), late.cumsum(-2).exp()))

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """As of the base class."""
        pairs = torch.diag_embed((a * b).sum(-1))
        for of_b, of_a in self._factors:
            block = _blocks(pairs, of_a.shape[-2])
            late, early = _halves(a, of_a)[1] * of_a, _halves(b, of_b)[0] * of_b
            block.copy_(late @ early.transpose(-1, -2))
        return pairs

    def grade_pairs(self, gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As of the base class."""
        own = gradient.diagonal(dim1=-2, dim2=-1)[..., None]
        grad_a, grad_b, grad_decay = own * b, own * a, torch.zeros_like(self.log_decay)
        for of_b, of_a in self._factors:
            block = _blocks(gradient, of_a.shape[-2])
            late, early = _halves(a, of_a)[1] * of_a, _halves(b, of_b)[0] * of_b
            to_late, to_early = block @ early, block.transpose(-1, -2) @ late
            _halves(grad_a, of_a)[1].add_(to_late * of_a)
            _halves(grad_b, of_b)[0].add_(to_early * of_b)
            of_decay = _halves(grad_decay, of_a)
            of_decay[1].add_((to_late * late).flip(-2).cumsum(-2).flip(-2))
            of_decay[0].add_(_before(to_early * early))
        return grad_a, grad_b, grad_decay

    def _by_decay(self, gradient: Tensor) -> Tensor:
        return gradient


def _halves(values: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Views of the earlier and the later half of every stretch of tokens."""
    return values.unflatten(-2, (-1, 2, like.shape[-2])).unbind(-3)


def _blocks(pairs: Tensor, size: int) -> Tensor:
    """A view of the pairs of the later half of every stretch with the earlier one: blocks below the diagonal."""
    # both dimensions are stretch, half, token
    blocks = pairs.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _after(values: Tensor) -> Tensor:
    """For every token the sum over those behind it."""
    return pad(values[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def _before(values: Tensor) -> Tensor:
    """For every token the sum over those before it."""
    return pad(values[..., :-1, :].cumsum(-2), (0, 0, 1, 0))
