"""``linear_scan`` on Triton: which kernels run, over which grid, and what they move.

Launches: 1 forward and 1 backward where the sequences times the channels fill the device, else 2 and 2 (segments and
their summaries). Bytes an element in bf16: 6 forward and 10 backward, in segments 10 and 14, and each way 1/16 for the
states that the backward pass recomputes h from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.launch import Device, Example, Launch, properties, run
from seqzoo.kernels.linear_scan.gpu_kernels import backward_kernel, forward_kernel, summary_kernel
from seqzoo.kernels.linear_scan.op import CHUNK

# one warp reaches the memory's speed only in company: this many programs a processor, and it is not cut into segments
FILLED = 3
# programs a processor to aim at when cutting, so that the last ones to finish do not idle the others
WANTED = 8
SHORTEST = 2 * CHUNK
# every program composes the summaries before its own, so their number has a limit
MOST_SEGMENTS = 256


class Source(NamedTuple):
    """Where the factors and addends of a scan come from.

    Attributes:
        a: The factors, ``(B, T, D)`` or ``(D,)``; or the raw projections of a gated cell.
        b: The addends, ``(B, T, D)``; or the same raw projections.
        cell: ``"linear"``, or the cell of ``gated_scan``.
        lo: Least factor of a gated cell.
        hi: Greatest factor of a gated cell.
    """

    a: Tensor
    b: Tensor
    cell: str = "linear"
    lo: float = 0.0
    hi: float = 1.0


class Layout(NamedTuple):
    """How a scan is spread over the device.

    Attributes:
        segment: Tokens of a segment, a multiple of CHUNK.
        slots: Segments that may exist, which is the grid's size before channels.
        split: Whether sequences may have more than one segment.
        block: Channels of a program.
    """

    segment: int
    slots: int
    split: bool
    block: int


_forced: list[int] = []


@contextmanager
def forced_segment(tokens: int) -> Iterator[None]:
    """Cuts sequences into segments of ``tokens``, a multiple of CHUNK, inside the block: for tests and measurements."""
    if tokens < CHUNK or tokens % CHUNK != 0:
        raise ValueError(f"tokens must be a positive multiple of {CHUNK}, got {tokens}")
    _forced.append(tokens)
    try:
        yield
    finally:
        _forced.pop()


def layout(
    batch: int, total: int, width: int, sequences: int | None, dtype: torch.dtype, crowded: bool, device: Device
) -> Layout:
    """The rule for (device, shape).

    Args:
        batch: B.
        total: T.
        width: D.
        sequences: Their number when packed, else None. One of them may then hold nearly every token.
        dtype: Of the addends.
        crowded: Whether two channels a thread would take more registers than there are.
        device: What it is for.
    """
    # a row of a program is one line of 128 bytes in 16 bits and in 32: 4 bytes a thread; 8 where values are complex
    block = device.warp * (2 if dtype.itemsize == 2 and not crowded else 1)
    return cut(batch, total, sequences, -(-width // block), block, device)


def cut(
    batch: int,
    total: int,
    sequences: int | None,
    columns: int,
    block: int,
    device: Device,
    filled: int = FILLED,
    wanted: int = WANTED,
) -> Layout:
    """Sequences whole where they fill the device, else in as many segments as that takes.

    Args:
        batch: B.
        total: T.
        sequences: Their number when packed, else None.
        columns: Programs beside one another.
        block: Channels of a program.
        device: What it is for.
        filled: Programs a processor above which sequences stay whole.
        wanted: Programs a processor to aim at when cutting.
    """
    programs = columns * (batch if sequences is None else 1)
    segment = _round_up(max(total, 1))
    if _forced:
        segment = _forced[-1]
    elif 0 < programs < filled * device.processors:
        parts = min(-(-wanted * device.processors // programs), MOST_SEGMENTS)
        segment = min(segment, _round_up(max(-(-total // parts), SHORTEST)))
    split = total > segment
    if sequences is not None:
        return Layout(segment, total // segment + sequences, split, block)
    return Layout(segment, batch * max(-(-total // segment), 1), split, block)


def _rows(source: Source, narrow: bool) -> int:
    """Tokens that a program holds at once: as many as registers allow; ``narrow`` where more is kept of each."""
    if source.cell == "linear":
        return 16 if narrow or source.b.is_complex() else 32
    return 8 if narrow or source.cell == "min_lstm" else 16


def _round_up(tokens: int) -> int:
    return -(-tokens // CHUNK) * CHUNK


def as_real(tensor: Tensor | None) -> Tensor | None:
    """A complex tensor as pairs, another one as it is."""
    return torch.view_as_real(tensor) if tensor is not None and tensor.is_complex() else tensor


def _common(source: Source, width: int, cu_seqlens: Tensor | None, reverse: bool, plan: Layout) -> dict[str, Any]:
    """The arguments that all kernels take."""
    return {
        "p_a": as_real(source.a),
        "p_b": as_real(source.b),
        "p_cu": cu_seqlens,
        "T": source.b.shape[1],
        "S": 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        "D": width,
        "segment": plan.segment,
        "lo": source.lo,
        "hi": source.hi,
        "CELL": source.cell,
        "REVERSE": reverse,
        "FIXED": source.a.dim() == 1,
        "COMPLEX": source.b.is_complex(),
        "CHUNK": CHUNK,
        "BD": plan.block,
    }


def _summaries(
    source: Source, grad_h: Tensor | None, common: dict[str, Any], plan: Layout, grid: tuple[int], states: Tensor
) -> tuple[dict[str, Tensor | None], list[Launch]]:
    """The buffers of summaries, None when sequences are not cut, and the launch that fills them."""
    if not plan.split:
        return {"p_factors": None, "p_addends": None}, []
    factors, addends = states.new_empty((2, plan.slots, states.shape[1])).unbind()
    buffers = {"p_factors": as_real(factors), "p_addends": as_real(addends)}
    arguments = {
        **common,
        **buffers,
        "p_grad_h": as_real(grad_h),
        "ADJOINT": grad_h is not None,
        "ROWS": _rows(source, True),
    }
    if source.cell != "linear":
        # the value is no part of a backward summary
        width, values = states.shape[1], source.a.shape[2] // states.shape[1]
        reads = (source.a if grad_h is None else source.a[..., : (values - 1) * width], grad_h)
    else:
        reads = (source.a, source.b if grad_h is None else grad_h)
    return buffers, [Launch(summary_kernel, grid, arguments, reads, (factors, addends))]


def _distinct(source: Source) -> tuple[Tensor, ...]:
    return (source.a,) if source.a is source.b else (source.a, source.b)


def plan_forward(
    source: Source, width: int, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The results of a forward pass, unwritten, and the launches that write them.

    Returns:
        h ``(B, T, D)``, the final state ``(S, D)`` and the states that enter the chunks; the launches.
    """
    b = source.b
    batch, total, _ = b.shape
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    plan = layout(batch, total, width, sequences, b.dtype, source.cell == "min_lstm", properties(b.device))
    states = accumulator(b.dtype)
    n_chunks = batch * -(-total // CHUNK) if sequences is None else total // CHUNK + sequences
    h = b.new_empty((batch, total, width))
    final_state = b.new_empty((batch if sequences is None else sequences, width), dtype=states)
    chunk_states = b.new_empty((n_chunks, width), dtype=states)
    grid = (plan.slots * -(-width // plan.block),)
    common = _common(source, width, cu_seqlens, reverse, plan)
    buffers, launches = _summaries(source, None, common, plan, grid, chunk_states)
    arguments = {
        **common,
        **buffers,
        "p_initial": as_real(initial_state),
        "p_h": as_real(h),
        "p_final": as_real(final_state),
        "p_chunks": as_real(chunk_states),
        "ROWS": _rows(source, False),
    }
    reads = (*_distinct(source), initial_state)
    launches.append(Launch(forward_kernel, grid, arguments, reads, (h, final_state, chunk_states)))
    return (h, final_state, chunk_states), launches


def plan_backward(
    source: Source,
    grad_h: Tensor,
    grad_final_state: Tensor,
    chunk_states: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The results of a backward pass, unwritten, and the launches that write them.

    Returns:
        The gradients of ``source.a``, ``source.b`` and the initial state, and the launches. For a factor ``(D,)`` the
        first is one partial sum a slot, ``(slots, D)``; for a gated cell the first two are one tensor.
    """
    a, b = source.a, source.b
    batch, total, width = grad_h.shape
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    plan = layout(batch, total, width, sequences, b.dtype, source.cell == "min_lstm", properties(b.device))
    grid = (plan.slots * -(-width // plan.block),)
    grad_b = torch.empty_like(b)
    grad_a = grad_b if a is b else torch.empty_like(a)
    if a.dim() == 1:
        grad_a = chunk_states.new_empty((plan.slots, width))
    grad_state = torch.empty_like(grad_final_state)
    common = _common(source, width, cu_seqlens, reverse, plan)
    buffers, launches = _summaries(source, grad_h, common, plan, grid, chunk_states)
    arguments = {
        **common,
        **buffers,
        "p_grad_h": as_real(grad_h),
        "p_grad_final": as_real(grad_final_state),
        "p_chunks": as_real(chunk_states),
        "p_grad_a": as_real(grad_a),
        "p_grad_b": as_real(grad_b),
        "p_grad_initial": as_real(grad_state),
        "ROWS": _rows(source, True),
    }
    reads = (*_distinct(source), grad_h, grad_final_state, chunk_states)
    writes = (grad_b, grad_state) if a is b else (grad_a, grad_b, grad_state)
    launches.append(Launch(backward_kernel, grid, arguments, reads, writes))
    return (grad_a, grad_b, grad_state), launches


def forward(
    a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``linear_scan_forward``."""
    results, launches = plan_forward(Source(a, b), b.shape[2], initial_state, cu_seqlens, reverse)
    run(launches, b.device)
    return results


def backward(
    grad_h: Tensor,
    grad_final_state: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    h: Tensor | None,
    chunk_states: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``linear_scan_backward``; h is recomputed from ``chunk_states``, which hold the initial state too."""
    (grad_a, grad_b, grad_state), launches = plan_backward(
        Source(a, b), grad_h, grad_final_state, chunk_states, cu_seqlens, reverse
    )
    run(launches, b.device)
    return grad_a.sum(0).to(a.dtype) if a.dim() == 1 else grad_a, grad_b, grad_state


def example(label: str, source: Source, width: int, packed: bool, state: bool, reverse: bool) -> Iterator[Example]:
    """The launches of one call forward and backward on meta tensors, for compiling ahead of time."""
    b = source.b
    cu_seqlens = b.new_empty(9, dtype=torch.int32) if packed else None
    states = b.new_empty((8 if packed else b.shape[0], width), dtype=accumulator(b.dtype))
    words = ("packed" if packed else "dense", "state" if state else "", "reverse" if reverse else "")
    label = " ".join(filter(None, (label, *words)))
    (h, final_state, chunk_states), launches = plan_forward(
        source, width, states if state else None, cu_seqlens, reverse
    )
    yield Example(f"{label} forward", launches, h.numel())
    _, launches = plan_backward(source, h, final_state, chunk_states, cu_seqlens, reverse)
    yield Example(f"{label} backward", launches, h.numel())


# (B, T, D) by mode, the same on every device, and whether packed; short sequences are never cut
SHAPES = {
    ("one pass", False): (64, 4096, 2048),
    ("one pass", True): (1, SHORTEST, 2048),
    ("segments", False): (1, 65536, 1024),
    ("segments", True): (1, 65536, 1024),
}
MODES = ("one pass", "segments")


def examples(exhaustive: bool) -> Iterator[Example]:
    """What is compiled ahead of time: every form that compiles differently, or one of each kind."""

    def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    kinds = {
        "bfloat16": (torch.bfloat16, torch.bfloat16, False),
        "float32": (torch.float32, torch.float32, False),
        "complex64": (torch.complex64, torch.complex64, False),
        "bfloat16, a float32 (D,)": (torch.float32, torch.bfloat16, True),
        "complex64, a (D,)": (torch.complex64, torch.complex64, True),
        "float16": (torch.float16, torch.float16, False),
        "bfloat16, a float32": (torch.float32, torch.bfloat16, False),
        "float32, a (D,)": (torch.float32, torch.float32, True),
    }
    few = [
        ("bfloat16", "one pass", False, False, False),
        ("bfloat16", "segments", True, True, True),
        ("float32", "segments", False, True, False),
        ("complex64, a (D,)", "one pass", False, False, False),
        ("bfloat16, a float32 (D,)", "segments", True, True, False),
    ]
    every = itertools.product(kinds, MODES, (False, True), (False, True), (False, True))
    for kind, mode, packed, state, reverse in every if exhaustive else few:
        a_dtype, b_dtype, fixed = kinds[kind]
        batch, total, width = SHAPES[mode, packed]
        a = tensor(width, dtype=a_dtype) if fixed else tensor(batch, total, width, dtype=a_dtype)
        source = Source(a, tensor(batch, total, width, dtype=b_dtype))
        yield from example(f"{kind}, {mode},", source, width, packed, state, reverse)
