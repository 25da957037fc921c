"""``linear_attention`` in PyTorch operations on whole chunks: any device, any dtype, no compiler, no host reads.

Every sequence is cut into chunks of its own, so that what packed sequences hold never meets. The states run from chunk
to chunk, everything else is matrix products. With ``p(s..t)`` the product of the decays of tokens s to t, one a head or
one a key, and C tokens in a chunk:

    A_ij = scale sum_c q_ic k_jc p_c(j+1..i) for j <= i
    o_i = sum_j A_ij v_j + scale (p(1..i) q_i) S_in,  S_out = p(1..C) S_in + sum_j (p(j+1..C) k_j)^T v_j

A *tile* is a group of one chunk: q and k ``(C, K)``, and the values of the group's m heads beside each other,
``(C, m V)``, so that one product makes the states ``(K, m V)`` of all its heads. That is :class:`ByValue`: a decay that
all keys share goes over to the values, ``p(j+1..C) v_j`` and ``p(1..i) (q_i S_in)``. A decay for every key is the keys'
own, and every head has tiles of its own, m = 1: that is :class:`ByKey`. Its chunks are short, its pairs elementwise.

The products are exponentials of sums over just these tokens, never of differences of longer sums, whose cancellation
shows where a decay is strong. For the same reason the gradient of the decay of token t is summed over what passes
through it: the pairs j < t <= i, the reads of S_in at i >= t, the writes to S_out at j < t, and S_in on its way to
S_out.

Tiles are made a *block* at a time, some heads of some chunks, which bounds the temporaries. The backward pass keeps the
states that enter the blocks and computes those inside again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.chunks import chunk_length
from seqzoo.kernels.dispatch import check_boundaries

# tokens of a chunk: with one decay a head, and with one a key, where the pairs are not matrix products
CHUNK, CHUNK_OF_KEYS = 64, 16
# elements of the largest temporary
BLOCK = 1 << 24


@dataclass(frozen=True)
class Block:
    """Some neighbouring heads of some neighbouring chunks, whose tiles are ordered by row, chunk and group.

    Attributes:
        heads: Which heads: whole groups, or some of one.
        members: m, the heads of a tile.
        chunks: Which chunks.
    """

    heads: slice
    members: int
    chunks: slice

    @property
    def n_heads(self) -> int:
        """How many heads."""
        return self.heads.stop - self.heads.start

    @property
    def n_groups(self) -> int:
        """How many tiles a chunk has."""
        return self.n_heads // self.members

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
class Added:
    """What a block adds to the states.

    Attributes:
        k: ``(M, C, K)`` of the block's M tiles.
        v: ``(M, C, m V)``.
        decays: What the solver keeps of the decays, or None.
        writing: k or v with the decays from the token to the end of its chunk.
        passing: p(1..C), ``(M, K)`` by keys, ``(M, m)`` by values, or None.
        states: What the chunks add, which :meth:`Solver.scan` makes what enters them, ``(M, K, m V)``.
    """

    k: Tensor
    v: Tensor
    decays: Any
    writing: Tensor
    passing: Tensor | None
    states: Tensor


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
    return solve((ByValue, ByKey), q, k, v, log_decay, initial_state, cu_seqlens, scale, causal)


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
    return grade((ByValue, ByKey), gradients, q, k, v, log_decay, initial_state, cu_seqlens, scale, causal)


def solve(
    solvers: tuple[type[Solver], type[Solver]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The forward pass by one of the solvers, by values and by keys."""
    check_boundaries(cu_seqlens, q.shape[1])
    if 0 in (*q.shape, *v.shape):
        return torch.zeros_like(v), _state(q, v, initial_state, cu_seqlens)
    if q.shape[1] == 1 and cu_seqlens is None:
        return solvers[0].step(q, k, v, log_decay, initial_state, scale)
    solver = solvers[log_decay is not None and log_decay.dim() == 4]
    return solver(q, k, v, log_decay, initial_state, cu_seqlens, scale, causal).forward()


def grade(
    solvers: tuple[type[Solver], type[Solver]],
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
    """The backward pass by one of the solvers, by values and by keys."""
    check_boundaries(cu_seqlens, q.shape[1])
    if 0 in (*q.shape, *v.shape):
        to_decay = q.new_empty(0) if log_decay is None else torch.zeros_like(log_decay)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), to_decay, gradients[1].clone()
    solver = solvers[log_decay is not None and log_decay.dim() == 4]
    return solver(q, k, v, log_decay, initial_state, cu_seqlens, scale, causal).backward(*gradients)


