"""``ssm_scan`` in products of matrices on whole chunks, on any device, differentiated by autograd.

With real numbers in place of complex ones, S = 2 N of them a state, a chunk of C tokens is for every channel

    Y = K U + O X_in,   X_out = A^C X_in + B U

with the Toeplitz matrix K of the kernel's first C taps ``(C, C)``, ``O_t = c A^(t+1)`` and ``B_s = A^(C-1-s) b``, and
with as many columns as there are chunks. A sequence's first chunk is the one that may lack tokens, in front, where
zeros do no harm; what a given state adds to it is added apart, because it has fewer steps to go.

Powers are made in float64, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.chunks import Chunks, chunk_length
from seqzoo.kernels.linear_scan import linear_scan
from seqzoo.kernels.matrix_scan import matrix_scan
from seqzoo.kernels.ssm_kernel.discretise import (
    StateSpace,
    as_complex,
    as_reader,
    as_real,
    diagonal_step,
    diagonal_steps,
    low_rank_steps,
)

# tokens of a chunk: at most, and at least where each chunk costs a product with a dense matrix
CHUNK, DENSE_CHUNK = 64, 32


def ssm_scan(
    u: Tensor, space: StateSpace, initial_state: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As :func:`seqzoo.ops.ssm_scan`; ``dtype`` is the complex type of the computation."""
    batch, total, _ = u.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if 0 in u.shape or space.poles.shape[1] == 0:
        given = space.poles.new_zeros((rows, *space.poles.shape), dtype=dtype)
        return torch.zeros_like(u), given if initial_state is None else initial_state.clone()
    if total == 1 and cu_seqlens is None:
        return _token(u, space, initial_state, dtype)
    # a compiled graph is for all lengths
    size = CHUNK if torch.compiler.is_compiling() else chunk_length(CHUNK, batch * total, rows)
    if space.low_rank is not None:
        size = max(size, DENSE_CHUNK)
    kind = _Diagonal if space.low_rank is None else _LowRank
    return _Scan(kind(space, dtype), u, initial_state, cu_seqlens, size).run()


