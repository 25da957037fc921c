"""``linear_attention`` in PyTorch operations on whole chunks: any device, any dtype, no compiler, no host reads.

Every sequence is cut into chunks of its own, so that what packed sequences hold never meets. A *tile* is one head of
one chunk, C tokens; the states run from chunk to chunk, everything else is matrix products of tiles. With ``p(s..t)``
the product of the decays of tokens s to t, one a head or one a key:

    A_ij = scale sum_c q_ic k_jc p_c(j+1..i) for j <= i,  Q_i = scale p(1..i) q_i,  K_j = p(j+1..C) k_j
    o = A v + Q S_in,  S_out = p(1..C) S_in + K^T v

The products are exponentials of sums over just these tokens, never of differences of longer sums, whose cancellation
shows where a decay is strong. For the same reason the gradient of the decay of token t is summed over what passes
through it: the pairs j < t <= i, the reads of S_in at i >= t, the writes to S_out at j < t, and S_in on its way to
S_out. With a decay for every key the chunks are short and the pairs elementwise.

Tiles are made a *block* at a time, some heads of some chunks, which bounds the temporaries. The backward pass keeps the
states that enter the blocks and computes those inside again.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.dispatch import check_boundaries

# tokens of a chunk: with one decay a head, and with one a key, where the pairs are not matrix products
CHUNK, CHUNK_OF_KEYS = 64, 16
# elements of the largest temporary
BLOCK = 1 << 24


@dataclass(frozen=True)
class Block:
    """Some neighbouring heads of some neighbouring chunks, whose tiles are ordered by row, chunk and head."""

    heads: slice
    chunks: slice

    @property
    def n_heads(self) -> int:
        """How many heads."""
        return self.heads.stop - self.heads.start

    @property
    def n_chunks(self) -> int:
        """How many chunks."""
        return self.chunks.stop - self.chunks.start


@dataclass(frozen=True)
class Chunks:
    """Where the chunks lie: R rows, computed beside each other, of chunks that follow one another.

    Attributes:
        tokens: Of every place its token among all of the batch, ``(R, n, C)``, any where there is none.
        valid: Whether there is one, ``(R, n, C)``.
        sequence: The sequence of a chunk, ``(R, n)``; one beyond the last for a chunk without tokens.
        first: Whether it is its sequence's first, ``(R, n)``.
        last: Whether it is its sequence's last, ``(R, n)``.
    """

    tokens: Tensor
    valid: Tensor
    sequence: Tensor
    first: Tensor
    last: Tensor


@dataclass(frozen=True)
class Faded:
    """What a block adds to the states; without a decay k itself.

    Attributes:
        writing: K of the module's formulas, ``(M, C, K)``.
        passing: p(1..C), ``(M, K)``, or None.
        decays: What the solver keeps of the decays, or None.
    """

    writing: Tensor
    passing: Tensor | None
    decays: Any


def chunk_length(limit: int, total: int, sequences: int) -> int:
    """The power of two at or above the mean length of a sequence, at most ``limit``."""
    mean = -(-total // max(1, sequences))
    return min(limit, 1 << (mean - 1).bit_length())


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """As the op ``linear_attention_forward``."""
    return solve(Solver, q, k, v, log_decay, initial_state, cu_seqlens, scale, causal)


def backward(
    grad_o: Tensor,
    grad_final_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the op ``linear_attention_backward``."""
    gradients = grad_o, grad_final_state
    return grade(Solver, gradients, q, k, v, log_decay, initial_state, cu_seqlens, scale, causal)


def solve(
    solver: type[Solver],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The forward pass by one of the solvers."""
    check_boundaries(cu_seqlens, q.shape[1])
    if 0 in (*q.shape, *v.shape):
        return torch.zeros_like(v), _state(q, v, initial_state, cu_seqlens)
    if q.shape[1] == 1 and cu_seqlens is None:
        return solver.step(q, k, v, log_decay, initial_state, scale)
    return solver(q, k, v, log_decay, initial_state, cu_seqlens, scale, causal).forward()


def grade(
    solver: type[Solver],
    gradients: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass by one of the solvers."""
    check_boundaries(cu_seqlens, q.shape[1])
    if 0 in (*q.shape, *v.shape):
        to_decay = q.new_empty(0) if log_decay is None else torch.zeros_like(log_decay)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), to_decay, gradients[1].clone()
    return solver(q, k, v, log_decay, initial_state, cu_seqlens, scale, causal).backward(*gradients)


