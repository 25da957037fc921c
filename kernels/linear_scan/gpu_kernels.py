"""The Triton kernels of the elementwise scans: ``linear_scan`` and, with the gates fused in, ``gated_scan``.

A program owns ``BD`` channels of one segment of one sequence and walks it serially; a channel lives in one thread, so
nothing is exchanged between threads. ``ROWS`` tokens are loaded before the first is used, which keeps enough bytes in
flight. Where sequences are too few to fill the device each is cut into segments: a first launch reduces every segment
to its summary, the pair (A, B) of ``state_out = A state_in + B``; in a second one every program composes the summaries
of the segments before its own and then walks its own.

Tokens are counted in the order of the scan, k = 0, 1, ... within a sequence; ``reverse`` only changes the row of memory
that k stands for. Values are pairs (real, imaginary); a real one repeats itself, which costs nothing once compiled.

Helpers work on blocks of ``ROWS`` tokens, as tuples: a call costs the interpreter far more than what it does inside.
``room``, ``[BD]``, is the number of tokens left from the block's first one on, zero in channels that do not exist.
"""

# Triton takes neither a starred expression nor a value that only one branch would return
# ruff: noqa: RUF005, RET505

import triton
import triton.language as tl


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
        n_segments = tl.maximum(tl.cdiv(T, segment), 1)
        i_s = slot // n_segments
        i_g = slot % n_segments
        start = i_s.to(tl.int64) * T
        length = T
        n_chunks = tl.cdiv(T, CHUNK)
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
        n_segments = tl.maximum(tl.cdiv(length, segment), 1)
        start = first.to(tl.int64)
        chunk = (first // CHUNK + i_s).to(tl.int64)
        n_chunks = stop // CHUNK + 1 - first // CHUNK
    return i_s, i_g, n_segments, start, length, chunk, n_chunks


@triton.jit
def load_state(p, row, D, o_d, COMPLEX: tl.constexpr):
    """One row of states, or of factors that do not depend on time."""
    m_d = o_d < D
    if COMPLEX:
        pair = tl.load(p + row * D * 2 + 2 * o_d[:, None] + tl.arange(0, 2)[None, :], mask=m_d[:, None])  # [BD, 2]
        return tl.split(pair)
    else:
        value = tl.load(p + row * D + o_d, mask=m_d)
        return value, value


@triton.jit
def store_state(p, row, D, o_d, value, imaginary, needed, COMPLEX: tl.constexpr):
    """One row of states, where ``needed`` (a scalar) holds."""
    # one comparison, because the interpreter turns `mask & scalar` into an integer
    mask = o_d < tl.where(needed, D, 0)
    if COMPLEX:
        p_row = p + row * D * 2 + 2 * o_d[:, None] + tl.arange(0, 2)[None, :]  # [BD, 2]
        tl.store(p_row, tl.join(value, imaginary), mask=mask[:, None])
    else:
        tl.store(p + row * D + o_d, value, mask=mask)


@triton.jit
def load_rows(p, row, step, room, D, o_d, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """``ROWS`` tokens of a tensor ``(..., D)`` as pairs, zero where there is none; complex ones as ``(..., D, 2)``."""
    rows = ()
    for r in tl.static_range(ROWS):
        mask = room > r
        if COMPLEX:
            p_row = p + (row + step * r) * D * 2 + 2 * o_d[:, None] + tl.arange(0, 2)[None, :]  # [BD, 2]
            rows = rows + (tl.split(tl.load(p_row, mask=mask[:, None], other=0.0)),)
        else:
            value = tl.load(p + (row + step * r) * D + o_d, mask=mask, other=0.0)
            rows = rows + ((value, value),)
    return rows


@triton.jit
def store_rows(p, row, step, room, D, o_d, values, WHICH: tl.constexpr, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """Writes ``ROWS`` tokens of a tensor ``(..., D)``: of each tuple the entry WHICH and, if complex, the next one."""
    for r in tl.static_range(ROWS):
        mask = room > r
        if COMPLEX:
            p_row = p + (row + step * r) * D * 2 + 2 * o_d[:, None] + tl.arange(0, 2)[None, :]  # [BD, 2]
            tl.store(p_row, tl.join(values[r][WHICH], values[r][WHICH + 1]), mask=mask[:, None])
        else:
            tl.store(p + (row + step * r) * D + o_d, values[r][WHICH], mask=mask)


@triton.jit
def load_projections(p, row, step, room, D, o_d, N: tl.constexpr, ROWS: tl.constexpr):
    """``ROWS`` tokens of raw projections ``(..., N D)`` as tuples of 3: the gates (minGRU's one twice), the value."""
    rows = ()
    for r in tl.static_range(ROWS):
        mask = room > r
        p_row = p + (row + step * r) * D * N + o_d
        gate = tl.load(p_row, mask=mask, other=0.0)
        other_gate = gate if N == 2 else tl.load(p_row + D, mask=mask, other=0.0)
        rows = rows + ((gate, other_gate, tl.load(p_row + D * (N - 1), mask=mask, other=0.0)),)
    return rows


@triton.jit
def sigmoids(x):
    """The sigmoid of x and of -x: neither overflows, and neither is a difference."""
    small = tl.exp(-tl.abs(x))
    share = 1.0 / (1.0 + small)
    return tl.where(x >= 0, 1.0, small) * share, tl.where(x >= 0, small, 1.0) * share


@triton.jit
def min_lstm_gates(forget, enter):
    """minLSTM's normalised input gate and its complement.

    ``sigmoid(i) / (sigmoid(f) + sigmoid(i))`` is ``(1 + e^-f) / ((1 + e^-f) + (1 + e^-i))``. The two sums are written
    as ``(1 + e^-|x|) e^max(-x, 0)`` and the larger of the second factors is divided out, so nothing overflows.
    """
    excess = tl.maximum(-forget, 0.0) - tl.maximum(-enter, 0.0)
    small = tl.exp(-tl.abs(excess))
    enters = (1.0 + tl.exp(-tl.abs(forget))) * tl.where(excess >= 0, 1.0, small)
    stays = (1.0 + tl.exp(-tl.abs(enter))) * tl.where(excess >= 0, small, 1.0)
    share = 1.0 / (enters + stays)
    return enters * share, stays * share


@triton.jit
def load_tokens(
    p_a, p_b, row, step, room, D, o_d, fixed, fixed_im,
    CELL: tl.constexpr, FIXED: tl.constexpr, COMPLEX: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What ``ROWS`` tokens are made of, as in memory: pairs of factors and of addends, or raw projections twice."""
    if CELL == "min_gru":
        projections = load_projections(p_a, row, step, room, D, o_d, 2, ROWS)
        return projections, projections
    elif CELL == "min_lstm":
        projections = load_projections(p_a, row, step, room, D, o_d, 3, ROWS)
        return projections, projections
    else:
        addends = load_rows(p_b, row, step, room, D, o_d, COMPLEX, ROWS)
        if FIXED:
            factors = ()
            for _ in tl.static_range(ROWS):
                factors = factors + ((fixed, fixed_im),)
        else:
            factors = load_rows(p_a, row, step, room, D, o_d, COMPLEX, ROWS)
        return factors, addends


@triton.jit
def prepare(tokens, lo, hi, DTYPE: tl.constexpr, CELL: tl.constexpr, ROWS: tl.constexpr):
    """The recurrence of ``ROWS`` tokens as tuples of 6: factor and addend, two pairs; how much enters and stays."""
    factors, addends = tokens
    values = ()
    for r in tl.static_range(ROWS):
        if CELL == "linear":
            a, a_im = factors[r][0].to(DTYPE), factors[r][1].to(DTYPE)
            b, b_im = addends[r][0].to(DTYPE), addends[r][1].to(DTYPE)
            values = values + ((a, a_im, b, b_im, a, a),)
        else:
            if CELL == "min_gru":
                enters, stays = sigmoids(factors[r][0].to(DTYPE))
            else:
                enters, stays = min_lstm_gates(factors[r][0].to(DTYPE), factors[r][1].to(DTYPE))
            a = lo + (hi - lo) * stays
            b = enters * factors[r][2].to(DTYPE)
            values = values + ((a, a, b, b, enters, stays),)
    return values


@triton.jit
def advance(values, h, h_im, room, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """The states before and after each of ``ROWS`` tokens, as ROWS + 1 pairs; one that is not there changes nothing."""
    states = ((h, h_im),)
    for r in tl.static_range(ROWS):
        a, a_im, b, b_im = values[r][0], values[r][1], values[r][2], values[r][3]
        x = a * h + b
        if COMPLEX:
            x = x - a_im * h_im
            h_im = tl.where(room > r, a * h_im + a_im * h + b_im, h_im)
        h = tl.where(room > r, x, h)
        states = states + ((h, h_im),)
    return states


@triton.jit
def retreat(values, gradients, states, carry, carry_im, room, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """The carry before ``ROWS`` tokens and, of each, the gradients of its factor and its addend, two pairs."""
    results = ()
    for r in tl.static_range(ROWS - 1, -1, -1):
        a, a_im = values[r][0], values[r][1]
        h, h_im = states[r]
        gamma = gradients[r][0].to(carry.dtype) + carry
        x = a * gamma
        grad_a = gamma * h
        if COMPLEX:
            gamma_im = gradients[r][1].to(carry.dtype) + carry_im
            x = x + a_im * gamma_im
            carry_im = tl.where(room > r, a * gamma_im - a_im * gamma, carry_im)
            results = ((grad_a + gamma_im * h_im, gamma_im * h - gamma * h_im, gamma, gamma_im),) + results
        else:
            results = ((grad_a, grad_a, gamma, gamma),) + results
        carry = tl.where(room > r, x, carry)
    return carry, carry_im, results


@triton.jit
def compose(p_factors, p_addends, slot, step, count, D, o_d, h, h_im, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """Carries a state through ``count`` segments by their summaries, from ``slot`` in steps of 1 or -1."""
    for k in range(0, count, ROWS):
        room = tl.where(o_d < D, count - k, 0)
        factors = load_rows(p_factors, slot + step * k, step, room, D, o_d, COMPLEX, ROWS)
        addends = load_rows(p_addends, slot + step * k, step, room, D, o_d, COMPLEX, ROWS)
        for r in tl.static_range(ROWS):
            a, a_im = factors[r]
            b, b_im = addends[r]
            # the product over a long segment may overflow where the state that it meets is exactly zero
            if COMPLEX:
                still = (h == 0) & (h_im == 0)
                x = tl.where(still, 0.0, a * h - a_im * h_im) + b
                x_im = tl.where(still, 0.0, a * h_im + a_im * h) + b_im
                h_im = tl.where(room > r, x_im, h_im)
            else:
                x = tl.where(h == 0, 0.0, a * h) + b
            h = tl.where(room > r, x, h)
    return h, h_im


@triton.jit
def summarise(values, gradients, h, h_im, product, product_im, room,
              ADJOINT: tl.constexpr, COMPLEX: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Extends a summary, the pair of product and end, by ``ROWS`` tokens."""
    if not ADJOINT:
        states = advance(values, h, h_im, room, COMPLEX, ROWS)
        h, h_im = states[ROWS]
    for r in tl.static_range(ROWS):
        a, a_im = values[r][0], values[r][1]
        if ADJOINT:
            a_im = -a_im
            g, g_im = gradients[r][0].to(h.dtype) + h, gradients[r][1].to(h.dtype) + h_im
            x = a * g
            if COMPLEX:
                x = x - a_im * g_im
                h_im = tl.where(room > r, a * g_im + a_im * g, h_im)
            h = tl.where(room > r, x, h)
        x = a * product
        if COMPLEX:
            x = x - a_im * product_im
            product_im = tl.where(room > r, a * product_im + a_im * product, product_im)
        product = tl.where(room > r, x, product)
    return h, h_im, product, product_im


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


@triton.jit
def store_gradients(
    p_a, p_b, row, step, room, D, o_d, tokens, values, results, lo, hi,
    CELL: tl.constexpr, FIXED: tl.constexpr, COMPLEX: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes what the inputs of ``ROWS`` tokens receive; the gradient of a fixed factor is left to the caller."""
    if CELL == "linear":
        store_rows(p_b, row, step, room, D, o_d, results, 2, COMPLEX, ROWS)
        if not FIXED:
            store_rows(p_a, row, step, room, D, o_d, results, 0, COMPLEX, ROWS)
    else:
        N: tl.constexpr = 2 if CELL == "min_gru" else 3
        for r in tl.static_range(ROWS):
            mask = room > r
            token = tokens[0][r]
            _, _, _, _, enters, stays = values[r]
            grad_a, _, grad_b, _ = results[r]
            p_row = p_a + (row + step * r) * D * N + o_d
            grad_logit = (grad_b * token[2].to(grad_b.dtype) - (hi - lo) * grad_a) * enters * stays
            tl.store(p_row + D * (N - 1), grad_b * enters, mask=mask)
            if CELL == "min_gru":
                tl.store(p_row, grad_logit, mask=mask)
            else:
                tl.store(p_row, -grad_logit * sigmoids(token[0].to(grad_b.dtype))[1], mask=mask)
                tl.store(p_row + D, grad_logit * sigmoids(token[1].to(grad_b.dtype))[1], mask=mask)


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
    total_im, fixed, fixed_im = total, total, total
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
            partial = tl.zeros((BD,), DTYPE)
            partial_im = partial
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
                    for r in tl.static_range(ROWS):
                        partial += tl.where(room > r, results[r][0], 0.0)
                        if COMPLEX:
                            partial_im += tl.where(room > r, results[r][1], 0.0)
                h, h_im = entered[0]
                entered = entered[1:] + entered[:1]
            total += partial
            total_im += partial_im
        if i_g == 0:
            store_state(p_grad_initial, i_s.to(tl.int64), D, o_d, carry, carry_im, n >= 0, COMPLEX)
    if FIXED:
        store_state(p_grad_a, slot.to(tl.int64), D, o_d, total, total_im, slot >= 0, COMPLEX)
