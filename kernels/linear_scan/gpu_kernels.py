"""The Triton kernels of the elementwise scans: ``linear_scan`` and, with the gates fused in, ``gated_scan``.

A program owns ``BD`` channels of one segment of one sequence and walks it serially; each channel lives in one thread, so
nothing is exchanged between threads. ``ROWS`` tokens are loaded before the first is used, which keeps enough bytes in
flight. Where sequences are too few to fill the device each is cut into segments: a first launch reduces every segment to
its summary, the pair (A, B) of ``state_out = A state_in + B``; in a second one every program composes the summaries of
the segments before its own and then walks its own.

Tokens are counted in the order of the scan, k = 0, 1, ... within a sequence; ``reverse`` only changes the row of memory
that k stands for. Values are pairs (real, imaginary); a real one repeats itself, which costs nothing once compiled.
"""

import triton
import triton.language as tl


@triton.jit
def locate(slot, p_cu, T, S, segment, CHUNK: tl.constexpr):
    """The sequence and segment behind a slot of the grid.

    Packed sequence ``s`` owns the slots from ``cu[s] // segment + s``, at most one more than it needs, and in the same way
    rows of the chunk states. Segments never cross a boundary.

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
def mask_token(o_d, D, present):
    """The channels that exist, or none where the token does not."""
    # one comparison, because the interpreter turns `mask & scalar` into an integer
    return o_d < tl.where(present, D, 0)


@triton.jit
def load_pair(p, o_d, mask, COMPLEX: tl.constexpr):
    """One value a channel, zero where masked."""
    if COMPLEX:
        pair = tl.load(p + 2 * o_d[:, None] + tl.arange(0, 2)[None, :], mask=mask[:, None], other=0.0)  # [BD, 2]
        return tl.split(pair)
    else:
        value = tl.load(p + o_d, mask=mask, other=0.0)
        return value, value


@triton.jit
def store_pair(p, o_d, value, imaginary, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(p + 2 * o_d[:, None] + tl.arange(0, 2)[None, :], tl.join(value, imaginary), mask=mask[:, None])
    else:
        tl.store(p + o_d, value, mask=mask)


@triton.jit
def multiply(a, a_im, x, x_im, COMPLEX: tl.constexpr):
    if COMPLEX:
        return a * x - a_im * x_im, a * x_im + a_im * x
    else:
        return a * x, x_im


@triton.jit
def select(condition, x, x_im, y, y_im, COMPLEX: tl.constexpr):
    """x where the condition holds, else y."""
    if COMPLEX:
        return tl.where(condition, x, y), tl.where(condition, x_im, y_im)
    else:
        return tl.where(condition, x, y), y_im


@triton.jit
def load_tokens(
    p_a, p_b, row, step, left, D, o_d, a, a_im,
    CELL: tl.constexpr, FIXED: tl.constexpr, COMPLEX: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What ``ROWS`` tokens are made of, in the dtypes of memory: a and b, or the gates and the value, four tensors each."""
    tokens = ()
    for r in tl.static_range(ROWS):
        at = row + step * r
        mask = mask_token(o_d, D, left > r)
        if CELL == "linear":
            if FIXED:
                factor, factor_im = a, a_im
            else:
                factor, factor_im = load_pair(p_a + at * D * (COMPLEX + 1), o_d, mask, COMPLEX)
            addend, addend_im = load_pair(p_b + at * D * (COMPLEX + 1), o_d, mask, COMPLEX)
            tokens = tokens + ((factor, factor_im, addend, addend_im),)
        elif CELL == "min_gru":
            gate = tl.load(p_a + at * D * 2 + o_d, mask=mask, other=0.0)
            value = tl.load(p_a + at * D * 2 + D + o_d, mask=mask, other=0.0)
            tokens = tokens + ((gate, gate, value, value),)
        else:
            forget = tl.load(p_a + at * D * 3 + o_d, mask=mask, other=0.0)
            enter = tl.load(p_a + at * D * 3 + D + o_d, mask=mask, other=0.0)
            value = tl.load(p_a + at * D * 3 + D * 2 + o_d, mask=mask, other=0.0)
            tokens = tokens + ((forget, enter, value, value),)
    return tokens


