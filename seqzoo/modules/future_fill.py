"""FutureFill: a convolution token by token, in O(log^2 T) operations a token.

"FutureFill: Fast Generation from Convolutional Sequence Models", https://arxiv.org/abs/2410.03766, section 3.

Beside the inputs a cache holds, for every output to come, what earlier inputs contribute to it. When ``i`` tokens have
been read and ``size`` is the greatest power of two that divides i, the last ``size`` inputs are convolved into the next
``size`` entries of the cache (:func:`ahead`). Then every pair of an input s and an output t meets once: when i is the
one number in ``s < i <= t`` that the greatest power of two divides. Powers below ``chunk`` are left out; the outputs of
a chunk add up the chunk's own inputs directly (:func:`present`).

So the cache after n tokens is a function of the inputs and of n, however they were cut into pieces. The entry of an
output t >= n holds the inputs before M, where the binary digits of M are those that n and t have in common before they
first differ; those below ``chunk`` do not count.

A place is an int where it is the same in all rows, and an int64 tensor ``(rows,)`` otherwise. Buffers are
``(B, L, D)``; what is written to them is written in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.long_conv import long_conv

Place = int | Tensor


def ahead(u: Tensor, kernel: Tensor) -> Tensor:
    """What inputs ``(B, size, D)`` contribute to the outputs of the ``size`` positions that follow.

    The lags ``1`` to ``2 size - 1`` of ``kernel`` (D, L) count, those from L on as zero. As a convolution of two sides
    around lag ``size`` it takes a transform of ``2 size`` positions, and no padding.
    """
    size = u.shape[1]
    before = F.pad(kernel[:, 1:size].flip(1), (1, 0))  # lag ``size`` counts once
    return long_conv(u, kernel[:, size : 2 * size], kernel_reverse=before)


def present(inputs: Tensor, place: Place, kernel: Tensor, chunk: int) -> Tensor:
    """What the inputs from the chunk's first up to ``place`` contribute to the output there, ``(B, D)``."""
    taps = kernel[:, :chunk].t()
    if isinstance(place, int):
        start = place - place % chunk
        return (inputs[:, start : place + 1].to(taps.dtype) * taps[: place + 1 - start].flip(0)).sum(1)
    start = place - place % chunk
    at = positions(start, chunk, inputs)
    lags = place[:, None] - at
    window = torch.where(lags[..., None] >= 0, read(inputs, start, chunk).to(taps.dtype), 0)
    return (window * taps[lags.clamp(min=0, max=taps.shape[0] - 1)]).sum(1)


def positions(start: Place, size: int, like: Tensor) -> Tensor:
    """The positions from ``start`` on, ``(1, size)`` or ``(rows, size)``."""
    offsets = torch.arange(size, device=like.device)
    return offsets[None] + start if isinstance(start, int) else start[:, None] + offsets


def read(buffer: Tensor, start: Place, size: int, rows: Tensor | None = None) -> Tensor:
    """``size`` entries from ``start`` on, of all rows or of those given; places beyond the buffer repeat its ends."""
    if isinstance(start, int):
        return buffer[:, start : start + size]
    at = positions(start, size, buffer).clamp(min=0, max=buffer.shape[1] - 1)
    return buffer[_all(buffer) if rows is None else rows[:, None], at]


def add(buffer: Tensor, start: Place, values: Tensor, rows: Tensor | None = None) -> None:
    """Adds ``values`` (rows, size, D) from ``start`` on; what would lie beyond the buffer is dropped."""
    last = buffer.shape[1] - 1
    if isinstance(start, int):
        buffer[:, start : start + values.shape[1]] += values[:, : last + 1 - start]
        return
    at = positions(start, values.shape[1], buffer)
    values = torch.where((at <= last)[..., None], values, 0)
    buffer.index_put_((_all(buffer) if rows is None else rows[:, None], at.clamp(max=last)), values, accumulate=True)


def _all(buffer: Tensor) -> Tensor:
    return torch.arange(buffer.shape[0], device=buffer.device)[:, None]


