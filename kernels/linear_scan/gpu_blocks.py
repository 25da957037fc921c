"""Pieces of the Triton scans: a block of tokens loaded, turned into the recurrence, walked in both directions, stored.

Helpers work on blocks of ``ROWS`` tokens, as tuples, because a call costs the interpreter far more than what it does
inside. Values are pairs (real, imaginary); a real one repeats itself, which costs nothing once compiled. ``room``,
``[BD]``, is the number of tokens left from the block's first one on, zero in channels that do not exist.
"""

# Triton takes neither a starred expression nor a value that only one branch would return
# ruff: noqa: RUF005, RET505

import triton
import triton.language as tl


@triton.jit
def load_state(p, row, D, o_d, COMPLEX: tl.constexpr):
    """One row of states, or of factors that do not depend on time; zero in channels that do not exist."""
    m_d = o_d < D
    if COMPLEX:
        p_row = p + row * D * 2 + 2 * o_d[:, None] + tl.arange(0, 2)[None, :]  # [BD, 2]
        return tl.split(tl.load(p_row, mask=m_d[:, None], other=0.0))
    else:
        value = tl.load(p + row * D + o_d, mask=m_d, other=0.0)
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
def apply_summary(factor, addend, h, h_im, COMPLEX: tl.constexpr):
    """The state after a segment, of the one before it and the segment's summary."""
    a, a_im = factor
    b, b_im = addend
    # the product over a long segment may overflow where the state that it meets is exactly zero
    if COMPLEX:
        still = (h == 0) & (h_im == 0)
        x = tl.where(still, 0.0, a * h - a_im * h_im) + b
        x_im = tl.where(still, 0.0, a * h_im + a_im * h) + b_im
        return x, x_im
    else:
        x = tl.where(h == 0, 0.0, a * h) + b
        return x, x


@triton.jit
def compose(p_factors, p_addends, slot, step, count, D, o_d, h, h_im, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """Carries a state through ``count`` segments by their summaries, from ``slot`` in steps of 1 or -1."""
    for k in range(0, count, ROWS):
        room = tl.where(o_d < D, count - k, 0)
        factors = load_rows(p_factors, slot + step * k, step, room, D, o_d, COMPLEX, ROWS)
        addends = load_rows(p_addends, slot + step * k, step, room, D, o_d, COMPLEX, ROWS)
        for r in tl.static_range(ROWS):
            x, x_im = apply_summary(factors[r], addends[r], h, h_im, COMPLEX)
            if COMPLEX:
                h_im = tl.where(room > r, x_im, h_im)
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


@triton.jit
def accumulate(total, lost, results, room, WHICH: tl.constexpr, ROWS: tl.constexpr):
    """Adds the entry WHICH of ``ROWS`` tokens to a sum over all of them, keeping what each addition loses (Kahan)."""
    for r in tl.static_range(ROWS):
        addend = tl.where(room > r, results[r][WHICH], 0.0) - lost
        longer = total + addend
        lost = (longer - total) - addend
        total = longer
    return total, lost


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