def _state(q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.clone()
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_zeros((rows, v.shape[2], q.shape[3], v.shape[3]), dtype=accumulator(q.dtype))


class Solver:
    """One call of the op; what is not a matrix product is in methods of their own, which compiled solvers replace.

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

    # tokens of a chunk, at most
    longest = CHUNK
    # whether the heads of a group share tiles
    joint = True
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
        self.q, self.k, self.v = q, k, v
        # a tensor, or None, which only ByValue takes
        self.log_decay: Any = log_decay
        self.initial_state, self.scale, self.causal = initial_state, scale, causal
        self.batch, self.total, self.groups, self.size = q.shape
        self.heads, self.width = v.shape[2:]
        self.dtype = accumulator(q.dtype)
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.chunk = chunk_length(self.longest, self.batch * self.total, self.sequences)
        self.prepare(cu_seqlens)

    # -- what a kind of decay defines --

    def add(self, block: Block) -> Added:
        """What a block adds to the states."""
        raise NotImplementedError

    def pairs(self, block: Block, q: Tensor, added: Added) -> tuple[Tensor, Tensor]:
        """A of the module's formulas, ``(M, m, C, C)``, and q as it reads the states, ``(M, C, K)``."""
        raise NotImplementedError

    def read(self, block: Block, added: Added, reading: Tensor) -> Tensor:
        """What is read of the states that enter the chunks, ``(M, C, m V)``."""
        raise NotImplementedError

    def receive(self, block: Block, added: Added, reading: Tensor, arriving: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the outputs as the states receive it, ``(M, C, m V)``, and theirs, ``(M, K, m V)``."""
        raise NotImplementedError

    def grade(
        self,
        block: Block,
        added: Added,
        q: Tensor,
        pairs: Tensor,
        reading: Tensor,
        arriving: Tensor,
        received: Tensor,
        after: Tensor,
        to_passing: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The gradients in the tiles of q, k, v and the decay; may overwrite what it is given.

        Args:
            block: Which tiles.
            added: What they add to the states, with the states that enter the chunks.
            q: ``(M, C, K)``.
            pairs: Of :meth:`pairs`.
            reading: Of :meth:`pairs`.
            arriving: The gradient of the outputs, ``(M, C, m V)``.
            received: Of :meth:`receive`.
            after: The gradient of the states behind the chunks, ``(M, K, m V)``.
            to_passing: That of the logarithm of ``added.passing``, of its shape, or None.

        Returns:
            ``(M, C, K)``, ``(M, C, K)``, ``(M, C, m V)``, and ``(M, C, m)`` or ``(M, C, K)`` or None.
        """
        raise NotImplementedError

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
        pairs = self.chunk * self.chunk * (1 if self.joint else self.size)
        largest = max(pairs, self.chunk * max(self.size, self.width), self.size * self.width)
        self.divide(number, max(1, BLOCK // (largest * rows)))
        self.carry_rows, self.chunk_sequences = rows, self.chunks.sequence

    def load(self, x: Tensor, block: Block, factor: float = 1.0) -> Tensor:
        """Tiles of a tensor ``(B, T, H or G, n)`` times a factor; zero where there is no token.

        Of the heads' own ``(M, C, m n)``; of the groups' ``(M, C, n)``.
        """
        members, together = self.members(x, block)
        tokens, valid = (at[:, block.chunks] for at in (self.chunks.tokens, self.chunks.valid))
        found = x.flatten(0, 1)[:, members][tokens].to(self.dtype) * factor
        found = torch.where(valid[..., None, None], found, 0)
        found = found.unflatten(3, (-1, together)).flatten(4).transpose(2, 3)  # (R, n, tiles or groups, C, width)
        shared = block.n_groups // found.shape[2]
        return found[:, :, :, None].expand(-1, -1, -1, shared, -1, -1).reshape(-1, *found.shape[3:])

    def store(self, tiles: Tensor, block: Block, target: Tensor, factor: float = 1.0) -> None:
        """Adds tiles as :meth:`load` makes them, times a factor, to ``target (B T + spare, H or G, n)``."""
        members, together = self.members(target, block)
        rows, chunk = self.carry_rows, self.chunk
        groups = (members.stop - members.start) // together
        summed = tiles.view(rows, block.n_chunks, groups, -1, chunk, tiles.shape[2]).sum(3)
        tokens, valid = (at[:, block.chunks].flatten() for at in (self.chunks.tokens, self.chunks.valid))
        tokens = torch.where(valid, tokens, target.shape[0] - 1)
        added = factor * summed.transpose(2, 3).unflatten(4, (together, -1)).flatten(3, 4).flatten(0, 2)
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
            states: ``(M, K, m V)``.
            passing: ``(M, K)`` or ``(M, m)``, or None.
            carry: The state between blocks, ``(R, groups of the block, K, m V)``, updated.
            final: Takes the states after the sequences, ``(S + spare, H, K, V)``, or None.
        """
        each, factor = self.by_chunk(block, states), None if passing is None else self.factor(block, passing)
        for index in range(block.n_chunks):
            sequence, first, last = self.places(block, index)
            initial = self.initial_state
            given = torch.zeros_like(carry) if initial is None else self.given(block, initial, sequence)
            state = torch.where(first, given, carry)
            after = each[:, index] + (state if factor is None else factor[:, index] * state)
            each[:, index] = state
            carry.copy_(after)
            if final is not None:
                self.place_states(block, final, torch.where(last[:, 0, 0, 0], sequence, self.sequences), after)

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
            received: ``(M, K, m V)``.
            states: Those that enter the chunks, ``(M, K, m V)``.
            passing: ``(M, K)`` or ``(M, m)``, or None.
            carry: The gradient between blocks, ``(R, groups of the block, K, m V)``, updated.
            grad_final: ``(S, H, K, V)``.
            grad_initial: Takes the gradients before the sequences, ``(S + spare, H, K, V)``.

        Returns:
            The gradient of the logarithm of ``passing``, of its shape, or None.
        """
        each, factor = self.by_chunk(block, received), None if passing is None else self.factor(block, passing)
        for index in reversed(range(block.n_chunks)):
            sequence, first, last = self.places(block, index)
            gradient = torch.where(last, self.given(block, grad_final, sequence), carry)
            before = each[:, index] + (gradient if factor is None else factor[:, index] * gradient)
            each[:, index] = gradient
            carry.copy_(before)
            self.place_states(block, grad_initial, torch.where(first[:, 0, 0, 0], sequence, self.sequences), before)
        if passing is None:
            return None
        product = states * received
        return passing * (product.unflatten(2, (block.members, -1)).sum((1, 3)) if self.joint else product.sum(-1))

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
        """Divides H heads of ``number`` chunks into blocks of at most so many heads of chunks a row.

        A block has whole groups, where one fits, so that their heads share its products.
        """
        shared, at_once = self.heads // self.groups, max(1, most // number)
        if self.joint:
            at_once = max(at_once, min(shared, most))
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
        self.blocks = []
        for first, end in ranges:
            members = min(shared, end - first) if self.joint else 1
            self.blocks.append([Block(slice(first, end), members, chunks) for chunks in spans])

    def members(self, x: Tensor, block: Block) -> tuple[slice, int]:
        """Of a tensor's last dimension but one the heads of a block, or their groups, and how many make a tile."""
        shared = self.heads // x.shape[-2]
        taken = slice(block.heads.start // shared, (block.heads.stop - 1) // shared + 1)
        return taken, block.members if shared == 1 else 1

    def logarithms(self, block: Block, log_decay: Tensor) -> Tensor:
        """The decays' logarithms, the tokens last: ``(M, m, C)`` or ``(M, K, C)``; zero where there is no token."""
        found = log_decay.expand(self.batch, self.total, -1) if log_decay.dim() == 1 else log_decay
        return self.load(found if log_decay.dim() == 4 else found[..., None], block).mT

    def by_chunk(self, block: Block, tiles: Tensor) -> Tensor:
        """Tiles as ``(R, chunks, groups, ...)``."""
        return tiles.view(-1, block.n_chunks, block.n_groups, *tiles.shape[1:])

    def factor(self, block: Block, passing: Tensor) -> Tensor:
        """What multiplies the states, ``(R, chunks, groups, K or 1, m V or 1)``."""
        found = self.by_chunk(block, passing)
        return found.repeat_interleave(self.width, -1)[..., None, :] if self.joint else found[..., None]

    def places(self, block: Block, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one chunk of every row the sequence, and whether it is its first or its last, for states."""
        at = block.chunks.start + index
        first, last = (flag[:, at, None, None, None] for flag in (self.chunks.first, self.chunks.last))
        return self.chunks.sequence[:, at], first, last

    def given(self, block: Block, rows: Tensor, sequence: Tensor) -> Tensor:
        """Of states ``(S, H, K, V)`` those of some sequences as a block has them, ``(R, groups, K, m V)``."""
        found = rows[:, block.heads][sequence.clamp(max=rows.shape[0] - 1)]
        return found.unflatten(1, (-1, block.members)).transpose(2, 3).flatten(3)

    def place_states(self, block: Block, rows: Tensor, sequence: Tensor, states: Tensor) -> None:
        """:meth:`given` the other way round: writes a block's states to the rows of their sequences."""
        found = states.unflatten(3, (block.members, -1)).transpose(2, 3).flatten(1, 2)
        rows[:, block.heads].index_copy_(0, sequence, found)

    def states(self, given: Tensor | None) -> Tensor:
        """Rows of states for all sequences, which begin as those given."""
        shape = self.sequences, self.heads, self.size, self.width
        rows = self.q.new_zeros(shape, dtype=self.dtype) if given is None else given
        return pad(rows, (0, 0, 0, 0, 0, 0, 0, 1)) if self.spare else rows.clone()

    def carries(self, block: Block) -> Tensor:
        """A state for every row and head of a block, zero."""
        shape = self.carry_rows, block.n_groups, self.size, block.members * self.width
        return self.q.new_zeros(shape, dtype=self.dtype)

    def spread(self, rows: Tensor, block: Block) -> Tensor:
        """Of states of sequences those of the tiles, ``(M, K, m V)``."""
        sequence = self.chunk_sequences[:, block.chunks].flatten()
        return self.given(block, rows, sequence).flatten(0, 1)

    def forward(self) -> tuple[Tensor, Tensor]:
        """o and the final states."""
        o, final = self.output(self.v), self.states(self.initial_state)
        for blocks in self.blocks:
            carry = self.carries(blocks[0])
            for block in blocks:
                if not self.causal:
                    k, v = self.load(self.k, block), self.load(self.v, block)
                    self.scan(block, torch.bmm(k.mT, v), None, carry, final)
                    continue
                added = self.add(block)
                self.scan(block, added.states, added.passing, carry, final)
                pairs, reading = self.pairs(block, self.load(self.q, block, self.scale), added)
                found = self.read(block, added, reading)
                for pairs_of, of_head, v in each_head(pairs, found, added.v):
                    of_head.baddbmm_(pairs_of, v)
                self.store(found, block, o)
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
            shape = (self.batch, self.total, self.heads, 1 if self.joint else self.size)
            # a token's share of a head's is not rounded before they are summed
            each = like.new_empty(1, dtype=self.dtype if like.dim() == 1 else like.dtype).expand(shape)
            to_decay = self.output(each)
        for blocks in self.blocks:
            carry, entering = self.carries(blocks[0]), []
            for block in blocks[:-1]:
                entering.append(carry.clone())
                added = self.add(block)
                self.scan(block, added.states, added.passing, carry, None)
            entering.append(carry)
            gradient = self.carries(blocks[0])
            for block, carry in zip(reversed(blocks), reversed(entering), strict=True):
                added, arriving = self.add(block), self.load(grad_o, block)
                self.scan(block, added.states, added.passing, carry, None)
                q = self.load(self.q, block, self.scale)
                pairs, reading = self.pairs(block, q, added)
                received, after = self.receive(block, added, reading, arriving)
                to_passing = self.scan_back(
                    block, after, added.states, added.passing, gradient, grad_final, grad_initial
                )
                grad_q, grad_k, grad_v, through = self.grade(
                    block, added, q, pairs, reading, arriving, received, after, to_passing
                )
                self.store(grad_q, block, to_q, self.scale)
                self.store(grad_k, block, to_k)
                self.store(grad_v, block, to_v)
                if through is not None and to_decay is not None:
                    self.store(through, block, to_decay)
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


def each_head(pairs: Tensor, *tiles: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of what belongs to single heads, in batches: M tiles of a head, or the m heads of a tile.

    Args:
        pairs: ``(M, m, C, C)``; m is 1 where they are the same for all heads.
        tiles: ``(M, C, m V)``.
    """
    number, members = pairs.shape[:2]
    if members <= number:
        for head in range(members):
            yield pairs[:, head], *(x.unflatten(2, (members, -1))[:, :, head] for x in tiles)
    else:
        for index in range(number):
            yield pairs[index], *(x[index].unflatten(1, (members, -1)).transpose(0, 1) for x in tiles)


class ByValue(Solver):
    """No decay, or one a head: the keys share it, and it goes over to the values."""

    # -- what a compiled solver replaces --

    def decays(self, block: Block) -> Any:
        """What the methods below take of the decays, and p(1..C), ``(M, m)``; None and None without a decay."""
        if self.log_decay is None:
            return None, None
        decays = _between(self.logarithms(block, self.log_decay))
        return decays, decays.since[..., -1]

    def until(self, block: Block, values: Tensor, decays: Any, in_place: bool = False) -> Tensor:
        """``p(j+1..C)`` times values ``(M, C, m V)``, which may take their place."""
        return _by_head(values, decays.until)

    def since(self, block: Block, values: Tensor, decays: Any, in_place: bool = False) -> Tensor:
        """``p(1..i)`` times values ``(M, C, m V)``, which may take their place."""
        return _by_head(values, decays.since)

    def mask(self, block: Block, pairs: Tensor, decays: Any) -> Tensor:
        """``p(j+1..i)`` times pairs ``(M, C, C)`` for j <= i, else 0, for every head, ``(M, m, C, C)``.

        May take their memory.
        """
        return pairs[:, None] * decays.within

    def unmask(self, block: Block, pairs: Tensor, grad_pairs: Tensor, decays: Any) -> tuple[Tensor, Tensor]:
        """From the gradient ``(M, m, C, C)`` of what :meth:`mask` returned.

        Returns:
            That of its argument, ``(M, C, C)``, and the sums over the pairs around every token, ``(M, C, m)``.
        """
        return (grad_pairs * decays.within).sum(1), _straddling(pairs * grad_pairs).mT

    def grade_decays(
        self, block: Block, through: Tensor, reads: tuple[Tensor, Tensor], writes: tuple[Tensor, Tensor], whole: Tensor
    ) -> Tensor:
        """The gradient of the decays, ``(M, C, m)``, in place of the share of the pairs in it.

        Args:
            block: Which tiles.
            through: What :meth:`unmask` returned.
            reads: What is read of the states and its gradient, ``(M, C, m V)``.
            writes: The values that go to the states and their gradient, ``(M, C, m V)``.
            whole: The gradient of the logarithm of p(1..C), ``(M, m)``.
        """
        reading, writing = ((a * b).unflatten(2, (block.members, -1)).sum(-1) for a, b in (reads, writes))
        through += reading.flip(1).cumsum(1).flip(1)
        through[:, 1:] += writing[:, :-1].cumsum(1)
        return through.add_(whole[:, None])

    # -- the formulas --

    def add(self, block: Block) -> Added:
        k, v = self.load(self.k, block), self.load(self.v, block)
        decays, passing = self.decays(block)
        writing = v if passing is None else self.until(block, v, decays)
        return Added(k, v, decays, writing, passing, torch.bmm(k.mT, writing))

    def pairs(self, block: Block, q: Tensor, added: Added) -> tuple[Tensor, Tensor]:
        pairs = torch.bmm(q, added.k.mT)
        if added.passing is None:
            return pairs.tril_()[:, None], q
        return self.mask(block, pairs, added.decays), q

    def read(self, block: Block, added: Added, reading: Tensor) -> Tensor:
        found = torch.bmm(reading, added.states)
        return found if added.passing is None else self.since(block, found, added.decays, in_place=True)

    def receive(self, block: Block, added: Added, reading: Tensor, arriving: Tensor) -> tuple[Tensor, Tensor]:
        received = arriving if added.passing is None else self.since(block, arriving, added.decays)
        return received, torch.bmm(reading.mT, received)

    def grade(
        self,
        block: Block,
        added: Added,
        q: Tensor,
        pairs: Tensor,
        reading: Tensor,
        arriving: Tensor,
        received: Tensor,
        after: Tensor,
        to_passing: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        grad_v = torch.bmm(added.k, after)
        grad_q, grad_k = torch.bmm(received, added.states.mT), torch.bmm(added.writing, after.mT)
        if to_passing is None:
            inner, through = torch.bmm(arriving, added.v.mT).tril_(), None
        else:
            grad_pairs = torch.empty_like(pairs)
            for gradient, of_head, v in each_head(grad_pairs, arriving, added.v):
                torch.bmm(of_head, v.mT, out=gradient)
            inner, through = self.unmask(block, pairs, grad_pairs, added.decays)
            reads, writes = (torch.bmm(reading, added.states), received), (added.writing, grad_v)
            through = self.grade_decays(block, through, reads, writes, to_passing)
            grad_v = self.until(block, grad_v, added.decays, in_place=True)
        for pairs_of, gradient, of_head in each_head(pairs, grad_v, arriving):
            gradient.baddbmm_(pairs_of.mT, of_head)
        return grad_q.baddbmm_(inner, added.k), grad_k.baddbmm_(inner.mT, q), grad_v, through


class ByKey(Solver):
    """A decay for every key."""

    longest, joint = CHUNK_OF_KEYS, False

    # -- what a compiled solver replaces --

    def fade(self, block: Block, k: Tensor) -> tuple[Any, Tensor, Tensor]:
        """What the methods below take of the decays, ``p(j+1..C) k_j`` and p(1..C), ``(M, K)``."""
        decays = _between(self.logarithms(block, self.log_decay))
        return decays, k * decays.until.mT, decays.since[..., -1]

    def grade_pairs(
        self,
        added: Added,
        q: Tensor,
        reading: Tensor,
        grad_pairs: Tensor,
        grad_reading: Tensor,
        grad_writing: Tensor,
        grad_passing: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From the gradients in A ``(M, C, C)``, in what reads and writes the states, and in p(1..C).

        Returns:
            Those in q, k and the decay, ``(M, C, K)``.
        """
        decay: _Between = added.decays
        inner = grad_pairs[:, None] * decay.within  # (M, K, C, C)
        grad_q = (inner @ added.k.mT[..., None])[..., 0].mT + decay.since.mT * grad_reading
        grad_k = (inner.mT @ q.mT[..., None])[..., 0].mT + decay.until.mT * grad_writing
        through = _straddling(inner * q.mT[..., None] * added.k.mT[:, :, None]).mT
        through += (reading * grad_reading).flip(1).cumsum(1).flip(1)
        through[:, 1:] += (added.writing * grad_writing)[:, :-1].cumsum(1)
        return grad_q, grad_k, through + grad_passing[:, None]

    def pairs(self, block: Block, q: Tensor, added: Added) -> tuple[Tensor, Tensor]:
        decay: _Between = added.decays
        pairs = (q.mT[..., None] * added.k.mT[:, :, None] * decay.within).sum(1)
        return pairs[:, None], q * decay.since.mT

    # -- the formulas --

    def add(self, block: Block) -> Added:
        k, v = self.load(self.k, block), self.load(self.v, block)
        decays, writing, passing = self.fade(block, k)
        return Added(k, v, decays, writing, passing, torch.bmm(writing.mT, v))

    def read(self, block: Block, added: Added, reading: Tensor) -> Tensor:
        return torch.bmm(reading, added.states)

    def receive(self, block: Block, added: Added, reading: Tensor, arriving: Tensor) -> tuple[Tensor, Tensor]:
        return arriving, torch.bmm(reading.mT, arriving)

    def grade(
        self,
        block: Block,
        added: Added,
        q: Tensor,
        pairs: Tensor,
        reading: Tensor,
        arriving: Tensor,
        received: Tensor,
        after: Tensor,
        to_passing: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        grad_v = torch.bmm(added.writing, after).baddbmm_(pairs[:, 0].mT, arriving)
        inner = torch.bmm(arriving, added.v.mT), torch.bmm(arriving, added.states.mT), torch.bmm(added.v, after.mT)
        grad_q, grad_k, through = self.grade_pairs(added, q, reading, *inner, to_passing)
        return grad_q, grad_k, grad_v, through


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


def _by_head(values: Tensor, factors: Tensor) -> Tensor:
    """Values ``(M, C, m V)`` times factors ``(M, m, C)``."""
    return (values.unflatten(2, (factors.shape[1], -1)) * factors.mT[..., None]).flatten(2)


def _straddling(pairs: Tensor) -> Tensor:
    """For every t the sum of ``pairs[..., i, j]`` over j < t <= i."""
    below = torch.ones(pairs.shape[-2:], dtype=torch.bool, device=pairs.device).tril(-1)
    return torch.where(below, pairs.flip(-2).cumsum(-2).flip(-2), 0).sum(-1)