def _token(u: Tensor, space: StateSpace, state: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One token ``(B, 1, D)``: what a low rank makes of N states takes N operations."""
    if space.low_rank is None:
        factor, inputs = diagonal_step(space)
        left = 0 if state is None else factor.to(dtype) * state
    else:
        steps, inputs = low_rank_steps(space)
        left = 0 if state is None else 2 * steps.to(dtype).solve(state) - state
    after = inputs.to(dtype) * u[:, 0, :, None].to(accumulator(u.dtype)) + left
    y = (space.readout.to(dtype) * after).sum(-1).real
    return y[:, None].to(u.dtype), after


class _Diagonal:
    """A diagonal transition."""

    def __init__(self, space: StateSpace, dtype: torch.dtype) -> None:
        self.exponents, self.inputs = diagonal_steps(space)
        self.readout, self.dtype = space.readout, dtype

    def tables(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first taps ``(D, C)``, O ``(D, C, S)`` and B ``(D, S, C)`` of chunks of C tokens."""
        places = torch.arange(size, dtype=torch.float64, device=self.inputs.device)
        powers = (self.exponents[:, None] * places[:, None]).exp()  # (D, C, N)
        added = powers * self.inputs[:, None]
        taps = (added * self.readout[:, None]).sum(-1).real
        reads = powers * (self.exponents.exp() * self.readout)[:, None]
        return taps, as_reader(reads), as_real(added.flip(1)).mT

    def skip(self, state: Tensor, steps: Tensor, most: int) -> Tensor:
        """States ``(R, D, N)`` after so many steps ``(R,)`` without an input."""
        return (self.exponents * steps[:, None, None]).exp().to(self.dtype) * state

    def carry(
        self, added: Tensor, first: Tensor, size: int, cu_chunks: Tensor | None, ends: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Runs over chunks.

        Args:
            added: What they add to the states, ``(D, S, n, R)``.
            first: Whether they are their sequence's first, ``(n, R)``.
            size: Their tokens.
            cu_chunks: Where packed sequences begin and end among them, ``(sequences + 2,)``; the last is none.
            ends: The same, without the first and the last.

        Returns:
            What enters them, ``(D, S, n, R)``, and the states after the sequences, ``(sequences, D, N)``.
        """
        found = as_complex(added.permute(3, 2, 0, 1))  # (R, n, D, N)
        factor = (self.exponents * size).exp().to(self.dtype)
        after, final = linear_scan(factor.flatten(), found.flatten(2), cu_seqlens=cu_chunks)
        # what leaves a chunk enters the next; a slice of one chunk fewer would tie compiled code to its length
        before = torch.where(first.T[..., None], 0, after.roll(1, 1))
        sequences = final.shape[0] if ends is None else ends.shape[0]
        return as_real(before.view_as(found)).permute(2, 3, 1, 0), final[:sequences].unflatten(1, factor.shape)


class _LowRank:
    """A dense transition, made of a diagonal and a low rank."""

    def __init__(self, space: StateSpace, dtype: torch.dtype) -> None:
        self.steps, self.inputs = low_rank_steps(space)
        self.readout, self.dtype = space.readout, dtype
        self._powers = [self.steps.real_transition()]

    def power(self, doublings: int) -> Tensor:
        """The transition of ``2 ** doublings`` tokens, ``(D, S, S)``."""
        while len(self._powers) <= doublings:
            self._powers.append(torch.bmm(self._powers[-1], self._powers[-1]))
        return self._powers[doublings]

    def tables(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """As of the other class; C is a power of two."""
        added, reader = as_real(self.inputs)[..., None], as_reader(self.readout)[:, None]
        reads = torch.bmm(reader, self.power(0))
        for doublings in range(size.bit_length() - 1):
            power = self.power(doublings)
            added = torch.cat((added, torch.bmm(power, added)), 2)
            reads = torch.cat((reads, torch.bmm(reads, power)), 1)
        return torch.bmm(reader, added)[:, 0], reads, added.flip(2)

    def skip(self, state: Tensor, steps: Tensor, most: int) -> Tensor:
        """As of the other class; no more steps than ``most``."""
        real = as_real(state).permute(1, 2, 0)  # (D, S, R)
        for doublings in range(most.bit_length()):
            after = torch.bmm(self.power(doublings).to(real.dtype), real)
            real = torch.where((steps >> doublings & 1).bool(), after, real)
        return as_complex(real.permute(2, 0, 1))

    def carry(
        self, added: Tensor, first: Tensor, size: int, cu_chunks: Tensor | None, ends: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As of the other class."""
        matrix = self.power(size.bit_length() - 1).to(added.dtype)
        after = matrix_scan(matrix, added.permute(2, 0, 1, 3), first)  # (n, D, S, R)
        before = torch.where(first[:, None, None], 0, after.roll(1, 0))
        final = after[-1].permute(2, 0, 1) if ends is None else after[..., 0][(ends - 1).clamp(min=0)]
        return before.permute(1, 2, 0, 3), as_complex(final)


class _Scan:
    """One call."""

    def __init__(
        self,
        steps: _Diagonal | _LowRank,
        u: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        size: int,
    ) -> None:
        self.steps, self.u, self.given, self.cu_seqlens = steps, u, initial_state, cu_seqlens
        self.chunks = Chunks(u.shape[0], u.shape[1], cu_seqlens, size, u.device, ragged_first=True)
        self.dtype = accumulator(u.dtype)

    def run(self) -> tuple[Tensor, Tensor]:
        chunks, size = self.chunks, self.chunks.size
        # (n, R, 1, C, D) to (D, C, n R)
        cut = chunks.cut(self.u[:, :, None].to(self.dtype))
        columns = cut[:, :, 0].permute(3, 2, 0, 1)
        number, rows = columns.shape[2:]
        columns = columns.flatten(2)
        taps, reads, writes = (table.to(self.dtype) for table in self.steps.tables(size))
        added = torch.bmm(writes, columns).unflatten(2, (number, rows))
        if self.given is not None:
            added = added + self._entering_first(self.given)
        before, final = self.steps.carry(added, chunks.first, size, *self._ends())
        y = torch.baddbmm(torch.bmm(_toeplitz(taps), columns), reads, before.flatten(2))
        y = chunks.join(y.unflatten(2, (number, rows)).permute(2, 3, 1, 0)[:, :, None])[:, :, 0]
        if self.given is not None:
            y = y + self._read_first(reads, self.given)
        if self.cu_seqlens is not None:
            empty = (self.cu_seqlens.diff() == 0)[:, None, None]
            final = torch.where(empty, 0 if self.given is None else self.given, final)
        return y.to(self.u.dtype), final.contiguous()

    def _ends(self) -> tuple[Tensor | None, Tensor | None]:
        if self.cu_seqlens is None:
            return None, None
        ends = ((self.cu_seqlens.diff() + self.chunks.missing) // self.chunks.size).cumsum(0).to(torch.int32)
        # chunks that no sequence needs are one more
        return torch.cat((ends.new_zeros(1), ends, ends.new_full((1,), self.chunks.number))), ends

    def _entering_first(self, given: Tensor) -> Tensor:
        """What the given states are after the first chunks, ``(D, S, n, R)``; zero for all other chunks."""
        chunks = self.chunks
        left = as_real(self.steps.skip(given, chunks.size - chunks.missing, chunks.size))
        return torch.where(chunks.first, left[chunks.rows].permute(2, 3, 0, 1), 0)

    def _read_first(self, reads: Tensor, given: Tensor) -> Tensor:
        """What the first chunks' tokens read of the given states, ``(B, T, D)``."""
        chunks, total = self.chunks, self.u.shape[1]
        found = torch.bmm(reads, as_real(given).permute(1, 2, 0)).permute(2, 1, 0)  # (R, C, D)
        if self.cu_seqlens is None:
            tokens = total - (chunks.number - 1) * chunks.size
            return pad(found[:, :tokens], (0, 0, 0, total - tokens))
        bounds, token = self.cu_seqlens.to(torch.int64), torch.arange(total, device=given.device)
        row = torch.bucketize(token, bounds[1:], right=True)
        place = token - bounds[row]
        inside = place < chunks.size - chunks.missing[row]
        return torch.where(inside[:, None], found[row, place.clamp(max=chunks.size - 1)], 0)[None]


def _toeplitz(taps: Tensor) -> Tensor:
    """Of taps ``(D, C)`` the lower triangular matrices ``(D, C, C)`` with ``taps[t - s]`` at t and s."""
    return pad(taps, (taps.shape[1] - 1, 0)).unfold(1, taps.shape[1], 1).flip(2)