@triton.jit
def load_gradients(p, row, step, left, D, o_d, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """The gradients of ``ROWS`` outputs, zero where there is no token."""
    gradients = ()
    for r in tl.static_range(ROWS):
        mask = mask_token(o_d, D, left > r)
        gradients = gradients + (load_pair(p + (row + step * r) * D * (COMPLEX + 1), o_d, mask, COMPLEX),)
    return gradients


@triton.jit
def sigmoids(x):
    """The sigmoid of x and of -x: neither overflows, and neither is a difference."""
    small = tl.exp(-tl.abs(x))
    share = 1.0 / (1.0 + small)
    return tl.where(x >= 0, 1.0, small) * share, tl.where(x >= 0, small, 1.0) * share


@triton.jit
def gates(token, DTYPE: tl.constexpr, CELL: tl.constexpr):
    """How much of the value enters, and the rest of 1.

    minLSTM's ``sigmoid(i) / (sigmoid(f) + sigmoid(i))`` is ``(1 + e^-f) / ((1 + e^-f) + (1 + e^-i))``. The two sums are
    written as ``(1 + e^-|x|) e^max(-x, 0)`` and the larger of the second factors is divided out, so nothing overflows.
    """
    if CELL == "min_gru":
        return sigmoids(token[0].to(DTYPE))
    else:
        forget, enter = token[0].to(DTYPE), token[1].to(DTYPE)
        excess = tl.maximum(-forget, 0.0) - tl.maximum(-enter, 0.0)
        small = tl.exp(-tl.abs(excess))
        enters = (1.0 + tl.exp(-tl.abs(forget))) * tl.where(excess >= 0, 1.0, small)
        stays = (1.0 + tl.exp(-tl.abs(enter))) * tl.where(excess >= 0, small, 1.0)
        share = 1.0 / (enters + stays)
        return enters * share, stays * share


@triton.jit
def recurrence(token, lo, hi, DTYPE: tl.constexpr, CELL: tl.constexpr):
    """The factor and the addend of one token, two pairs."""
    if CELL == "linear":
        return token[0].to(DTYPE), token[1].to(DTYPE), token[2].to(DTYPE), token[3].to(DTYPE)
    else:
        enters, stays = gates(token, DTYPE, CELL)
        factor = lo + (hi - lo) * stays
        addend = enters * token[2].to(DTYPE)
        return factor, factor, addend, addend


@triton.jit
def compose(p_factors, p_addends, slot, step, count, D, o_d, h, h_im, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """Carries a state through ``count`` segments by their summaries, from ``slot`` in steps of 1 or -1."""
    for k in range(0, count, ROWS):
        row = slot + step * k
        left = count - k
        factors = load_gradients(p_factors, row, step, left, D, o_d, COMPLEX, ROWS)
        addends = load_gradients(p_addends, row, step, left, D, o_d, COMPLEX, ROWS)
        for r in tl.static_range(ROWS):
            a, a_im = factors[r]
            b, b_im = addends[r]
            x, x_im = multiply(a, a_im, h, h_im, COMPLEX)
            # the product over a long segment may overflow where the state that it meets is exactly zero
            zero = h == 0
            if COMPLEX:
                zero = zero & (h_im == 0)
            x, x_im = select(zero, h, h_im, x, x_im, COMPLEX)
            h, h_im = select(left > r, x + b, x_im + b_im, h, h_im, COMPLEX)
    return h, h_im


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
    n_blocks = tl.cdiv(D, BD)
    slot = tl.program_id(0) // n_blocks
    o_d = tl.program_id(0) % n_blocks * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_s, i_g, n_segments, start, length, _, _ = locate(slot, p_cu, T, S, segment, CHUNK)
    if ADJOINT:
        needed = (i_g > 0) & (i_g < n_segments)
    else:
        needed = i_g + 1 < n_segments
    if needed:
        n = tl.minimum(length - i_g * segment, segment)
        entry = i_g * segment
        if ADJOINT:
            entry += n - 1
        step: tl.constexpr = -1 if REVERSE != ADJOINT else 1
        row = start + (length - 1 - entry if REVERSE else entry)
        DTYPE: tl.constexpr = p_factors.dtype.element_ty
        h = tl.zeros((BD,), DTYPE)
        h_im = h
        product = h + 1.0
        product_im = h
        fixed, fixed_im = h, h
        if FIXED:
            fixed, fixed_im = load_pair(p_a, o_d, m_d, COMPLEX)
        for k in range(0, n, ROWS):
            at = row + step * k
            left = n - k
            tokens = load_tokens(
                p_a, p_b, at, step, left, D, o_d, fixed, fixed_im, CELL, FIXED, COMPLEX, ROWS
            )  # fmt: skip
            if ADJOINT:
                gradients = load_gradients(p_grad_h, at, step, left, D, o_d, COMPLEX, ROWS)
            for r in tl.static_range(ROWS):
                a, a_im, b, b_im = recurrence(tokens[r], lo, hi, DTYPE, CELL)
                if ADJOINT:
                    g, g_im = gradients[r]
                    a_im = -a_im
                    x, x_im = multiply(a, a_im, g.to(DTYPE) + h, g_im.to(DTYPE) + h_im, COMPLEX)
                else:
                    x, x_im = multiply(a, a_im, h, h_im, COMPLEX)
                    x, x_im = x + b, x_im + b_im
                h, h_im = select(left > r, x, x_im, h, h_im, COMPLEX)
                x, x_im = multiply(a, a_im, product, product_im, COMPLEX)
                product, product_im = select(left > r, x, x_im, product, product_im, COMPLEX)
        at = slot.to(tl.int64) * D * (COMPLEX + 1)
        store_pair(p_factors + at, o_d, product, product_im, m_d, COMPLEX)
        store_pair(p_addends + at, o_d, h, h_im, m_d, COMPLEX)


@triton.jit(do_not_specialize=["T", "S", "segment"])
def forward_kernel(
    p_a, p_b, p_initial, p_h, p_final, p_chunks, p_factors, p_addends, p_cu, T, S, D, segment, lo, hi,
    CELL: tl.constexpr, REVERSE: tl.constexpr, FIXED: tl.constexpr, COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes h, the state that enters every chunk and the final state; summaries are None when segments are sequences."""
    n_blocks = tl.cdiv(D, BD)
    slot = tl.program_id(0) // n_blocks
    o_d = tl.program_id(0) % n_blocks * BD + tl.arange(0, BD)
    m_d = o_d < D
    pitch = D * (COMPLEX + 1)
    i_s, i_g, n_segments, start, length, chunk, n_chunks = locate(slot, p_cu, T, S, segment, CHUNK)
    if i_g < n_segments:
        DTYPE: tl.constexpr = p_chunks.dtype.element_ty
        h = tl.zeros((BD,), DTYPE)
        h_im = h
        fixed, fixed_im = h, h
        if FIXED:
            fixed, fixed_im = load_pair(p_a, o_d, m_d, COMPLEX)
        if p_initial is not None:
            h, h_im = load_pair(p_initial + i_s.to(tl.int64) * pitch, o_d, m_d, COMPLEX)
        if p_factors is not None:
            h, h_im = compose(
                p_factors, p_addends, slot.to(tl.int64) - i_g, 1, i_g, D, o_d, h, h_im, COMPLEX, ROWS
            )  # fmt: skip
        step: tl.constexpr = -1 if REVERSE else 1
        row = start + (length - 1 - i_g * segment if REVERSE else i_g * segment)
        n = tl.minimum(length - i_g * segment, segment)
        i_c = i_g * (segment // CHUNK)
        for c in range(0, n, CHUNK):
            store_pair(p_chunks + (chunk + i_c + c // CHUNK) * pitch, o_d, h, h_im, m_d, COMPLEX)
            for k in range(0, CHUNK, ROWS):
                at = row + step * (c + k)
                left = n - c - k
                tokens = load_tokens(
                    p_a, p_b, at, step, left, D, o_d, fixed, fixed_im, CELL, FIXED, COMPLEX, ROWS
                )  # fmt: skip
                for r in tl.static_range(ROWS):
                    a, a_im, b, b_im = recurrence(tokens[r], lo, hi, DTYPE, CELL)
                    x, x_im = multiply(a, a_im, h, h_im, COMPLEX)
                    h, h_im = select(left > r, x + b, x_im + b_im, h, h_im, COMPLEX)
                    store_pair(p_h + (at + step * r) * pitch, o_d, h, h_im, mask_token(o_d, D, left > r), COMPLEX)
        if i_g + 1 == n_segments:
            store_pair(p_final + i_s.to(tl.int64) * pitch, o_d, h, h_im, m_d, COMPLEX)
            # the row that a packed sequence owns and does not need
            surplus = mask_token(o_d, D, tl.cdiv(length, CHUNK) < n_chunks)
            store_pair(p_chunks + (chunk + n_chunks - 1) * pitch, o_d, h, h_im, surplus, COMPLEX)


@triton.jit
def store_gradients(
    p_a, p_b, row, D, o_d, mask, token, grad_a, grad_a_im, grad_b, grad_b_im, lo, hi,
    CELL: tl.constexpr, FIXED: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Writes what one token's inputs receive; the gradient of a fixed factor is summed elsewhere."""
    if CELL == "linear":
        if not FIXED:
            store_pair(p_a + row * D * (COMPLEX + 1), o_d, grad_a, grad_a_im, mask, COMPLEX)
        store_pair(p_b + row * D * (COMPLEX + 1), o_d, grad_b, grad_b_im, mask, COMPLEX)
    else:
        DTYPE: tl.constexpr = grad_b.dtype
        enters, stays = gates(token, DTYPE, CELL)
        grad_logit = (grad_b * token[2].to(DTYPE) - (hi - lo) * grad_a) * enters * stays
        if CELL == "min_gru":
            tl.store(p_a + row * D * 2 + o_d, grad_logit, mask=mask)
            tl.store(p_a + row * D * 2 + D + o_d, grad_b * enters, mask=mask)
        else:
            _, closed = sigmoids(token[0].to(DTYPE))
            tl.store(p_a + row * D * 3 + o_d, -grad_logit * closed, mask=mask)
            _, closed = sigmoids(token[1].to(DTYPE))
            tl.store(p_a + row * D * 3 + D + o_d, grad_logit * closed, mask=mask)
            tl.store(p_a + row * D * 3 + D * 2 + o_d, grad_b * enters, mask=mask)


@triton.jit(do_not_specialize=["T", "S", "segment"])
def backward_kernel(
    p_grad_h, p_grad_final, p_a, p_b, p_chunks, p_grad_a, p_grad_b, p_grad_initial, p_factors, p_addends, p_cu,
    T, S, D, segment, lo, hi,
    CELL: tl.constexpr, REVERSE: tl.constexpr, FIXED: tl.constexpr, COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the inputs and of the initial state, from the last chunk of a segment to its first.

    With gamma_k the gradient in h_k: ``gamma_k = grad_h_k + carry``, ``carry = conj(a_k) gamma_k``, entered by the gradient
    of the final state. h is recomputed from the state that entered the chunk, which must be 4 * ROWS tokens: a first sweep
    finds the states that enter its four blocks, a second one takes the blocks from the last to the first.

    FIXED: ``p_grad_a`` receives one partial sum a slot, zero in a surplus slot.
    """
    n_blocks = tl.cdiv(D, BD)
    slot = tl.program_id(0) // n_blocks
    o_d = tl.program_id(0) % n_blocks * BD + tl.arange(0, BD)
    m_d = o_d < D
    pitch = D * (COMPLEX + 1)
    tl.static_assert(CHUNK == 4 * ROWS)
    DTYPE: tl.constexpr = p_chunks.dtype.element_ty
    i_s, i_g, n_segments, start, length, chunk, _ = locate(slot, p_cu, T, S, segment, CHUNK)
    total = tl.zeros((BD,), DTYPE)
    total_im = total
    if i_g < n_segments:
        carry, carry_im = load_pair(p_grad_final + i_s.to(tl.int64) * pitch, o_d, m_d, COMPLEX)
        if p_factors is not None:
            carry, carry_im = compose(
                p_factors, p_addends, slot.to(tl.int64) - i_g + n_segments - 1, -1, n_segments - 1 - i_g,
                D, o_d, carry, carry_im, COMPLEX, ROWS,
            )  # fmt: skip
        fixed, fixed_im = total, total
        if FIXED:
            fixed, fixed_im = load_pair(p_a, o_d, m_d, COMPLEX)
        step: tl.constexpr = -1 if REVERSE else 1
        row = start + (length - 1 - i_g * segment if REVERSE else i_g * segment)
        n = tl.minimum(length - i_g * segment, segment)
        last = tl.cdiv(n, CHUNK) - 1
        i_c = i_g * (segment // CHUNK)
        for c in range(0, last + 1):
            first = (last - c) * CHUNK
            h, h_im = load_pair(p_chunks + (chunk + i_c + last - c) * pitch, o_d, m_d, COMPLEX)
            # a stack of the states that entered the blocks before
            entered_1, entered_1_im, entered_2, entered_2_im, entered_3, entered_3_im = h, h_im, h, h_im, h, h_im
            for k in range(0, CHUNK - ROWS, ROWS):
                entered_3, entered_3_im = entered_2, entered_2_im
                entered_2, entered_2_im = entered_1, entered_1_im
                entered_1, entered_1_im = h, h_im
                left = n - first - k
                tokens = load_tokens(
                    p_a, p_b, row + step * (first + k), step, left, D, o_d, fixed, fixed_im,
                    CELL, FIXED, COMPLEX, ROWS,
                )  # fmt: skip
                for r in tl.static_range(ROWS):
                    a, a_im, b, b_im = recurrence(tokens[r], lo, hi, DTYPE, CELL)
                    x, x_im = multiply(a, a_im, h, h_im, COMPLEX)
                    h, h_im = select(left > r, x + b, x_im + b_im, h, h_im, COMPLEX)
            partial = tl.zeros((BD,), DTYPE)
            partial_im = partial
            for k in range(0, CHUNK, ROWS):
                block = first + (CHUNK - ROWS) - k
                at = row + step * block
                left = n - block
                tokens = load_tokens(
                    p_a, p_b, at, step, left, D, o_d, fixed, fixed_im, CELL, FIXED, COMPLEX, ROWS
                )  # fmt: skip
                gradients = load_gradients(p_grad_h, at, step, left, D, o_d, COMPLEX, ROWS)
                before = ()
                for r in tl.static_range(ROWS):
                    before = before + ((h, h_im),)
                    a, a_im, b, b_im = recurrence(tokens[r], lo, hi, DTYPE, CELL)
                    x, x_im = multiply(a, a_im, h, h_im, COMPLEX)
                    h, h_im = select(left > r, x + b, x_im + b_im, h, h_im, COMPLEX)
                for i in tl.static_range(ROWS):
                    r: tl.constexpr = ROWS - 1 - i
                    a, a_im, b, b_im = recurrence(tokens[r], lo, hi, DTYPE, CELL)
                    g, g_im = gradients[r]
                    gamma, gamma_im = g.to(DTYPE) + carry, g_im.to(DTYPE) + carry_im
                    x, x_im = before[r]
                    grad_a, grad_a_im = multiply(gamma, gamma_im, x, -x_im, COMPLEX)
                    x, x_im = multiply(a, -a_im, gamma, gamma_im, COMPLEX)
                    carry, carry_im = select(left > r, x, x_im, carry, carry_im, COMPLEX)
                    if FIXED:
                        x, x_im = partial + grad_a, partial_im + grad_a_im
                        partial, partial_im = select(left > r, x, x_im, partial, partial_im, COMPLEX)
                    store_gradients(
                        p_grad_a, p_grad_b, at + step * r, D, o_d, mask_token(o_d, D, left > r), tokens[r],
                        grad_a, grad_a_im, gamma, gamma_im, lo, hi, CELL, FIXED, COMPLEX,
                    )  # fmt: skip
                h, h_im = entered_1, entered_1_im
                entered_1, entered_1_im = entered_2, entered_2_im
                entered_2, entered_2_im = entered_3, entered_3_im
            total += partial
            total_im += partial_im
        if i_g == 0:
            store_pair(p_grad_initial + i_s.to(tl.int64) * pitch, o_d, carry, carry_im, m_d, COMPLEX)
    if FIXED:
        store_pair(p_grad_a + slot.to(tl.int64) * pitch, o_d, total, total_im, m_d, COMPLEX)
