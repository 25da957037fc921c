"""The Triton kernels of the elementwise scans: ``linear_scan`` and, with the gates fused in, ``gated_scan``.

A program owns ``BD`` channels of one segment of one sequence and walks it serially; a channel lives in one thread, so
nothing is exchanged between threads. ``ROWS`` tokens are loaded before the first is used, which keeps enough bytes in
flight. Where sequences are too few to fill the device each is cut into segments: a first launch reduces every segment
to its summary, the pair (A, B) of ``state_out = A state_in + B``; in a second one every program composes the summaries
of the segments before its own and then walks its own.

Tokens are counted in the order of the scan, k = 0, 1, ... within a sequence; ``reverse`` only changes the row of memory
that k stands for.
"""

# Triton takes no starred expression
# ruff: noqa: RUF005

import triton
import triton.language as tl

from seqzoo.kernels.linear_scan.gpu_blocks import (
    accumulate,
    advance,
    compose,
    load_rows,
    load_state,
    load_tokens,
    prepare,
    retreat,
    store_gradients,
    store_rows,
    store_state,
    summarise,
)


@triton.jit
def locate(slot, p_cu, T, S, segment, CHUNK: tl.constexpr):
    """The sequence and segment behind a slot of the grid.

    Packed sequence ``s`` owns the slots from ``cu[s] // segment + s``, at most one more than it needs, and in the same
    way rows of the chunk states. Segments never cross a boundary.

    Returns:
        sequence, segment in it, its number of segments, first row of the sequence, its tokens, its first chunk row and
        the chunk rows it owns.
    """
    if p_cu is None:
        n_segments = tl.maximum(T - 1, 0) // segment + 1
        i_s = slot // n_segments
        i_g = slot % n_segments
        start = i_s.to(tl.int64) * T
        length = T
        n_chunks = tl.cdiv(T.to(tl.int64), CHUNK)
        chunk = i_s.to(tl.int64) * n_chunks
    else:
        i_s = slot * 0
        above = i_s + S
        while i_s + 1 < above:
            middle = (i_s + above) // 2
            begun = tl.load(p_cu + middle) // segment + middle <= slot
            i_s = tl.where(begun, middle, i_s)
            above = tl.where(begun, above, middle)
        first = tl.load(p_cu + i_s)
        stop = tl.load(p_cu + i_s + 1)
        i_g = slot - first // segment - i_s
        length = stop - first
        n_segments = tl.maximum(length - 1, 0) // segment + 1
        start = first.to(tl.int64)
        chunk = (first // CHUNK + i_s).to(tl.int64)
        n_chunks = stop // CHUNK + 1 - first // CHUNK
    return i_s, i_g, n_segments, start, length, chunk, n_chunks


@triton.jit(do_not_specialize=["T", "S", "segment"])
def summary_kernel(
    p_a, p_b, p_grad_h, p_factors, p_addends, p_cu, T, S, D, segment, lo, hi,
    CELL: tl.constexpr, REVERSE: tl.constexpr, ADJOINT: tl.constexpr, FIXED: tl.constexpr, COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes the summary of every segment that another one follows.

    ADJOINT: of the backward pass, where the carry goes from the last token to the first,
    ``carry = conj(a) (grad_h + carry)``.
    """
    n_columns = tl.cdiv(D, BD)
    slot = tl.program_id(0) // n_columns
    o_d = tl.program_id(0) % n_columns * BD + tl.arange(0, BD)
    _, i_g, n_segments, start, length, _, _ = locate(slot, p_cu, T, S, segment, CHUNK)
    needed = (i_g > 0) & (i_g < n_segments) if ADJOINT else i_g + 1 < n_segments
    if needed:
        DTYPE: tl.constexpr = p_factors.dtype.element_ty
        n = tl.minimum(length - i_g * segment, segment)
        entry = i_g * segment
        if ADJOINT:
            entry += n - 1
        step: tl.constexpr = -1 if REVERSE != ADJOINT else 1
        row = start + (length - 1 - entry if REVERSE else entry)
        h = tl.zeros((BD,), DTYPE)
        h_im, product, product_im, fixed, fixed_im = h, h + 1.0, h, h, h
        if FIXED:
            fixed, fixed_im = load_state(p_a, slot * 0, D, o_d, COMPLEX)
        for k in range(0, n, ROWS):
            room = tl.where(o_d < D, n - k, 0)
            tokens = load_tokens(
                p_a, p_b, row + step * k, step, room, D, o_d, fixed, fixed_im, CELL, FIXED, COMPLEX, ROWS
            )  # fmt: skip
            gradients = ()
            if ADJOINT:
                gradients = load_rows(p_grad_h, row + step * k, step, room, D, o_d, COMPLEX, ROWS)
            values = prepare(tokens, lo, hi, DTYPE, CELL, ROWS)
            h, h_im, product, product_im = summarise(
                values, gradients, h, h_im, product, product_im, room, ADJOINT, COMPLEX, ROWS
            )  # fmt: skip
        store_state(p_factors, slot.to(tl.int64), D, o_d, product, product_im, needed, COMPLEX)
        store_state(p_addends, slot.to(tl.int64), D, o_d, h, h_im, needed, COMPLEX)


@triton.jit(do_not_specialize=["T", "S", "segment"])
def forward_kernel(
    p_a, p_b, p_initial, p_h, p_final, p_chunks, p_factors, p_addends, p_cu, T, S, D, segment, lo, hi,
    CELL: tl.constexpr, REVERSE: tl.constexpr, FIXED: tl.constexpr, COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes h, the state that enters every chunk and the final state; without summaries segments are sequences."""
    n_columns = tl.cdiv(D, BD)
    slot = tl.program_id(0) // n_columns
    o_d = tl.program_id(0) % n_columns * BD + tl.arange(0, BD)
    i_s, i_g, n_segments, start, length, chunk, n_chunks = locate(slot, p_cu, T, S, segment, CHUNK)
    if i_g < n_segments:
        DTYPE: tl.constexpr = p_chunks.dtype.element_ty
        h = tl.zeros((BD,), DTYPE)
        h_im, fixed, fixed_im = h, h, h
        if FIXED:
            fixed, fixed_im = load_state(p_a, slot * 0, D, o_d, COMPLEX)
        if p_initial is not None:
            h, h_im = load_state(p_initial, i_s.to(tl.int64), D, o_d, COMPLEX)
        if p_factors is not None:
            h, h_im = compose(
                p_factors, p_addends, slot.to(tl.int64) - i_g, 1, i_g, D, o_d, h, h_im, COMPLEX, CHUNK // 4
            )  # fmt: skip
        step: tl.constexpr = -1 if REVERSE else 1
        row = start + (length - 1 - i_g * segment if REVERSE else i_g * segment)
        n = tl.minimum(length - i_g * segment, segment)
        chunk += i_g * (segment // CHUNK)
        for c in range(0, n, CHUNK):
            store_state(p_chunks, chunk + c // CHUNK, D, o_d, h, h_im, n > 0, COMPLEX)
            for k in range(0, tl.minimum(n - c, CHUNK), ROWS):
                room = tl.where(o_d < D, n - c - k, 0)
                at = row + step * (c + k)
                tokens = load_tokens(
                    p_a, p_b, at, step, room, D, o_d, fixed, fixed_im, CELL, FIXED, COMPLEX, ROWS
                )  # fmt: skip
                states = advance(prepare(tokens, lo, hi, DTYPE, CELL, ROWS), h, h_im, room, COMPLEX, ROWS)
                store_rows(p_h, at, step, room, D, o_d, states[1:], 0, COMPLEX, ROWS)
                h, h_im = states[ROWS]
        if i_g + 1 == n_segments:
            store_state(p_final, i_s.to(tl.int64), D, o_d, h, h_im, n >= 0, COMPLEX)
            # the last row that a packed sequence owns, where it does not need it
            n_own = tl.cdiv(n, CHUNK) + i_g * (segment // CHUNK)
            store_state(p_chunks, chunk + tl.cdiv(n, CHUNK), D, o_d, h, h_im, n_own < n_chunks, COMPLEX)


@triton.jit(do_not_specialize=["T", "S", "segment"])
def backward_kernel(
    p_grad_h, p_grad_final, p_a, p_b, p_chunks, p_grad_a, p_grad_b, p_grad_initial, p_factors, p_addends, p_cu,
    T, S, D, segment, lo, hi,
    CELL: tl.constexpr, REVERSE: tl.constexpr, FIXED: tl.constexpr, COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the inputs and of the initial state, from the last chunk of a segment to its first.

    With gamma_k the gradient in h_k: ``gamma_k = grad_h_k + carry``, ``carry = conj(a_k) gamma_k``, entered by the
    gradient of the final state. h is recomputed from the state that entered the chunk: a first sweep finds the states
    that enter its blocks of ROWS tokens, a second one takes the blocks from the last to the first.

    FIXED: ``p_grad_a`` receives one partial sum a slot, zero in a surplus slot.
    """
    n_columns = tl.cdiv(D, BD)
    slot = tl.program_id(0) // n_columns
    o_d = tl.program_id(0) % n_columns * BD + tl.arange(0, BD)
    i_s, i_g, n_segments, start, length, chunk, _ = locate(slot, p_cu, T, S, segment, CHUNK)
    DTYPE: tl.constexpr = p_chunks.dtype.element_ty
    total = tl.zeros((BD,), DTYPE)
    total_im, lost, lost_im, fixed, fixed_im = total, total, total, total, total
    if i_g < n_segments:
        if FIXED:
            fixed, fixed_im = load_state(p_a, slot * 0, D, o_d, COMPLEX)
        carry, carry_im = load_state(p_grad_final, i_s.to(tl.int64), D, o_d, COMPLEX)
        if p_factors is not None:
            last_slot = slot.to(tl.int64) - i_g + n_segments - 1
            carry, carry_im = compose(
                p_factors, p_addends, last_slot, -1, n_segments - 1 - i_g, D, o_d, carry, carry_im, COMPLEX, ROWS
            )  # fmt: skip
        step: tl.constexpr = -1 if REVERSE else 1
        row = start + (length - 1 - i_g * segment if REVERSE else i_g * segment)
        n = tl.minimum(length - i_g * segment, segment)
        n_chunks = tl.cdiv(n, CHUNK)
        chunk += i_g * (segment // CHUNK)
        for c in range(n_chunks):
            first = (n_chunks - 1 - c) * CHUNK
            h, h_im = load_state(p_chunks, chunk + n_chunks - 1 - c, D, o_d, COMPLEX)
            # the states that entered the blocks before, the latest one first
            entered = ()
            for i in tl.static_range(CHUNK // ROWS - 1):  # noqa: B007
                entered = entered + ((h, h_im),)
            n_blocks = tl.cdiv(tl.minimum(n - first, CHUNK), ROWS)
            for k in range(0, (n_blocks - 1) * ROWS, ROWS):
                entered = ((h, h_im),) + entered[:-1]
                room = tl.where(o_d < D, n - first - k, 0)
                tokens = load_tokens(
                    p_a, p_b, row + step * (first + k), step, room, D, o_d, fixed, fixed_im,
                    CELL, FIXED, COMPLEX, ROWS,
                )  # fmt: skip
                states = advance(prepare(tokens, lo, hi, DTYPE, CELL, ROWS), h, h_im, room, COMPLEX, ROWS)
                h, h_im = states[ROWS]
            for k in range(n_blocks):
                block = first + (n_blocks - 1 - k) * ROWS
                at = row + step * block
                room = tl.where(o_d < D, n - block, 0)
                tokens = load_tokens(
                    p_a, p_b, at, step, room, D, o_d, fixed, fixed_im, CELL, FIXED, COMPLEX, ROWS
                )  # fmt: skip
                gradients = load_rows(p_grad_h, at, step, room, D, o_d, COMPLEX, ROWS)
                values = prepare(tokens, lo, hi, DTYPE, CELL, ROWS)
                states = advance(values, h, h_im, room, COMPLEX, ROWS)
                carry, carry_im, results = retreat(values, gradients, states, carry, carry_im, room, COMPLEX, ROWS)
                store_gradients(
                    p_grad_a, p_grad_b, at, step, room, D, o_d, tokens, values, results, lo, hi,
                    CELL, FIXED, COMPLEX, ROWS,
                )  # fmt: skip
                if FIXED:
                    total, lost = accumulate(total, lost, results, room, 0, ROWS)
                    if COMPLEX:
                        total_im, lost_im = accumulate(total_im, lost_im, results, room, 1, ROWS)
                h, h_im = entered[0]
                entered = entered[1:] + entered[:1]
        if i_g == 0:
            store_state(p_grad_initial, i_s.to(tl.int64), D, o_d, carry, carry_im, n >= 0, COMPLEX)
    if FIXED:
        store_state(p_grad_a, slot.to(tl.int64), D, o_d, total, total_im, slot >= 0, COMPLEX)