def refill(inputs: Tensor, cache: Tensor, counts: list[int], kernel: Tensor, chunk: int) -> None:
    """The schedule's work when row b has read ``counts[b]`` tokens: one product for all rows of the same size."""
    due: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        if count % chunk == 0 and 0 < count < inputs.shape[1]:
            due.setdefault(count & -count, []).append(row)
    for size, members in due.items():
        place, rows = counts[members[0]], None
        if len(set(counts)) > 1:
            rows = torch.tensor(members, device=inputs.device)
            place = torch.tensor([counts[row] for row in members], device=inputs.device)
        block = read(inputs, place - size, size, rows).to(cache.dtype)
        add(cache, place, ahead(block, kernel), rows)


def due_length(counts: list[int], chunk: int) -> int:
    """How many of the kernel's lags :func:`present` and :func:`refill` need at these counts."""
    return max([chunk, *(2 * (count & -count) for count in counts if count % chunk == 0)])


def refill_anywhere(inputs: Tensor, cache: Tensor, counts: Tensor, kernel: Tensor, chunk: int) -> None:
    """As :func:`refill` for counts that the host does not know: always of the greatest size, most of it masked."""
    half = 1 << ((inputs.shape[1] - 1).bit_length() - 1) if inputs.shape[1] > 1 else 0
    if half < chunk:
        return
    size = counts & -counts
    size = torch.where(size >= chunk, size, 0)[:, None]
    # the block ends at the window's end, so that the lags are the same for every size
    at = positions(counts - half, half, inputs)
    block = torch.where((at >= counts[:, None] - size)[..., None], read(inputs, counts - half, half), 0)
    filled = ahead(block.to(cache.dtype), kernel)
    add(cache, counts, torch.where((at + half < counts[:, None] + size)[..., None], filled, 0))


def open_blocks(
    inputs: Tensor, cache: Tensor, before: Place, after: Place, kernel: Tensor, chunk: int, levels: list[int]
) -> None:
    """Adds to the outputs from ``before`` to ``after`` what neither the cache nor the running chunk has of the past.

    These are blocks that the sequence was in the midst of: the inputs from the block's first to the chunk's.
    """
    running = before - before % chunk
    for level in levels:
        size = 1 << level
        middle = ((before >> level) | 1) << level
        at = positions(middle - size, size, inputs)
        known = (at < _column(running)) & (_column(middle) > _column(before))
        block = torch.where(known[..., None], read(inputs, middle - size, size), 0)
        filled = ahead(block.to(cache.dtype), kernel)
        add(cache, middle, torch.where((at + size < _column(after))[..., None], filled, 0))


def closed_blocks(
    inputs: Tensor, cache: Tensor, before: Place, after: Place, kernel: Tensor, levels: list[int]
) -> None:
    """Adds to the outputs from ``after`` on what the schedule adds between ``before`` and ``after`` tokens.

    One product for each binary digit of ``after``, of as many inputs as the digit stands for: together they cost what
    one transform of the whole sequence does.
    """
    for level in levels:
        size = 1 << level
        middle = (after >> level) << level
        at = positions(middle, size, inputs)
        done = (_column(after >> level) % 2 == 1) & (_column(middle) > _column(before))
        filled = ahead(read(inputs, middle - size, size).to(cache.dtype), kernel)
        add(cache, middle, torch.where((done & (at >= _column(after)))[..., None], filled, 0))


def open_levels(spans: list[tuple[int, int]], chunk: int) -> list[int]:
    """The levels at which :func:`open_blocks` has work for some row, given as (before, after)."""
    found = set()
    for before, after in spans:
        running = before - before % chunk
        for level in range(chunk.bit_length() - 1, after.bit_length()):
            middle = ((before >> level) | 1) << level
            if before < middle < after and middle - (1 << level) < running:
                found.add(level)
    return sorted(found)


def closed_levels(spans: list[tuple[int, int]], chunk: int, length: int) -> list[int]:
    """The levels at which :func:`closed_blocks` has work for some row, given as (before, after)."""
    found = set()
    for before, after in spans:
        for level in range(chunk.bit_length() - 1, after.bit_length()):
            middle = (after >> level) << level
            if after >> level & 1 and before < middle and after < length:
                found.add(level)
    return sorted(found)


def all_levels(chunk: int, length: int) -> list[int]:
    """The levels that there can be in a buffer of ``length``."""
    return list(range(chunk.bit_length() - 1, (length - 1).bit_length()))


def _column(place: Place) -> Place:
    return place if isinstance(place, int) else place[:, None]