def _state(q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.clone()
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_zeros((rows, v.shape[2], q.shape[3], v.shape[3]), dtype=accumulator(q.dtype))


class Solver:
    """One call of the op; what is not a matrix product is in methods of their own, which a compiled solver replaces.

    Args:
        q: As the op's, like all that follow, and no tensor empty.
        k: As the op's.
        v: As the op's.
        log_decay: As the op's.
        initial_state: As the op's.
        cu_seqlens: As the op's.
        scale: As the op's.
        causal: As the op's.
    """

    # whether a row beyond the last sequence's takes what belongs to none
    spare = 1

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        causal: bool,
    ) -> None:
        self.q, self.k, self.v, self.log_decay = q, k, v, log_decay
        self.initial_state, self.scale, self.causal = initial_state, scale, causal
        self.batch, self.total, self.groups, self.size = q.shape
        self.heads, self.width = v.shape[2:]
        self.dtype = accumulator(q.dtype)
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.by_key = log_decay is not None and log_decay.dim() == 4
        self.chunk = chunk_length(CHUNK_OF_KEYS if self.by_key else CHUNK, self.batch * self.total, self.sequences)
        self.prepare(cu_seqlens)

    # -- what a compiled solver replaces --

    @staticmethod
    def step(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The forward pass over a single token: the recurrence as it stands."""
        dtype, (groups, size) = accumulator(q.dtype), q.shape[2:]
        queries, keys = (x.to(dtype).view(-1, groups, 1, 1, size) for x in (q, k))
        state = keys.mT * v.to(dtype).view(v.shape[0], groups, -1, 1, v.shape[3])
        if initial_state is not None:
            before = initial_state.view(state.shape)
            if log_decay is not None:
                decay = log_decay.to(dtype).exp()
                before = before * decay.view(-1, *state.shape[1:3], size if decay.dim() == 4 else 1, 1)
            state += before
        o = torch.matmul(queries, state).mul_(scale)
        return o.view(v.shape).to(v.dtype), state.flatten(1, 2)

    def prepare(self, cu_seqlens: Tensor | None) -> None:
        """Finds the chunks and the blocks."""
        self.chunks = self.cut(cu_seqlens)
        rows, number = self.chunks.sequence.shape
        pairs = self.chunk * self.chunk * (self.size if self.by_key else 1)
        largest = max(pairs, self.chunk * max(self.size, self.width), self.size * self.width)
        self.divide(number, max(1, BLOCK // (largest * rows)))
        self.carry_rows, self.chunk_sequences = rows, self.chunks.sequence

    def load(self, x: Tensor, block: Block, factor: float = 1.0) -> Tensor:
        """The tiles of ``x (B, T, G or H, n)`` times a factor, ``(M, C, n)``; zero where there is no token."""
        members = self.members(x, block)
        tokens, valid = (at[:, block.chunks] for at in (self.chunks.tokens, self.chunks.valid))
        found = x.flatten(0, 1)[:, members][tokens].to(self.dtype) * factor
        found = torch.where(valid[..., None, None], found, 0).transpose(2, 3)  # (R, m, members, C, n)
        shared = block.n_heads // found.shape[2]
        return found[:, :, :, None].expand(-1, -1, -1, shared, -1, -1).reshape(-1, *found.shape[3:])

    def store(self, tiles: Tensor, block: Block, target: Tensor, factor: float = 1.0) -> None:
        """Adds tiles ``(M, C, n)`` times a factor to ``target (B T + spare, G or H, n)``, heads to their group."""
        members = self.members(target, block)
        rows, chunk = self.carry_rows, self.chunk
        summed = tiles.view(rows, block.n_chunks, members.stop - members.start, -1, chunk, tiles.shape[2]).sum(3)
        tokens, valid = (at[:, block.chunks].flatten() for at in (self.chunks.tokens, self.chunks.valid))
        tokens = torch.where(valid, tokens, target.shape[0] - 1)
        added = factor * summed.transpose(2, 3).flatten(0, 2)
        part = target[:, members]
        part.index_copy_(0, tokens, part[tokens] + added)

    def output(self, like: Tensor) -> Tensor:
        """Memory for :meth:`store`, for a result of the shape of ``like``."""
        return like.new_zeros((self.batch * self.total + 1, *like.shape[2:]), dtype=self.dtype)

    def finish(self, stored: Tensor, like: Tensor) -> Tensor:
        """What was stored, in the shape and dtype of ``like``."""
        return stored[:-1].view(like.shape).to(like.dtype)

    def scan(self, block: Block, states: Tensor, passing: Tensor | None, carry: Tensor, final: Tensor | None) -> None:
        """Runs the recurrence over a block's chunks: of what each adds makes the state that enters it, in place.

        Args:
            block: Which tiles.
            states: ``(M, K, V)``.
            passing: ``(M, K)``, or None.
            carry: The state between blocks, ``(R, heads of the block, K, V)``, updated.
            final: Takes the states after the sequences, ``(S + spare, H, K, V)``, or None.
        """
        each, factor = self.by_chunk(block, states), None if passing is None else self.by_chunk(block, passing)
        for index in range(block.n_chunks):
            sequence, first, last = self.places(block, index)
            given = self.given(block, sequence)
            state = torch.where(first, 0 if given is None else given, carry)
            after = each[:, index] + (state if factor is None else factor[:, index, :, :, None] * state)
            each[:, index] = state
            carry.copy_(after)
            if final is not None:
                slots = torch.where(last[:, 0, 0, 0], sequence, self.sequences)
                final[:, block.heads].index_copy_(0, slots, after)

    def scan_back(
        self,
        block: Block,
        received: Tensor,
        states: Tensor,
        passing: Tensor | None,
        carry: Tensor,
        grad_final: Tensor,
        grad_initial: Tensor,
    ) -> Tensor | None:
        """The recurrence of the states' gradients: of what each chunk's reads add makes that of S_out, in place.

        Args:
            block: Which tiles.
            received: ``(M, K, V)``.
            states: Those that enter the chunks, ``(M, K, V)``.
            passing: ``(M, K)``, or None.
            carry: The gradient between blocks, ``(R, heads of the block, K, V)``, updated.
            grad_final: ``(S, H, K, V)``.
            grad_initial: Takes the gradients before the sequences, ``(S + spare, H, K, V)``.

        Returns:
            The gradient of the logarithm of ``passing``, ``(M, K)``, or None.
        """
        each, factor = self.by_chunk(block, received), None if passing is None else self.by_chunk(block, passing)
        for index in reversed(range(block.n_chunks)):
            sequence, first, last = self.places(block, index)
            arriving = grad_final[:, block.heads][sequence.clamp(max=self.sequences - 1)]
            gradient = torch.where(last, arriving, carry)
            before = each[:, index] + (gradient if factor is None else factor[:, index, :, :, None] * gradient)
            each[:, index] = gradient
            carry.copy_(before)
            slots = torch.where(first[:, 0, 0, 0], sequence, self.sequences)
            grad_initial[:, block.heads].index_copy_(0, slots, before)
        return None if passing is None else passing * (states * received).sum(-1)

    def fade(self, block: Block, k: Tensor) -> Faded:
        """What a block adds to the states."""
        if self.log_decay is None:
            return Faded(k, None, None)
        decays = _between(self.logarithms(block, self.log_decay))
        if self.by_key:
            return Faded(k * decays.until.mT, decays.since[..., -1], decays)
        return Faded(k * decays.until[..., None], decays.since[:, -1:].expand(-1, self.size), decays)

    def pairs(self, block: Block, q: Tensor, k: Tensor, faded: Faded) -> tuple[Tensor, Tensor]:
        """A of the module's formulas, ``(M, C, C)``, and Q, ``(M, C, K)``."""
        decays: _Between | None = faded.decays
        if decays is None:
            return torch.bmm(q, k.mT).tril_(), q
        if self.by_key:
            return (q.mT[..., None] * k.mT[:, :, None] * decays.within).sum(1), q * decays.since.mT
        return torch.bmm(q, k.mT).mul_(decays.within), q * decays.since[..., None]

    def grade_pairs(
        self,
        block: Block,
        q: Tensor,
        k: Tensor,
        faded: Faded,
        pairs: Tensor,
        reading: Tensor,
        grad_pairs: Tensor,
        grad_reading: Tensor,
        grad_writing: Tensor,
        grad_passing: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """From the gradients in A, Q, K and p(1..C) those in q, k and the decay; may overwrite what it is given.

        Returns:
            ``(M, C, K)``, ``(M, C, K)``, and ``(M, C)`` or ``(M, C, K)`` or None.
        """
        if grad_passing is None:
            grad_pairs = grad_pairs.tril_()
            return grad_reading.baddbmm_(grad_pairs, k), grad_writing.baddbmm_(grad_pairs.mT, q), None
        decay: _Between = faded.decays
        reads, writes = reading * grad_reading, faded.writing * grad_writing
        if self.by_key:
            inner = grad_pairs[:, None] * decay.within  # (M, K, C, C)
            grad_q = (inner @ k.mT[..., None])[..., 0].mT + decay.since.mT * grad_reading
            grad_k = (inner.mT @ q.mT[..., None])[..., 0].mT + decay.until.mT * grad_writing
            through = _straddling(inner * q.mT[..., None] * k.mT[:, :, None]).mT
        else:
            inner = grad_pairs * decay.within
            grad_q = (decay.since[..., None] * grad_reading).baddbmm_(inner, k)
            grad_k = (decay.until[..., None] * grad_writing).baddbmm_(inner.mT, q)
            through = _straddling(pairs * grad_pairs)
            reads, writes, grad_passing = reads.sum(-1), writes.sum(-1), grad_passing.sum(-1, keepdim=True)
        through += reads.flip(1).cumsum(1).flip(1)
        through[:, 1:] += writes[:, :-1].cumsum(1)
        return grad_q, grad_k, through + (grad_passing[:, None] if self.by_key else grad_passing)

    # -- what the solvers share --

    def cut(self, cu_seqlens: Tensor | None) -> Chunks:
        """The chunks, of as many as there may be: where boundaries are on a device, their number is not read."""
        device, size = self.q.device, self.chunk
        if cu_seqlens is None:
            starts = torch.arange(self.batch, device=device)[:, None] * self.total  # (R, 1), as all below
            lengths = torch.full_like(starts, self.total)
            number = -(-self.total // size)
            index = torch.arange(number, device=device).expand(self.batch, number)
            sequence = torch.arange(self.batch, device=device)[:, None].expand_as(index)
        else:
            bounds = cu_seqlens.to(torch.int64)
            ends = (bounds.diff() + size - 1).div(size, rounding_mode="floor").cumsum(0)
            number = (self.total + self.sequences * (size - 1)) // size
            flat = torch.arange(number, device=device)
            sequence = torch.bucketize(flat, ends, right=True)[None]
            at = sequence.clamp(max=self.sequences - 1)
            starts, lengths = bounds[at], bounds.diff()[at]
            index = flat - pad(ends, (1, 0))[at]
            # behind the last chunk with tokens
            lengths = torch.where(sequence < self.sequences, lengths, 0)
        place = index[..., None] * size + torch.arange(size, device=device)
        valid = place < lengths[..., None]
        tokens = torch.where(valid, starts[..., None] + place, 0)
        present = place[..., 0] < lengths
        return Chunks(tokens, valid, sequence, present & (index == 0), present & (place[..., -1] >= lengths - 1))

    def divide(self, number: int, most: int) -> None:
        """Divides H heads of ``number`` chunks into blocks of at most so many tiles a row, whole groups or parts."""
        shared, at_once = self.heads // self.groups, max(1, most // number)
        if at_once >= shared:
            step = at_once // shared * shared
            ranges = [(first, min(first + step, self.heads)) for first in range(0, self.heads, step)]
        else:
            ranges = [
                (first, min(first + at_once, group + shared))
                for group in range(0, self.heads, shared)
                for first in range(group, group + shared, at_once)
            ]
        span = max(1, most // min(at_once, self.heads))
        spans = [slice(first, min(first + span, number)) for first in range(0, number, span)]
        self.blocks = [[Block(slice(*heads), chunks) for chunks in spans] for heads in ranges]

    def members(self, x: Tensor, block: Block) -> slice:
        """The heads of a block in a tensor's last dimension but one, or their groups."""
        shared = self.heads // x.shape[-2]
        return slice(block.heads.start // shared, (block.heads.stop - 1) // shared + 1)

    def logarithms(self, block: Block, log_decay: Tensor) -> Tensor:
        """The decays' logarithms, the tokens last: ``(M, C)`` or ``(M, K, C)``; zero where there is no token."""
        found = log_decay.expand(self.batch, self.total, -1) if log_decay.dim() == 1 else log_decay
        return self.load(found, block).mT if self.by_key else self.load(found[..., None], block)[..., 0]

    def by_chunk(self, block: Block, tiles: Tensor) -> Tensor:
        """Tiles as ``(R, chunks, heads, ...)``."""
        return tiles.view(-1, block.n_chunks, block.n_heads, *tiles.shape[1:])

    def places(self, block: Block, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one chunk of every row the sequence, and whether it is its first or its last, for states."""
        at = block.chunks.start + index
        first, last = (flag[:, at, None, None, None] for flag in (self.chunks.first, self.chunks.last))
        return self.chunks.sequence[:, at], first, last

    def given(self, block: Block, sequence: Tensor) -> Tensor | None:
        """The initial states of some sequences, or None for zeros."""
        if self.initial_state is None:
            return None
        return self.initial_state[:, block.heads][sequence.clamp(max=self.sequences - 1)]

    def states(self, given: Tensor | None) -> Tensor:
        """Rows of states for all sequences, which begin as those given."""
        shape = self.sequences, self.heads, self.size, self.width
        rows = self.q.new_zeros(shape, dtype=self.dtype) if given is None else given
        return pad(rows, (0, 0, 0, 0, 0, 0, 0, 1)) if self.spare else rows.clone()

    def carries(self, block: Block) -> Tensor:
        """A state for every row and head of a block, zero."""
        return self.q.new_zeros((self.carry_rows, block.n_heads, self.size, self.width), dtype=self.dtype)

    def spread(self, rows: Tensor, block: Block) -> Tensor:
        """Of states of sequences those of the tiles, ``(M, K, V)``."""
        sequence = self.chunk_sequences[:, block.chunks].flatten()
        return rows[:, block.heads].index_select(0, sequence).flatten(0, 1)

    def forward(self) -> tuple[Tensor, Tensor]:
        """o and the final states."""
        o, final = self.output(self.v), self.states(self.initial_state)
        for blocks in self.blocks:
            carry = self.carries(blocks[0])
            for block in blocks:
                k, v = self.load(self.k, block), self.load(self.v, block)
                if not self.causal:
                    self.scan(block, torch.bmm(k.mT, v), None, carry, final)
                    continue
                faded = self.fade(block, k)
                states = torch.bmm(faded.writing.mT, v)
                self.scan(block, states, faded.passing, carry, final)
                pairs, reading = self.pairs(block, self.load(self.q, block, self.scale), k, faded)
                self.store(torch.bmm(reading, states).baddbmm_(pairs, v), block, o)
        if not self.causal:
            for block in itertools.chain(*self.blocks):
                q = self.load(self.q, block, self.scale)
                self.store(torch.bmm(q, self.spread(final, block)), block, o)
        return self.finish(o, self.v), final[: self.sequences].contiguous()

    def backward(self, grad_o: Tensor, grad_final: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of q, k, v, log_decay and the initial state."""
        to_q, to_k, to_v = (self.output(x) for x in (self.q, self.k, self.v))
        grad_initial = self.states(grad_final)
        if self.causal:
            grad_decay = self._backward_causal(grad_o, grad_final, to_q, to_k, to_v, grad_initial)
        else:
            grad_decay = self.q.new_empty(0)
            self._backward_whole(grad_o, grad_final, to_q, to_k, to_v, grad_initial)
        stored = (to_q, self.q), (to_k, self.k), (to_v, self.v)
        grad_q, grad_k, grad_v = (self.finish(gradient, x) for gradient, x in stored)
        return grad_q, grad_k, grad_v, grad_decay, grad_initial[: self.sequences].contiguous()

    def _backward_causal(
        self, grad_o: Tensor, grad_final: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, grad_initial: Tensor
    ) -> Tensor:
        like, each, to_decay = self.log_decay, None, None
        if like is not None:
            shape = (self.batch, self.total, self.heads, self.size if self.by_key else 1)
            # a token's share of a head's is not rounded before they are summed
            each = like.new_empty(1, dtype=self.dtype if like.dim() == 1 else like.dtype).expand(shape)
            to_decay = self.output(each)
        for blocks in self.blocks:
            carry, entering = self.carries(blocks[0]), []
            for block in blocks[:-1]:
                entering.append(carry.clone())
                faded = self.fade(block, self.load(self.k, block))
                self.scan(block, torch.bmm(faded.writing.mT, self.load(self.v, block)), faded.passing, carry, None)
            entering.append(carry)
            gradient = self.carries(blocks[0])
            for block, carry in zip(reversed(blocks), reversed(entering), strict=True):
                k, v, arriving = (self.load(x, block) for x in (self.k, self.v, grad_o))
                faded = self.fade(block, k)
                states = torch.bmm(faded.writing.mT, v)
                self.scan(block, states, faded.passing, carry, None)
                q = self.load(self.q, block, self.scale)
                pairs, reading = self.pairs(block, q, k, faded)
                after = torch.bmm(reading.mT, arriving)
                to_passing = self.scan_back(block, after, states, faded.passing, gradient, grad_final, grad_initial)
                self.store(torch.bmm(faded.writing, after).baddbmm_(pairs.mT, arriving), block, to_v)
                inner = torch.bmm(arriving, v.mT), torch.bmm(arriving, states.mT), torch.bmm(v, after.mT)
                grad_q, grad_k, through = self.grade_pairs(block, q, k, faded, pairs, reading, *inner, to_passing)
                self.store(grad_q, block, to_q, self.scale)
                self.store(grad_k, block, to_k)
                if through is not None and to_decay is not None:
                    self.store(through.view(*through.shape[:2], -1), block, to_decay)
        if like is None or each is None or to_decay is None:
            return self.q.new_empty(0)
        gradient = self.finish(to_decay, each)
        return gradient.sum((0, 1, 3)).to(like.dtype) if like.dim() == 1 else gradient.view(like.shape)

    def _backward_whole(
        self, grad_o: Tensor, grad_final: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, grad_initial: Tensor
    ) -> None:
        final = self.states(self.initial_state)
        for blocks in self.blocks:
            carry, gradient = self.carries(blocks[0]), self.carries(blocks[0])
            for block in blocks:
                states = torch.bmm(self.load(self.k, block).mT, self.load(self.v, block))
                self.scan(block, states, None, carry, final)
            for block in reversed(blocks):
                received = torch.bmm(self.load(self.q, block, self.scale).mT, self.load(grad_o, block))
                self.scan_back(block, received, received, None, gradient, grad_final, grad_initial)
        for block in itertools.chain(*self.blocks):
            k, v, arriving = (self.load(x, block) for x in (self.k, self.v, grad_o))
            after = self.spread(grad_initial, block)
            self.store(torch.bmm(k, after), block, to_v)
            self.store(torch.bmm(v, after.mT), block, to_k)
            self.store(torch.bmm(arriving, self.spread(final, block).mT), block, to_q, self.scale)


@dataclass(frozen=True)
class _Between:
    """Products of decays: p(j+1..i) for j <= i and 0 above ``(..., C, C)``, p(1..i) and p(j+1..C) ``(..., C)``."""

    within: Tensor
    since: Tensor
    until: Tensor


def _between(logarithms: Tensor) -> _Between:
    size = logarithms.shape[-1]
    below = torch.ones((size, size), dtype=torch.bool, device=logarithms.device).tril(-1)
    sums = torch.where(below, logarithms[..., None], 0).cumsum(-2)
    within = sums.exp().tril()
    return _Between(within, logarithms.cumsum(-1).exp(), within[..., -1, :])


def _straddling(pairs: Tensor) -> Tensor:
    """For every t the sum of ``pairs[..., i, j]`` over j < t <= i."""
    below = torch.ones(pairs.shape[-2:], dtype=torch.bool, device=pairs.device).tril(-1)
    return torch.where(below, pairs.flip(-2).cumsum(-2).flip(-2), 0).sum(-1)
