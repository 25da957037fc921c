"""The Triton kernels of ``delta_rule``: triangular systems, then states from chunk to chunk, then gradients.

In a chunk of SUB tokens, with g the cumulative sum of the logarithms in it, S the state that enters it, dS the gradient
of the one that leaves it, ``P_ij = sum_k k_ik k_jk exp(g_ik - g_jk)`` for j < i, Q likewise of ``q_i`` and j <= i, and
D the diagonal matrix of the betas::

    w = (I + P D)^-1 (v - (exp(g) k) S)                    z = (I + D P)^-T (scale Q^T do + (exp(g_C - g) k) dS)
    S_out = exp(g_C) S + (exp(g_C - g) k)^T D w            dS_in = exp(g_C) dS + scale (exp(g) q)^T do - (exp(g) k)^T dv
    o = scale ((exp(g) q) S + Q D w)                       dv = D z,  dD = w z

Neither system needs the other's solution, so states and gradients walk side by side. The chunks are as short as a
product of matrices allows: the tokens of a longer one write larger terms that cancel, and only the next chunk corrects
what those round. A program walks with a few values of the state and all its keys, transposed and in parts, so that the
products of a part pass through the registers one after another. The backward pass keeps a state every ROWS tokens, and
the gradients start from there.

Where these programs are few, sequences are cut into segments that walk side by side. A segment takes the state S to
``M S + L`` and the gradient dS back to ``M^T dS + dL``; without values the walk takes the identity to M, from zero it
finds L and dL. A launch finds these of all segments, the next composes them to the states that enter the segments.
"""

# Triton takes a condition on constants and one on values apart; a kernel is one function however long
# ruff: noqa: C901, RET505, SIM102, SIM300

import triton
import triton.language as tl

from seqzoo.kernels.linear_attention.gpu_blocks import (
    SUB,
    exp,
    load_across,
    load_state,
    load_tile,
    log_behind,
    log_until,
    ones,
    pair_decay,
    pair_logs,
    product,
    store_tile,
    suffix_in_blocks,
)
from seqzoo.kernels.linear_scan.gpu_kernels import locate


@triton.jit
def invert(a):
    """``(I + a)^-1`` of a strictly lower triangle ``[SUB, SUB]``, by substitution: powers of it would be larger."""
    o_c = tl.arange(0, SUB)
    inverse = tl.where(o_c[:, None] == o_c[None, :], 1.0, 0.0)
    for i in range(1, SUB):
        row = tl.sum(tl.where((o_c == i)[:, None], a, 0.0), axis=0)
        found = tl.sum(row[:, None] * inverse, axis=0)
        inverse = tl.where((o_c == i)[:, None], inverse - found[None, :], inverse)
    return inverse


@triton.jit
def load_beta(p_beta, row, H, i_h, o_t, tokens):
    """The betas of tokens ``row + o_t``, zero where there are none: ``[BT]``."""
    mask = (o_t >= 0) & (o_t < tokens)
    return tl.load(p_beta + (row + o_t) * H + i_h, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_square(p, row, H, i_h, o_c, tokens, ACROSS: tl.constexpr):
    """A matrix ``[SUB, SUB]`` whose rows lie at the tokens ``row + o_c`` of a head, transposed with ACROSS."""
    p += row * H * SUB + i_h * SUB
    if ACROSS:
        return tl.load(p + o_c[:, None] + o_c[None, :] * H * SUB, mask=(o_c < tokens)[None, :], other=0.0)
    else:
        return tl.load(p + o_c[:, None] * H * SUB + o_c[None, :], mask=(o_c < tokens)[:, None], other=0.0)


@triton.jit
def store_square(p, row, H, i_h, o_c, tokens, value):
    """Writes what :func:`load_square` reads."""
    at = p + row * H * SUB + i_h * SUB + o_c[:, None] * H * SUB + o_c[None, :]
    tl.store(at, value, mask=(o_c < tokens)[:, None])


@triton.jit(do_not_specialize=["T", "S"])
def systems_kernel(
    p_q, p_k, p_log, p_beta, p_scores, p_solve, p_solve_back, p_cu, T, S, G, H, K,
    DECAY: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Writes Q, ``(I + P D)^-1`` and, unless ``p_solve_back`` is None, ``(I + D P)^-1``, of a chunk of one head."""
    KIND: tl.constexpr = p_q.dtype.element_ty
    index = tl.program_id(0)
    i_h = index % H
    _, i_c, n_chunks, start, length, _, _ = locate(index // H, p_cu, T, S, SUB, SUB)
    m = tl.minimum(length - i_c * SUB, SUB)
    if (i_c < n_chunks) & (m > 0):
        o_c = tl.arange(0, SUB)
        row = start + i_c * SUB
        p_q += i_h // (H // G) * K
        p_k += i_h // (H // G) * K
        scores = tl.zeros((SUB, SUB), tl.float32)
        near = tl.zeros((SUB, SUB), tl.float32)
        for first in range(0, K, BK):
            o_k = first + tl.arange(0, BK)
            q = load_tile(p_q, row, G * K, o_c, m, o_k, K)
            key = load_tile(p_k, row, G * K, o_c, m, o_k, K)
            if DECAY == "key":
                log = load_tile(p_log + i_h * K, row, H * K, o_c, m, o_k, K).to(tl.float32)
                left = exp(pair_logs(log)) * key.to(tl.float32)[None, :, :]  # [i, j, BK]
                scores += tl.sum(q.to(tl.float32)[:, None, :] * left, axis=2)
                near += tl.sum(key.to(tl.float32)[:, None, :] * left, axis=2)
            else:
                scores = product(q, tl.trans(key), scores, KIND, True)
                near = product(key, tl.trans(key), near, KIND, True)
        if DECAY == "token":
            between = pair_decay(p_log, row, H, i_h, o_c, m, DECAY, False)
            scores *= between
            near *= between
        scores = tl.where(o_c[:, None] >= o_c[None, :], scores, 0.0)
        near = tl.where(o_c[:, None] > o_c[None, :], near, 0.0)
        beta = load_beta(p_beta, row, H, i_h, o_c, m)
        store_square(p_scores, row, H, i_h, o_c, m, scores)
        store_square(p_solve, row, H, i_h, o_c, m, invert(near * beta[None, :]))
        if p_solve_back is not None:
            # from the other one it would be I - D (I + P D)^-1 P, which rounds twice as much
            store_square(p_solve_back, row, H, i_h, o_c, m, invert(near * beta[:, None]))


@triton.jit
def chosen(parts, part, PARTS: tl.constexpr, UNROLL: tl.constexpr):
    """One of some tiles; without UNROLL its number is known on the device only."""
    if UNROLL:
        return parts[part]
    else:
        x = parts[0]
        for other in tl.static_range(1, PARTS):
            x = tl.where(part == other, parts[other], x)
        return x


@triton.jit
def placed(parts, part, x, PARTS: tl.constexpr, UNROLL: tl.constexpr):
    """The tiles with another one in the place ``part``, which with UNROLL is the one behind them."""
    if UNROLL:
        return parts + (x,)  # noqa: RUF005 - Triton does not unpack
    else:
        replaced = ()
        for other in tl.static_range(PARTS):
            replaced = replaced + (tl.where(part == other, x, parts[other]),)  # noqa: RUF005
        return replaced


@triton.jit
def load_states_across(p, at, K, V, o_v, BK: tl.constexpr, PARTS: tl.constexpr):
    """All keys of some columns of the matrix ``at`` of ``(rows, K, V)``, transposed, in PARTS of ``[BV, BK]``."""
    parts = ()
    for part in tl.static_range(PARTS):
        o_k = part * BK + tl.arange(0, BK)
        mask = (o_v < V)[:, None] & (o_k < K)[None, :]
        # no pointer, no state: zero
        if p is None:
            x = tl.where(mask, 0.0, 0.0)
        else:
            x = tl.load(p + at * K * V + (o_k[None, :] * V + o_v[:, None]), mask=mask, other=0.0).to(tl.float32)
        parts = parts + (x,)  # noqa: RUF005 - Triton does not unpack
    return parts


@triton.jit
def identity_across(o_v, K, BK: tl.constexpr, PARTS: tl.constexpr):
    """What :func:`load_states_across` makes of columns ``o_v`` of the identity, zero where it has none."""
    parts = ()
    for part in tl.static_range(PARTS):
        o_k = part * BK + tl.arange(0, BK)
        parts = parts + (tl.where((o_v[:, None] == o_k[None, :]) & (o_k < K)[None, :], 1.0, 0.0),)  # noqa: RUF005
    return parts


@triton.jit
def store_states_across(p, at, K, V, o_v, parts, BK: tl.constexpr, PARTS: tl.constexpr):
    """Writes what :func:`load_states_across` reads."""
    for part in tl.static_range(PARTS):
        o_k = part * BK + tl.arange(0, BK)
        mask = (o_v < V)[:, None] & (o_k < K)[None, :]
        tl.store(p + at * K * V + (o_k[None, :] * V + o_v[:, None]), parts[part], mask=mask)


@triton.jit
def store_across(p, row, stride, o_t, tokens, o_c, width, value):
    """Writes what :func:`load_across` reads."""
    mask = (o_c < width)[:, None] & (o_t < tokens)[None, :]
    tl.store(p + row * stride + (o_c[:, None] + o_t[None, :] * stride), value, mask=mask)


@triton.jit
def key_until(p_log, row, stride, o_c, tokens, o_k, K):
    """What is left at tokens ``row + o_c`` of the state before them: ``[C, BK]``."""
    return exp(tl.cumsum(load_tile(p_log, row, stride, o_c, tokens, o_k, K).to(tl.float32), axis=0))


@triton.jit
def key_behind(p_log, row, stride, o_c, tokens, o_k, K):
    """What is left behind all ``tokens`` of what those at ``row + o_c`` add to the state: ``[C, BK]``."""
    after = load_tile(p_log, row + 1, stride, o_c, tokens - 1, o_k, K).to(tl.float32)
    return exp(tl.cumsum(after, axis=0, reverse=True))


@triton.jit
def key_whole(p_log, row, stride, o_c, tokens, o_k, K):
    """What is left behind all ``tokens`` of the state before them: ``[BK]``."""
    return exp(tl.sum(load_tile(p_log, row, stride, o_c, tokens, o_k, K).to(tl.float32), axis=0))


@triton.jit
def narrow(i_g, n_segments, start, n, chunk, segment, SUMMARY: tl.constexpr, ROWS: tl.constexpr):
    """First row, tokens and first kept state of a segment, from those of its sequence.

    No segment, no tokens; nor has a sequence's only one any for its SUMMARY, which nothing would read.
    """
    n = tl.minimum(n - i_g * segment, segment)
    if SUMMARY:
        n = tl.where(n_segments > 1, n, 0)
    return start + i_g * segment, n, chunk + i_g * (segment // ROWS)


@triton.jit
def walk(
    p_q, p_k, p_v, p_log, p_beta, p_scores, p_solve, p_initial, p_o, p_w, p_states, p_final, slot, i_h, o_v, p_cu,
    T, S, G, H, K, V, scale, segment,
    DECAY: tl.constexpr, SUMMARY: tl.constexpr, CUT: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Takes some columns of a head's state through a sequence; writes o, w, the states to keep, unless None.

    CUT: through a segment of it, from the state that ``p_initial`` has for the segment. SUMMARY: from nothing, of V
    columns and behind them the K of the transition, which ``p_final`` takes for every segment.
    """
    KIND: tl.constexpr = p_q.dtype.element_ty
    # three parts of every operand of all products at once would not fit the registers
    UNROLL: tl.constexpr = (KIND == tl.bfloat16) or (BK * PARTS <= 128)
    i_s, i_g, n_segments, start, n, chunk, _ = locate(slot, p_cu, T, S, segment, ROWS)
    if CUT:
        start, n, chunk = narrow(i_g, n_segments, start, n, chunk, segment, SUMMARY, ROWS)
    o_c = tl.arange(0, SUB)
    p_q += i_h // (H // G) * K
    p_k += i_h // (H // G) * K
    if DECAY == "key":
        p_log += i_h * K
    if SUMMARY:
        x = identity_across(o_v - V, K, BK, PARTS)
    else:
        x = load_states_across(p_initial, (slot if CUT else i_s).to(tl.int64) * H + i_h, K, V, o_v, BK, PARTS)
    for i_c in tl.range(0, tl.cdiv(n, SUB), disable_licm=True):
        row = start + i_c * SUB
        m = tl.minimum(n - i_c * SUB, SUB)
        if p_states is not None:
            if i_c * SUB % ROWS == 0:
                store_states_across(p_states, (chunk + i_c * SUB // ROWS) * H + i_h, K, V, o_v, x, BK, PARTS)
        held = tl.zeros((BV, SUB), tl.float32)
        o = tl.zeros((BV, SUB), tl.float32)
        for part in (tl.static_range if UNROLL else tl.range)(PARTS):
            o_k = part * BK + tl.arange(0, BK)
            key = load_tile(p_k, row, G * K, o_c, m, o_k, K)
            if DECAY == "key":
                reach = key_until(p_log, row, H * K, o_c, m, o_k, K)
                key = key.to(tl.float32) * reach
            state = chosen(x, part, PARTS, UNROLL)
            held = product(state, tl.trans(key), held, KIND, True)
            if p_o is not None:
                q = load_tile(p_q, row, G * K, o_c, m, o_k, K)
                if DECAY == "key":
                    q = q.to(tl.float32) * reach
                o = product(state, tl.trans(q), o, KIND, False)
        if DECAY == "token":
            until, total = log_until(p_log, row, H, i_h, o_c, m, DECAY, False)
            held *= exp(until)[None, :]
            o *= exp(until)[None, :]
        v = load_across(p_v + i_h * V, row, H * V, o_c, m, o_v, V).to(tl.float32)
        solve = load_square(p_solve, row, H, i_h, o_c, m, True)
        w = product(v - held, solve, tl.zeros((BV, SUB), tl.float32), KIND, True)
        u = w * load_beta(p_beta, row, H, i_h, o_c, m)[None, :]
        if p_w is not None:
            store_across(p_w + i_h * V, row, H * V, o_c, m, o_v, V, w)
        if p_o is not None:
            o = product(u, load_square(p_scores, row, H, i_h, o_c, m, True), o, KIND, False)
            store_across(p_o + i_h * V, row, H * V, o_c, m, o_v, V, o * scale)
        if DECAY == "token":
            u *= exp(log_behind(p_log, row, H, i_h, o_c, m, DECAY))[None, :]
        after = () if UNROLL else x
        for part in (tl.static_range if UNROLL else tl.range)(PARTS):
            o_k = part * BK + tl.arange(0, BK)
            key = load_tile(p_k, row, G * K, o_c, m, o_k, K)
            left = chosen(x, part, PARTS, UNROLL)
            if DECAY == "key":
                key = key.to(tl.float32) * key_behind(p_log, row, H * K, o_c, m, o_k, K)
                left *= key_whole(p_log, row, H * K, o_c, m, o_k, K)[None, :]
            elif DECAY == "token":
                left *= exp(total)
            after = placed(after, part, product(u, key, left, KIND, True), PARTS, UNROLL)
        x = after
    if SUMMARY:
        store_states_across(p_final, slot.to(tl.int64) * H + i_h, K, V + K, o_v, x, BK, PARTS)
    elif p_final is not None:
        o_end = tl.where(i_g == n_segments - 1, o_v, V) if CUT else o_v
        store_states_across(p_final, i_s.to(tl.int64) * H + i_h, K, V, o_end, x, BK, PARTS)


@triton.jit
def walk_back(
    p_q, p_k, p_grad_o, p_log, p_beta, p_scores, p_solve, p_grad_final, p_z, p_grad_v, p_grad_states, p_grad_initial,
    slot, i_h, o_v, p_cu, T, S, G, H, K, V, scale, segment,
    DECAY: tl.constexpr, SUMMARY: tl.constexpr, CUT: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Takes some columns of the gradient of a head's state back through a sequence; writes z, grad_v, some of them.

    CUT and SUMMARY: as in :func:`walk`, with ``p_grad_final`` and ``p_grad_initial``; without a transition, and of z,
    grad_v and the gradients nothing is written.
    """
    KIND: tl.constexpr = p_q.dtype.element_ty
    # three parts of every operand of all products at once would not fit the registers
    UNROLL: tl.constexpr = (KIND == tl.bfloat16) or (BK * PARTS <= 128)
    i_s, i_g, n_segments, start, n, chunk, _ = locate(slot, p_cu, T, S, segment, ROWS)
    if CUT:
        start, n, chunk = narrow(i_g, n_segments, start, n, chunk, segment, SUMMARY, ROWS)
    o_c = tl.arange(0, SUB)
    p_q += i_h // (H // G) * K
    p_k += i_h // (H // G) * K
    if DECAY == "key":
        p_log += i_h * K
    x = load_states_across(p_grad_final, (slot if CUT else i_s).to(tl.int64) * H + i_h, K, V, o_v, BK, PARTS)
    n_chunks = tl.cdiv(n, SUB)
    for i in tl.range(0, n_chunks, disable_licm=True):
        i_c = n_chunks - 1 - i
        row = start + i_c * SUB
        m = tl.minimum(n - i_c * SUB, SUB)
        if not SUMMARY:
            if (i == 0) | ((i_c + 1) * SUB % ROWS == 0):
                store_states_across(p_grad_states, (chunk + i_c * SUB // ROWS) * H + i_h, K, V, o_v, x, BK, PARTS)
        grad_u = tl.zeros((BV, SUB), tl.float32)
        for part in (tl.static_range if UNROLL else tl.range)(PARTS):
            o_k = part * BK + tl.arange(0, BK)
            key = load_tile(p_k, row, G * K, o_c, m, o_k, K)
            if DECAY == "key":
                key = key.to(tl.float32) * key_behind(p_log, row, H * K, o_c, m, o_k, K)
            grad_u = product(chosen(x, part, PARTS, UNROLL), tl.trans(key), grad_u, KIND, True)
        if DECAY == "token":
            grad_u *= exp(log_behind(p_log, row, H, i_h, o_c, m, DECAY))[None, :]
        grad_o = load_across(p_grad_o + i_h * V, row, H * V, o_c, m, o_v, V)
        scores = load_square(p_scores, row, H, i_h, o_c, m, False) * scale
        grad_u = product(grad_o, scores, grad_u, KIND, True)
        solve = load_square(p_solve, row, H, i_h, o_c, m, False)
        z = product(grad_u, solve, tl.zeros((BV, SUB), tl.float32), KIND, True)
        grad_v = z * load_beta(p_beta, row, H, i_h, o_c, m)[None, :]
        if not SUMMARY:
            store_across(p_z + i_h * V, row, H * V, o_c, m, o_v, V, z)
            store_across(p_grad_v + i_h * V, row, H * V, o_c, m, o_v, V, grad_v)
        given = grad_o.to(tl.float32) * scale
        if DECAY == "token":
            until, total = log_until(p_log, row, H, i_h, o_c, m, DECAY, False)
            given *= exp(until)[None, :]
            grad_v *= exp(until)[None, :]
        before = () if UNROLL else x
        for part in (tl.static_range if UNROLL else tl.range)(PARTS):
            o_k = part * BK + tl.arange(0, BK)
            q = load_tile(p_q, row, G * K, o_c, m, o_k, K)
            key = load_tile(p_k, row, G * K, o_c, m, o_k, K)
            left = chosen(x, part, PARTS, UNROLL)
            if DECAY == "key":
                reach = key_until(p_log, row, H * K, o_c, m, o_k, K)
                q = q.to(tl.float32) * reach
                key = key.to(tl.float32) * reach
                left *= key_whole(p_log, row, H * K, o_c, m, o_k, K)[None, :]
            elif DECAY == "token":
                left *= exp(total)
            left = product(given, q, left, KIND, True)
            before = placed(before, part, product(-grad_v, key, left, KIND, True), PARTS, UNROLL)
        x = before
    o_end = tl.where(i_g == 0, o_v, V) if CUT and not SUMMARY else o_v
    at = slot if SUMMARY else i_s
    store_states_across(p_grad_initial, at.to(tl.int64) * H + i_h, K, V, o_end, x, BK, PARTS)


@triton.jit(do_not_specialize=["T", "S", "segment"])
def summaries_kernel(
    p_q, p_k, p_v, p_log, p_beta, p_grad_o, p_scores, p_solve, p_solve_back, p_summaries, p_grad_summaries, p_cu,
    T, S, G, H, K, V, scale, segment,
    DECAY: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Writes BV columns of ``(L, M)`` of a segment of a head and, in the grid's second row, of dL.

    Of sequences of one segment it writes nothing that is read.
    """
    columns = tl.cdiv(V + K, BV)
    index = tl.program_id(0)
    first = index % columns * BV
    o_v = first + tl.arange(0, BV)
    i_h = index // columns % H
    slot = index // (columns * H)
    if tl.program_id(1) == 0:
        walk(
            p_q, p_k, p_v, p_log, p_beta, p_scores, p_solve, None, None, None, None, p_summaries, slot, i_h, o_v, p_cu,
            T, S, G, H, K, V, scale, segment, DECAY, True, True, SUB, BK, PARTS, BV,
        )  # fmt: skip
    elif p_grad_o is not None:
        if first < V:
            walk_back(
                p_q, p_k, p_grad_o, p_log, p_beta, p_scores, p_solve_back, None, None, None, None, p_grad_summaries,
                slot, i_h, o_v, p_cu, T, S, G, H, K, V, scale, segment, DECAY, True, True, SUB, BK, PARTS, BV,
            )  # fmt: skip


@triton.jit
def compose(
    p_summaries, p_addends, p_given, p_entering, slot, i_h, o_v, p_cu, T, S, H, K, V, width, segment,
    ADJOINT: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Takes some columns of a head's state from segment to segment, or with ADJOINT its gradient back.

    Args:
        p_summaries: L and behind it M of every segment, of which M is read.
        p_addends: What every segment adds, in rows of ``width``.
        p_given: What enters a sequence, unless None.
        p_entering: Takes what enters every segment.
        slot: The sequence's first segment; for any other nothing is done.
    """
    i_s, i_g, n_segments, _, _, _, _ = locate(slot, p_cu, T, S, segment, SUB)
    if i_g == 0:
        x = load_states_across(p_given, i_s.to(tl.int64) * H + i_h, K, V, o_v, BK, PARTS)
        for i in tl.range(0, n_segments - 1, disable_licm=True):
            at = (slot + (n_segments - 1 - i if ADJOINT else i)).to(tl.int64) * H + i_h
            store_states_across(p_entering, at, K, V, o_v, x, BK, PARTS)
            p_matrix = p_summaries + at * K * (V + K) + V
            after = load_states_across(p_addends, at, K, width, o_v, BK, PARTS)
            # not unrolled: with all operands at once the registers would not do
            for i_j in tl.range(0, PARTS, disable_licm=True):
                o_j = i_j * BK + tl.arange(0, BK)
                left = chosen(x, i_j, PARTS, False)
                for i_k in tl.range(0, PARTS, disable_licm=True):
                    o_k = i_k * BK + tl.arange(0, BK)
                    if ADJOINT:
                        matrix = load_tile(p_matrix, 0, V + K, o_j, K, o_k, K)
                    else:
                        matrix = load_across(p_matrix, 0, V + K, o_k, K, o_j, K)
                    more = product(left, matrix, tl.zeros((BV, BK), tl.float32), tl.float32, True)
                    total = ()
                    for part in tl.static_range(PARTS):
                        total = total + (after[part] + tl.where(i_k == part, more, 0.0),)  # noqa: RUF005
                    after = total
            x = after
        last = (slot + (0 if ADJOINT else n_segments - 1)).to(tl.int64) * H + i_h
        store_states_across(p_entering, last, K, V, o_v, x, BK, PARTS)


@triton.jit(do_not_specialize=["T", "S", "segment"])
def compose_kernel(
    p_summaries, p_grad_summaries, p_initial, p_grad_final, p_entering, p_grad_entering, p_cu,
    T, S, H, K, V, segment,
    BK: tl.constexpr, PARTS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Writes BV columns of the states that enter a sequence's segments and, in the grid's second row, of the gradients.

    The gradients enter a segment from behind. A program of a segment other than a sequence's first has nothing to do.
    """
    columns = tl.cdiv(V, BV)
    index = tl.program_id(0)
    o_v = index % columns * BV + tl.arange(0, BV)
    i_h = index // columns % H
    slot = index // (columns * H)
    if tl.program_id(1) == 0:
        compose(
            p_summaries, p_summaries, p_initial, p_entering, slot, i_h, o_v, p_cu, T, S, H, K, V, V + K, segment,
            False, BK, PARTS, BV,
        )  # fmt: skip
    elif p_grad_summaries is not None:
        compose(
            p_summaries, p_grad_summaries, p_grad_final, p_grad_entering, slot, i_h, o_v, p_cu, T, S, H, K, V, V,
            segment, True, BK, PARTS, BV,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "S", "segment"])
def states_kernel(
    p_q, p_k, p_v, p_log, p_beta, p_grad_o, p_scores, p_solve, p_solve_back, p_initial, p_grad_final, p_o, p_w, p_z,
    p_grad_v, p_states, p_grad_states, p_final, p_grad_initial, p_cu, T, S, G, H, K, V, scale, segment,
    DECAY: tl.constexpr, CUT: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Takes BV columns of a head's state through a sequence and, in the grid's second row, their gradient back.

    CUT: through a segment, with ``p_initial`` and ``p_grad_final`` what enters every segment.
    """
    columns = tl.cdiv(V, BV)
    index = tl.program_id(0)
    o_v = index % columns * BV + tl.arange(0, BV)
    i_h = index // columns % H
    slot = index // (columns * H)
    if tl.program_id(1) == 0:
        walk(
            p_q, p_k, p_v, p_log, p_beta, p_scores, p_solve, p_initial, p_o, p_w, p_states, p_final, slot, i_h, o_v,
            p_cu, T, S, G, H, K, V, scale, segment, DECAY, False, CUT, ROWS, BK, PARTS, BV,
        )  # fmt: skip
    elif p_grad_o is not None:
        walk_back(
            p_q, p_k, p_grad_o, p_log, p_beta, p_scores, p_solve_back, p_grad_final, p_z, p_grad_v, p_grad_states,
            p_grad_initial, slot, i_h, o_v, p_cu, T, S, G, H, K, V, scale, segment, DECAY, False, CUT, ROWS, BK, PARTS,
            BV,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "S"])
def pairs_kernel(
    p_w, p_z, p_beta, p_grad_o, p_grad_scores, p_grad_near, p_grad_beta, p_cu, T, S, H, V, scale,
    FINE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of Q and P and of the betas, of a chunk of one head."""
    KIND: tl.constexpr = p_grad_o.dtype.element_ty
    index = tl.program_id(0)
    i_h = index % H
    _, i_c, n_chunks, start, length, _, _ = locate(index // H, p_cu, T, S, SUB, SUB)
    m = tl.minimum(length - i_c * SUB, SUB)
    if (i_c < n_chunks) & (m > 0):
        o_c = tl.arange(0, SUB)
        row = start + i_c * SUB
        grad_scores = tl.zeros((SUB, SUB), tl.float32)
        grad_near = tl.zeros((SUB, SUB), tl.float32)
        grad_beta = tl.zeros((SUB,), tl.float32)
        for first in range(0, V, BV):
            o_v = first + tl.arange(0, BV)
            grad_o = load_tile(p_grad_o + i_h * V, row, H * V, o_c, m, o_v, V)
            w = load_tile(p_w + i_h * V, row, H * V, o_c, m, o_v, V)
            z = load_tile(p_z + i_h * V, row, H * V, o_c, m, o_v, V)
            grad_scores = product(grad_o, tl.trans(w), grad_scores, KIND, FINE)
            grad_near = product(z, tl.trans(w), grad_near, KIND, FINE)
            grad_beta += tl.sum(w.to(tl.float32) * z.to(tl.float32), axis=1)
        beta = load_beta(p_beta, row, H, i_h, o_c, m)
        grad_scores = tl.where(o_c[:, None] >= o_c[None, :], grad_scores * beta[None, :] * scale, 0.0)
        grad_near = tl.where(o_c[:, None] > o_c[None, :], -grad_near * beta[None, :] * beta[:, None], 0.0)
        store_square(p_grad_scores, row, H, i_h, o_c, m, grad_scores)
        store_square(p_grad_near, row, H, i_h, o_c, m, grad_near)
        tl.store(p_grad_beta + (row + o_c) * H + i_h, grad_beta, mask=o_c < m)


@triton.jit
def in_blocks(x, ROWS: tl.constexpr, REVERSE: tl.constexpr):
    """Cumulative sums in the chunks of ``[ROWS]``."""
    return tl.reshape(tl.cumsum(tl.reshape(x, (ROWS // SUB, SUB)), axis=1, reverse=REVERSE), (ROWS,))


@triton.jit
def columns_in_blocks(x, ROWS: tl.constexpr, BK: tl.constexpr):
    """Sums over the rows from the first of each one's chunk on: ``[ROWS, BK]``."""
    blocks = tl.reshape(x, (ROWS // SUB, SUB, BK))
    return tl.reshape(tl.cumsum(blocks, axis=1), (ROWS, BK))


@triton.jit
def load_pairs(p, row, H, i_h, o_c, tokens):
    """The matrices at the tokens ``row + o_c`` on a diagonal of their blocks: ``[ROWS, ROWS]``."""
    at = p + row * H * SUB + i_h * SUB + o_c[:, None] * H * SUB + o_c[None, :] % SUB
    mask = (o_c[:, None] // SUB == o_c[None, :] // SUB) & (o_c < tokens)[:, None]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["T", "S"])
def gradients_kernel(
    p_q, p_k, p_w, p_z, p_log, p_beta, p_grad_o, p_states, p_grad_states, p_grad_scores, p_grad_near, p_grad_q,
    p_grad_k, p_grad_log, p_cu, T, S, G, H, K, V, scale, size_qk, size_log,
    DECAY: tl.constexpr, FINE: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Writes what one head gives its queries, keys and decays, BK columns of ROWS tokens.

    From the states kept on both sides those at every chunk are found again, a row of the state from that row alone. A
    tile of BV values is multiplied for all ROWS tokens with those of the other chunks zero.
    """
    KIND: tl.constexpr = p_q.dtype.element_ty
    columns = tl.cdiv(K, BK)
    index = tl.program_id(0)
    i_k = index % columns
    o_k = i_k * BK + tl.arange(0, BK)
    i_h = index // columns % H
    _, i_c, n_slots, start, length, chunk, _ = locate(index // (columns * H), p_cu, T, S, ROWS, ROWS)
    m = tl.minimum(length - i_c * ROWS, ROWS)
    if (i_c < n_slots) & (m > 0):
        o_c = tl.arange(0, ROWS)
        block, place = o_c // SUB, o_c % SUB
        row = start + i_c * ROWS
        at = (chunk + i_c) * H + i_h
        p_q += i_h // (H // G) * K
        p_k += i_h // (H // G) * K
        q = load_tile(p_q, row, G * K, o_c, m, o_k, K).to(tl.float32)
        key = load_tile(p_k, row, G * K, o_c, m, o_k, K).to(tl.float32)
        beta = load_beta(p_beta, row, H, i_h, o_c, m)[:, None]
        # the last of a chunk has nothing behind it
        last = tl.where(place + 1 < SUB, o_c, m)
        if DECAY == "key":
            log = load_tile(p_log + i_h * K, row, H * K, o_c, m, o_k, K).to(tl.float32)
            after = load_tile(p_log + i_h * K, row + 1, H * K, last, m - 1, o_k, K).to(tl.float32)
            reach, rest = exp(columns_in_blocks(log, ROWS, BK)), exp(suffix_in_blocks(after, ROWS, BK))
        elif DECAY == "token":
            log = tl.load(p_log + (row + o_c) * H + i_h, mask=o_c < m, other=0.0).to(tl.float32)[:, None]
            after = tl.load(p_log + (row + 1 + o_c) * H + i_h, mask=last < m - 1, other=0.0).to(tl.float32)
            reach = exp(in_blocks(tl.reshape(log, (ROWS,)), ROWS, False))[:, None]
            rest = exp(in_blocks(after, ROWS, True))[:, None]
        else:
            log = tl.zeros((ROWS, 1), tl.float32)
            reach = log + 1.0
            rest = log + 1.0
        reading = tl.trans(q * reach * scale)
        recalling = tl.trans(-key * reach * beta)
        writing = tl.trans(key * rest * beta)
        grad_q = tl.zeros((ROWS, BK), tl.float32)
        recalled = tl.zeros((ROWS, BK), tl.float32)
        grad_k = tl.zeros((ROWS, BK), tl.float32)
        across = tl.zeros((ROWS, BK if DECAY == "key" else 1), tl.float32)
        n = tl.cdiv(m, SUB)
        for v in tl.range(0, V, BV, disable_licm=True):
            o_v = v + tl.arange(0, BV)
            kept = load_state(p_states, at, K, V, o_k, o_v).to(tl.float32)
            grad_state = load_state(p_grad_states, at, K, V, o_k, o_v).to(tl.float32)
            for i in tl.range(0, n, disable_licm=True):
                c = n - 1 - i
                state = kept
                for j in tl.range(0, c, disable_licm=True):
                    w = load_tile(p_w + i_h * V, row, H * V, tl.where(block == j, o_c, -1), m, o_v, V)
                    if DECAY != "none":
                        state *= exp(tl.sum(tl.where((block == j)[:, None], log, 0.0), axis=0))[:, None]
                    state = product(writing, w, state, KIND, FINE)
                o_m = tl.where(block == c, o_c, -1)
                grad_o = load_tile(p_grad_o + i_h * V, row, H * V, o_m, m, o_v, V)
                w = load_tile(p_w + i_h * V, row, H * V, o_m, m, o_v, V)
                z = load_tile(p_z + i_h * V, row, H * V, o_m, m, o_v, V)
                grad_q = product(grad_o, tl.trans(state), grad_q, KIND, FINE)
                recalled = product(z, tl.trans(state), recalled, KIND, FINE)
                grad_k = product(w, tl.trans(grad_state), grad_k, KIND, FINE)
                if DECAY != "none":
                    whole = exp(tl.sum(tl.where((block == c)[:, None], log, 0.0), axis=0))
                    grad_state *= whole[:, None]
                    both = tl.sum(state * grad_state, axis=1)
                    if DECAY == "token":
                        both = tl.sum(both, axis=0, keep_dims=True)
                    across += tl.where((block == c)[:, None], both[None, :], 0.0)
                grad_state = product(reading, grad_o, grad_state, KIND, FINE)
                grad_state = product(recalling, z, grad_state, KIND, FINE)
        # not kept through the loop, which needs the registers
        q = load_tile(p_q, row, G * K, o_c, m, o_k, K).to(tl.float32)
        key = load_tile(p_k, row, G * K, o_c, m, o_k, K).to(tl.float32)
        grad_q *= reach * scale
        recalled *= -reach * beta
        grad_k *= rest * beta
        if DECAY != "none":
            same = block[:, None] == block[None, :]
            until = ones(same & (o_c[:, None] <= o_c[None, :]), KIND)
            grad = product(until, q * grad_q + key * recalled, tl.zeros((ROWS, BK), tl.float32), KIND, FINE)
            grad = product(ones(same & (o_c[:, None] > o_c[None, :]), KIND), key * grad_k, grad, KIND, FINE)
        if DECAY == "key":
            p_pairs = row * H * SUB + i_h * SUB + o_c * H * SUB
            between = tl.zeros((ROWS, BK), tl.float32)
            for i in range(SUB):
                j = SUB - 1 - i
                at_j = block * SUB + j
                one = load_tile(p_k, row, G * K, at_j, m, o_k, K).to(tl.float32)
                step = load_tile(p_log + i_h * K, row, H * K, at_j + 1, tl.where(j + 1 < SUB, m, 0), o_k, K)
                between = tl.where((place > j)[:, None], between + step.to(tl.float32), 0.0)
                left = tl.where((place >= j)[:, None], exp(between), 0.0)
                of_q = tl.load(p_grad_scores + p_pairs + j, mask=o_c < m, other=0.0)[:, None] * left
                of_k = tl.load(p_grad_near + p_pairs + j, mask=o_c < m, other=0.0)[:, None] * left
                grad_q += of_q * one
                recalled += of_k * one
                reached = suffix_in_blocks(of_q * q + of_k * key, ROWS, BK)
                grad_k += tl.where((place == j)[:, None], reached, 0.0)
                grad += tl.where((place > j)[:, None], reached * one, 0.0)
            store_tile(p_grad_log + i_h * K, row, H * K, o_c, m, o_k, K, grad + across)
        else:
            nothing = tl.zeros((ROWS, ROWS), tl.float32)
            of_q = load_pairs(p_grad_scores, row, H, i_h, o_c, m)
            of_k = load_pairs(p_grad_near, row, H, i_h, o_c, m)
            if DECAY == "token":
                between = pair_decay(p_log, row, H, i_h, o_c, m, DECAY, False)
                of_q *= between
                of_k *= between
                shares = of_q * product(q, tl.trans(key), nothing, KIND, FINE)
                shares += of_k * product(key, tl.trans(key), nothing, KIND, FINE)
                # [i, t]: what i met before t
                behind = product(shares, ones(o_c[:, None] < o_c[None, :], KIND), nothing, KIND, FINE)
                behind = tl.where(same & (o_c[:, None] >= o_c[None, :]), behind, 0.0)
                total = tl.sum(behind, axis=0) + tl.sum(grad, axis=1) + tl.sum(across, axis=1)
                share = p_grad_log + i_k.to(tl.int64) * size_log
                tl.store(share + (row + o_c) * H + i_h, total, mask=o_c < m)
            grad_q = product(of_q, key, grad_q, KIND, FINE)
            recalled = product(of_k, key, recalled, KIND, FINE)
            grad_k = product(tl.trans(of_q), q, grad_k, KIND, FINE)
            grad_k = product(tl.trans(of_k), key, grad_k, KIND, FINE)
        share = (i_h % (H // G)).to(tl.int64) * size_qk + i_h // (H // G) * K
        store_tile(p_grad_q + share, row, G * K, o_c, m, o_k, K, grad_q)
        store_tile(p_grad_k + share, row, G * K, o_c, m, o_k, K, grad_k + recalled)
