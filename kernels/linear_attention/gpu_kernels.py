"""The Triton kernels of ``linear_attention``: states between chunks, then all chunks at once.

With g the cumulative sum of the logarithms inside a chunk of C tokens, S the state that enters it and dS the gradient
of the one that leaves it::

    S_out = exp(g_C) S + sum_j exp(g_C - g_j) k_j v_j^T          dS_in = exp(g_C) dS + scale sum_i exp(g_i) q_i do_i^T
    o_i   = scale (exp(g_i) q_i S + sum_{j<=i} exp(g_i - g_j) (q_i k_j) v_j)

and the gradient of the logarithm at t sums, of every pair that the factor at t lies between, the product of both sides:
entering state or key j < t, leaving state or query i >= t. Those are sums only, of pairs inside the chunk too: the
cumulative sum of ``q dq - k dk`` would cancel.

A launch finds the states (S from the first chunk to the last, dS from the last to the first, side by side), one tile of
the matrix a program; where these are too few, each sequence is cut into segments that a first launch summarises. Every
other launch gives a chunk of a head, or of a group of heads, to a program. A chunk never crosses a boundary.
"""

# Triton takes a condition on constants and one on values apart; a kernel is one function however long
# ruff: noqa: C901, SIM102

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
    store_state,
    store_tile,
    suffix_in_blocks,
)
from seqzoo.kernels.linear_scan.gpu_kernels import locate


@triton.jit
def walk(
    p_a, p_b, p_log, p_from, p_states, p_to, p_factors, p_addends, slot, n_slots, i_h, o_k, o_v, p_cu,
    T, S, G, H, K, V, scale, segment,
    DECAY: tl.constexpr, ADJOINT: tl.constexpr, SUMMARY: tl.constexpr, CUT: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Takes one tile of a head's state through the chunks of a segment, or with ADJOINT its gradient back.

    SUMMARY: from zero, and only its end and the product of its factors are written. Otherwise, where segments are CUT,
    from what the summaries of the segments before make of the state at ``p_from``, and the value before each chunk goes
    to ``p_states`` unless that is None.
    """
    KIND: tl.constexpr = p_a.dtype.element_ty
    i_s, i_g, n_segments, start, length, chunk, _ = locate(slot, p_cu, T, S, segment, C)
    needed = i_g < n_segments
    if SUMMARY:
        needed = (i_g > 0) & needed if ADJOINT else i_g + 1 < n_segments
    if needed:
        # small contributions first: those that decay most
        o_c = C - 1 - tl.arange(0, C) if ADJOINT else tl.arange(0, C)
        p_a += i_h // (H // G) * K
        p_b += i_h * V
        x = tl.zeros((BK, BV), tl.float32)
        passed = tl.zeros((BK,), tl.float32)
        if p_from is not None and not SUMMARY:
            x += load_state(p_from, i_s.to(tl.int64) * H + i_h, K, V, o_k, o_v)
        if CUT and not SUMMARY:
            base = (slot - i_g).to(tl.int64) + (n_slots if ADJOINT else 0)
            for i in range(n_segments - 1 - i_g if ADJOINT else i_g):
                at = (base + (n_segments - 1 - i if ADJOINT else i)) * H + i_h
                if DECAY == "key":
                    x *= tl.load(p_factors + at * K + o_k, mask=o_k < K, other=0.0)[:, None]
                elif DECAY != "none":
                    x *= tl.load(p_factors + at)
                x += load_state(p_addends, at, K, V, o_k, o_v)
        n = tl.minimum(length - i_g * segment, segment)
        first = start + i_g * segment
        n_chunks = tl.cdiv(n, C)
        for c in range(n_chunks):
            i_c = n_chunks - 1 - c if ADJOINT else c
            row = first + i_c * C
            m = tl.minimum(n - i_c * C, C)
            if p_states is not None and not SUMMARY:
                store_state(p_states, (chunk + i_g * (segment // C) + i_c) * H + i_h, K, V, o_k, o_v, x)
            a = load_across(p_a, row, G * K, o_c, m, o_k, K)  # [BK, C]
            b = load_tile(p_b, row, H * V, o_c, m, o_v, V)  # [C, BV]
            if DECAY == "none":
                if ADJOINT:
                    x += scale * product(a, b, tl.zeros((BK, BV), tl.float32), KIND, True)
                else:
                    x = product(a, b, x, KIND, True)
            elif DECAY == "key":
                p_key = p_log + i_h * K
                log = load_across(p_key, row, H * K, o_c, m, o_k, K).to(tl.float32)
                total = tl.sum(log, axis=1)
                if ADJOINT:
                    weight = exp(tl.cumsum(log, axis=1, reverse=True)) * scale
                else:
                    after = load_across(p_key, row + 1, H * K, o_c, m - 1, o_k, K).to(tl.float32)
                    weight = exp(tl.cumsum(after, axis=1, reverse=True))
                x *= exp(total)[:, None]
                x = product(a.to(tl.float32) * weight, b, x, KIND, True)
                passed += total
            else:
                until, total = log_until(p_log, row, H, i_h, o_c, m, DECAY, ADJOINT)
                weight = exp(until) * scale if ADJOINT else exp(log_behind(p_log, row, H, i_h, o_c, m, DECAY))
                x *= exp(total)
                x = product(a, b.to(tl.float32) * weight[:, None], x, KIND, True)
                passed += total
        if SUMMARY:
            at = (slot.to(tl.int64) + (n_slots if ADJOINT else 0)) * H + i_h
            store_state(p_addends, at, K, V, o_k, o_v, x)
            # every column of tiles finds the same factors
            is_first = tl.min(o_v, axis=0) == 0
            if DECAY == "key":
                tl.store(p_factors + at * K + o_k, exp(passed), mask=o_k < tl.where(is_first, K, 0))
            elif DECAY != "none":
                tl.store(p_factors + at + o_k, exp(passed), mask=o_k < tl.where(is_first, 1, 0))
        elif p_to is not None:
            if i_g == (0 if ADJOINT else n_segments - 1):
                store_state(p_to, i_s.to(tl.int64) * H + i_h, K, V, o_k, o_v, x)


@triton.jit(do_not_specialize=["T", "S", "segment", "n_slots"])
def states_kernel(
    p_q, p_k, p_v, p_log, p_grad_o, p_initial, p_grad_final, p_states, p_grad_states, p_final, p_grad_initial,
    p_factors, p_addends, p_cu, T, S, G, H, K, V, scale, segment, n_slots,
    DECAY: tl.constexpr, SUMMARY: tl.constexpr, CUT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Writes the states that enter the chunks and, in the grid's second row, the gradients of those that leave them."""
    columns, rows = tl.cdiv(V, BV), tl.cdiv(K, BK)
    index = tl.program_id(0)
    o_v = index % columns * BV + tl.arange(0, BV)
    o_k = index // columns % rows * BK + tl.arange(0, BK)
    i_h = index // (columns * rows) % H
    slot = index // (columns * rows * H)
    if tl.program_id(1) == 0:
        walk(
            p_k, p_v, p_log, p_initial, p_states, p_final, p_factors, p_addends, slot, n_slots, i_h, o_k, o_v, p_cu,
            T, S, G, H, K, V, scale, segment, DECAY, False, SUMMARY, CUT, C, BK, BV,
        )  # fmt: skip
    elif p_grad_o is not None:
        walk(
            p_q, p_grad_o, p_log, p_grad_final, p_grad_states, p_grad_initial, p_factors, p_addends, slot, n_slots,
            i_h, o_k, o_v, p_cu, T, S, G, H, K, V, scale, segment, DECAY, True, SUMMARY, CUT, C, BK, BV,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "S"])
def output_kernel(
    p_q, p_k, p_v, p_log, p_states, p_scores, p_o, p_cu, T, S, G, H, K, V, scale,
    DECAY: tl.constexpr, CAUSAL: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Writes the outputs of a chunk of one head, BV columns of them.

    ``p_states`` holds the states that enter the chunks or, when not CAUSAL, those of whole sequences.
    """
    KIND: tl.constexpr = p_q.dtype.element_ty
    columns = tl.cdiv(V, BV)
    index = tl.program_id(0)
    o_v = index % columns * BV + tl.arange(0, BV)
    i_h = index // columns % H
    i_s, i_c, n_chunks, start, length, chunk, _ = locate(index // (columns * H), p_cu, T, S, C, C)
    m = tl.minimum(length - i_c * C, C)
    if (i_c < n_chunks) & (m > 0):
        o_c = tl.arange(0, C)
        row = start + i_c * C
        at = (chunk + i_c if CAUSAL else i_s.to(tl.int64)) * H + i_h
        p_q += i_h // (H // G) * K
        p_k += i_h // (H // G) * K
        o = tl.zeros((C, BV), tl.float32)
        scores = tl.zeros((C, C), tl.float32)
        for k in range(0, K, BK):
            o_k = k + tl.arange(0, BK)
            q = load_tile(p_q, row, G * K, o_c, m, o_k, K)
            if DECAY == "key":
                log = load_tile(p_log + i_h * K, row, H * K, o_c, m, o_k, K).to(tl.float32)
                q = q.to(tl.float32) * exp(tl.cumsum(log, axis=0))
            elif CAUSAL:
                scores = product(q, load_across(p_k, row, G * K, o_c, m, o_k, K), scores, KIND, False)
            o = product(q, load_state(p_states, at, K, V, o_k, o_v), o, KIND, False)
        if CAUSAL:
            v = load_tile(p_v + i_h * V, row, H * V, o_c, m, o_v, V)
            if DECAY == "key":
                scores = tl.load(p_scores + at * C * C + o_c[:, None] * C + o_c[None, :])
            elif DECAY == "none":
                scores = tl.where(o_c[:, None] >= o_c[None, :], scores, 0.0)
            else:
                o *= exp(log_until(p_log, row, H, i_h, o_c, m, DECAY, False)[0])[:, None]
                scores *= pair_decay(p_log, row, H, i_h, o_c, m, DECAY, False)
            o = product(scores, v, o, KIND, False)
        store_tile(p_o + i_h * V, row, H * V, o_c, m, o_v, V, o * scale)


@triton.jit(do_not_specialize=["T", "S"])
def grad_v_kernel(
    p_q, p_k, p_grad_o, p_log, p_grad_states, p_scores, p_grad_v, p_cu, T, S, G, H, K, V, scale,
    DECAY: tl.constexpr, CAUSAL: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the values of a chunk of one head, BV columns of it.

    ``p_grad_states`` holds the gradients of the states that leave the chunks or, when not CAUSAL, of whole sequences.
    """
    KIND: tl.constexpr = p_q.dtype.element_ty
    columns = tl.cdiv(V, BV)
    index = tl.program_id(0)
    o_v = index % columns * BV + tl.arange(0, BV)
    i_h = index // columns % H
    i_s, i_c, n_chunks, start, length, chunk, _ = locate(index // (columns * H), p_cu, T, S, C, C)
    m = tl.minimum(length - i_c * C, C)
    if (i_c < n_chunks) & (m > 0):
        o_c = tl.arange(0, C)
        row = start + i_c * C
        at = (chunk + i_c if CAUSAL else i_s.to(tl.int64)) * H + i_h
        p_q += i_h // (H // G) * K
        p_k += i_h // (H // G) * K
        grad = tl.zeros((C, BV), tl.float32)
        scores = tl.zeros((C, C), tl.float32)  # of the key j and the query i, [j, i]
        for k in range(0, K, BK):
            o_k = k + tl.arange(0, BK)
            key = load_tile(p_k, row, G * K, o_c, m, o_k, K)
            if DECAY == "key":
                after = load_tile(p_log + i_h * K, row + 1, H * K, o_c, m - 1, o_k, K).to(tl.float32)
                key = key.to(tl.float32) * exp(tl.cumsum(after, axis=0, reverse=True))
            elif CAUSAL:
                scores = product(key, load_across(p_q, row, G * K, o_c, m, o_k, K), scores, KIND, False)
            grad = product(key, load_state(p_grad_states, at, K, V, o_k, o_v), grad, KIND, False)
        if CAUSAL:
            grad_o = load_tile(p_grad_o + i_h * V, row, H * V, o_c, m, o_v, V)
            if DECAY == "key":
                scores = tl.load(p_scores + at * C * C + o_c[:, None] + o_c[None, :] * C).to(tl.float32)
            elif DECAY == "none":
                scores = tl.where(o_c[None, :] >= o_c[:, None], scores, 0.0)
            else:
                grad *= exp(log_behind(p_log, row, H, i_h, o_c, m, DECAY))[:, None]
                scores *= pair_decay(p_log, row, H, i_h, o_c, m, DECAY, True)
            grad = product(scores * scale, grad_o, grad, KIND, False)
        store_tile(p_grad_v + i_h * V, row, H * V, o_c, m, o_v, V, grad)


@triton.jit(do_not_specialize=["T", "S"])
def grad_qk_kernel(
    p_q, p_k, p_v, p_log, p_grad_o, p_states, p_grad_states, p_grad_q, p_grad_k, p_grad_log, p_cu,
    T, S, G, H, K, V, scale, size_qk, size_log,
    DECAY: tl.constexpr, CAUSAL: tl.constexpr, FINE: tl.constexpr, HEADS: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Writes what HEADS heads of a group give its queries, its keys, BK columns of them, and the decay's gradient.

    A group's heads see the same queries and keys, so their pairs add up before they meet them. A share of
    ``p_grad_log`` belongs to each block of BK columns, one of ``p_grad_q`` and ``p_grad_k`` to each HEADS heads.
    """
    KIND: tl.constexpr = p_q.dtype.element_ty
    columns, parts = tl.cdiv(K, BK), H // G // HEADS
    index = tl.program_id(0)
    i_k = index % columns
    o_k = i_k * BK + tl.arange(0, BK)
    part = index // columns % parts
    group = index // (columns * parts) % G
    slot = index // (columns * parts * G)
    i_s, i_c, n_chunks, start, length, chunk, _ = locate(slot, p_cu, T, S, C, C)
    m = tl.where(i_c < n_chunks, tl.minimum(length - i_c * C, C), 0)
    if DECAY == "head":
        if m <= 0:
            # a slot without tokens has a share of a fixed decay too
            for i in range(HEADS):
                i_h = group * (H // G) + part * HEADS + i
                tl.store(p_grad_log + i_k.to(tl.int64) * size_log + slot.to(tl.int64) * H + i_h, 0.0)
    if m > 0:
        o_c = tl.arange(0, C)
        row = start + i_c * C
        p_q += group * K
        p_k += group * K
        q = load_tile(p_q, row, G * K, o_c, m, o_k, K)
        key = load_tile(p_k, row, G * K, o_c, m, o_k, K)
        scores = tl.zeros((C, C), tl.float32)
        if DECAY != "none" and i_k == 0:
            for k in range(0, K, BK):
                o_j = k + tl.arange(0, BK)
                scores = product(
                    load_tile(p_q, row, G * K, o_c, m, o_j, K), load_across(p_k, row, G * K, o_c, m, o_j, K),
                    scores, KIND, True,
                )  # fmt: skip
        pairs = tl.zeros((C, C), tl.float32)
        grad_q = tl.zeros((C, BK), tl.float32)
        grad_k = tl.zeros((C, BK), tl.float32)
        # what every head computes anew, kept for all of them, would not fit the registers
        for i in tl.range(0, HEADS, disable_licm=True):
            i_h = group * (H // G) + part * HEADS + i
            at = (chunk + i_c if CAUSAL else i_s.to(tl.int64)) * H + i_h
            met = tl.zeros((C, C), tl.float32)
            entering = tl.zeros((C, BK), tl.float32)
            leaving = tl.zeros((C, BK), tl.float32)
            across = 0.0
            for v in tl.range(0, V, BV, disable_licm=True):
                o_v = v + tl.arange(0, BV)
                grad_o = load_tile(p_grad_o + i_h * V, row, H * V, o_c, m, o_v, V)
                value = load_tile(p_v + i_h * V, row, H * V, o_c, m, o_v, V)
                state = load_state(p_states, at, K, V, o_k, o_v)
                grad_state = load_state(p_grad_states, at, K, V, o_k, o_v)
                if CAUSAL:
                    met = product(grad_o, tl.trans(value), met, KIND, True)
                entering = product(grad_o, tl.trans(state), entering, KIND, FINE)
                leaving = product(value, tl.trans(grad_state), leaving, KIND, FINE)
                if DECAY != "none":
                    both = state.to(tl.float32) * grad_state.to(tl.float32)
                    across += tl.sum(tl.sum(both, axis=1), axis=0)
            entering *= scale
            met *= scale
            if DECAY == "none":
                met = tl.where(o_c[:, None] >= o_c[None, :], met, 0.0)
            else:
                until, total = log_until(p_log, row, H, i_h, o_c, m, DECAY, False)
                entering *= exp(until)[:, None]
                leaving *= exp(log_behind(p_log, row, H, i_h, o_c, m, DECAY))[:, None]
                met *= pair_decay(p_log, row, H, i_h, o_c, m, DECAY, False)
                # [i, t]: what query i meets up to t, the entering state included, which the factor at t + 1 lies behind
                behind = tl.zeros((C, C), tl.float32)
                if i_k == 0:
                    behind = tl.cumsum(met * scores, axis=1)
                enters = tl.sum(q.to(tl.float32) * entering, axis=1)
                ahead = tl.sum(key.to(tl.float32) * leaving, axis=1)
                across *= exp(total)
                later = o_c[:, None] > o_c[None, :]
                grad = tl.sum(tl.where(later, behind + enters[:, None], ahead[:, None]), axis=0) + across
                first = tl.sum(enters, axis=0) + across
                p_share = p_grad_log + i_k.to(tl.int64) * size_log
                if DECAY == "head":
                    grad = tl.sum(tl.where(o_c + 1 < m, grad, 0.0), axis=0)
                    tl.store(p_share + slot.to(tl.int64) * H + i_h, grad + first)
                else:
                    tl.store(p_share + row * H + i_h, first)
                    tl.store(p_share + (row + 1 + o_c) * H + i_h, grad, mask=o_c + 1 < m)
            pairs += met
            grad_q += entering
            grad_k += leaving
        if CAUSAL:
            grad_q = product(pairs, key, grad_q, KIND, False)
            grad_k = product(tl.trans(pairs), q, grad_k, KIND, False)
        share = part.to(tl.int64) * size_qk + group * K
        store_tile(p_grad_q + share, row, G * K, o_c, m, o_k, K, grad_q)
        store_tile(p_grad_k + share, row, G * K, o_c, m, o_k, K, grad_k)


@triton.jit(do_not_specialize=["T", "S"])
def scores_kernel(
    p_q, p_k, p_v, p_log, p_grad_o, p_scores, p_grad_scores, p_cu, T, S, G, H, K, V, scale,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Writes SUB rows of the scores under a decay for each key, ``sum_k q_ik k_jk exp(g_ik - g_jk)``, and the gradient.

    Keys of earlier secondary chunks meet the queries at the first token of theirs: each side decays towards it, so that
    no exponent is positive, and the sum is a product of matrices. Inside a secondary chunk it is taken as it stands.
    """
    KIND: tl.constexpr = p_q.dtype.element_ty
    index = tl.program_id(0)
    first = index % (C // SUB) * SUB
    i_h = index // (C // SUB) % H
    _, i_c, n_chunks, start, length, chunk, _ = locate(index // (C // SUB * H), p_cu, T, S, C, C)
    m = tl.minimum(length - i_c * C, C)
    if (i_c < n_chunks) & (m > 0):
        o_c, o_i = tl.arange(0, C), tl.arange(0, SUB)
        row = start + i_c * C
        at = (chunk + i_c) * H + i_h
        p_q += i_h // (H // G) * K
        p_k += i_h // (H // G) * K
        p_log += i_h * K
        earlier = tl.zeros((SUB, C), tl.float32)
        own = tl.zeros((SUB, SUB), tl.float32)
        for k in range(0, K, BK):
            o_k = k + tl.arange(0, BK)
            q = load_tile(p_q, row + first, G * K, o_i, m - first, o_k, K).to(tl.float32)
            log = load_tile(p_log, row + first, H * K, o_i, m - first, o_k, K).to(tl.float32)
            key = load_across(p_k, row, G * K, o_c, tl.minimum(first, m), o_k, K).to(tl.float32)
            after = load_across(p_log, row + 1, H * K, o_c, tl.minimum(first, m) - 1, o_k, K).to(tl.float32)
            earlier = product(
                q * exp(tl.cumsum(log, axis=0)), key * exp(tl.cumsum(after, axis=1, reverse=True)),
                earlier, KIND, False,
            )  # fmt: skip
            one = load_tile(p_k, row + first, G * K, o_i, m - first, o_k, K).to(tl.float32)
            between = pair_logs(log)  # [i, j, BK]
            own += tl.sum(q[:, None, :] * one[None, :, :] * exp(between), axis=2)
        p_row = p_scores + at * C * C + (first + o_i)[:, None] * C
        tl.store(p_row + o_c[None, :], earlier, mask=(o_c // SUB * SUB != first)[None, :] & (o_i >= 0)[:, None])
        tl.store(p_row + first + o_i[None, :], own)
        if p_grad_o is not None:
            grad = tl.zeros((SUB, C), tl.float32)
            for v in range(0, V, BV):
                o_v = v + tl.arange(0, BV)
                grad_o = load_tile(p_grad_o + i_h * V, row + first, H * V, o_i, m - first, o_v, V)
                value = load_across(p_v + i_h * V, row, H * V, o_c, m, o_v, V)
                grad = product(grad_o, value, grad, KIND, True)
            grad = tl.where(o_c[None, :] <= (first + o_i)[:, None], grad * scale, 0.0)
            tl.store(p_grad_scores + at * C * C + (first + o_i)[:, None] * C + o_c[None, :], grad)


@triton.jit(do_not_specialize=["T", "S"])
def grad_key_kernel(
    p_q, p_k, p_v, p_log, p_grad_o, p_states, p_grad_states, p_grad_scores, p_grad_q, p_grad_k, p_grad_log, p_cu,
    T, S, G, H, K, V, scale, size_qk,
    FINE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Writes what one head gives its queries, keys and the decay of each key, BK columns of a chunk.

    Of the pairs that the factor at t lies between, those with a key before the secondary chunk of t meet at its first
    token; those with a key in it and a query behind it at the first token behind it; the rest is inside it.
    """
    KIND: tl.constexpr = p_q.dtype.element_ty
    columns = tl.cdiv(K, BK)
    index = tl.program_id(0)
    o_k = index % columns * BK + tl.arange(0, BK)
    i_h = index // columns % H
    _, i_c, n_chunks, start, length, chunk, _ = locate(index // (columns * H), p_cu, T, S, C, C)
    m = tl.minimum(length - i_c * C, C)
    if (i_c < n_chunks) & (m > 0):
        o_c = tl.arange(0, C)
        block, place = o_c // SUB, o_c % SUB
        row = start + i_c * C
        at = (chunk + i_c) * H + i_h
        p_q += i_h // (H // G) * K
        p_k += i_h // (H // G) * K
        p_log += i_h * K
        grad_q = tl.zeros((C, BK), tl.float32)
        grad_k = tl.zeros((C, BK), tl.float32)
        across = tl.zeros((BK,), tl.float32)
        for v in range(0, V, BV):
            o_v = v + tl.arange(0, BV)
            grad_o = load_tile(p_grad_o + i_h * V, row, H * V, o_c, m, o_v, V)
            value = load_tile(p_v + i_h * V, row, H * V, o_c, m, o_v, V)
            state = load_state(p_states, at, K, V, o_k, o_v)
            grad_state = load_state(p_grad_states, at, K, V, o_k, o_v)
            grad_q = product(grad_o, tl.trans(state), grad_q, KIND, FINE)
            grad_k = product(value, tl.trans(grad_state), grad_k, KIND, FINE)
            across += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), axis=1)
        q = load_tile(p_q, row, G * K, o_c, m, o_k, K).to(tl.float32)
        key = load_tile(p_k, row, G * K, o_c, m, o_k, K).to(tl.float32)
        log = load_tile(p_log, row, H * K, o_c, m, o_k, K).to(tl.float32)
        after = load_tile(p_log, row + 1, H * K, o_c, m - 1, o_k, K).to(tl.float32)
        grad_q *= exp(tl.cumsum(log, axis=0)) * scale
        grad_k *= exp(tl.cumsum(after, axis=0, reverse=True))
        grad = (across * exp(tl.sum(log, axis=0)))[None, :] + tl.zeros((C, BK), tl.float32)
        grad = product(ones(o_c[:, None] <= o_c[None, :], KIND), q * grad_q, grad, KIND, FINE)
        grad = product(ones(o_c[:, None] > o_c[None, :], KIND), key * grad_k, grad, KIND, FINE)
        p_pairs = p_grad_scores + at * C * C
        pairs = tl.load(p_pairs + o_c[:, None] * C + o_c[None, :])
        # what keys have met in later secondary chunks
        later = tl.zeros((C, BK), tl.float32)
        nothing = tl.zeros((C, BK), tl.float32)
        for a in tl.static_range(1, C // SUB):
            first = a * SUB
            q_weight = exp(tl.cumsum(tl.where((o_c >= first)[:, None], log, 0.0), axis=0))
            k_weight = tl.cumsum(tl.where((o_c + 1 < first)[:, None], after, 0.0), axis=0, reverse=True)
            k_weight = tl.where((o_c < first)[:, None], exp(k_weight), 0.0)
            entering = product(pairs, key * k_weight, nothing, KIND, FINE)
            entering *= tl.where((o_c >= first)[:, None], q_weight, 0.0)
            grad_q += tl.where((block == a)[:, None], entering, 0.0)
            own = ones((o_c[:, None] <= o_c[None, :]) & (block == a)[:, None], KIND)
            grad = product(own, q * entering, grad, KIND, FINE)
            reached = tl.where((o_c >= first)[:, None], q * q_weight, 0.0)
            leaving = product(tl.trans(pairs), reached, nothing, KIND, FINE) * k_weight
            later += tl.where((block == a - 1)[:, None], leaving, 0.0)
        grad_k += later
        own = ones((o_c[:, None] > o_c[None, :]) & (block[:, None] == block[None, :]), KIND)
        grad = product(own, key * later, grad, KIND, FINE)
        between = tl.zeros((C, BK), tl.float32)
        for i in range(SUB):
            j = SUB - 1 - i
            at_j = block * SUB + j
            one = load_tile(p_k, row, G * K, at_j, m, o_k, K).to(tl.float32)
            last = tl.where(j + 1 < SUB, m, 0)
            step = load_tile(p_log, row, H * K, at_j + 1, last, o_k, K).to(tl.float32)
            between = tl.where((place > j)[:, None], between + step, 0.0)
            pair = tl.load(p_pairs + o_c * C + at_j).to(tl.float32)
            pair = tl.where((place >= j)[:, None], pair[:, None] * exp(between), 0.0)
            grad_q += pair * one
            reached = suffix_in_blocks(pair * q, C, BK)
            grad_k += tl.where((place == j)[:, None], reached, 0.0)
            grad += tl.where((place > j)[:, None], reached * one, 0.0)
        share = (i_h % (H // G)).to(tl.int64) * size_qk + i_h // (H // G) * K
        store_tile(p_grad_q + share, row, G * K, o_c, m, o_k, K, grad_q)
        store_tile(p_grad_k + share, row, G * K, o_c, m, o_k, K, grad_k)
        store_tile(p_grad_log + i_h * K, row, H * K, o_c, m, o_k, K, grad)


@triton.jit
def sum_shares(p_shares, p_total, n_shares, size, BN: tl.constexpr, BP: tl.constexpr):
    """Writes BN sums over shares ``(n_shares, size)``."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_p = tl.arange(0, BP)
    total = tl.zeros((BP, BN), tl.float32)
    for first in range(0, n_shares, BP):
        at = first + o_p
        mask = (at < n_shares)[:, None] & (o_n < size)[None, :]
        total += tl.load(p_shares + at.to(tl.int64)[:, None] * size + o_n[None, :], mask=mask, other=0.0)
    tl.store(p_total + o_n, tl.sum(total, axis=0), mask=o_n < size)


@triton.jit(do_not_specialize=["n_parts", "n_shares", "size_qk", "size_log"])
def shares_kernel(
    p_shares_q, p_shares_k, p_shares_log, p_grad_q, p_grad_k, p_grad_log, n_parts, n_shares, size_qk, size_log,
    BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Adds up the shares of the gradients: of heads for q and k, of columns or chunks for the decay, unless None."""
    which = tl.program_id(1)
    if p_shares_q is not None:
        if which == 0:
            sum_shares(p_shares_q, p_grad_q, n_parts, size_qk, BN, BP)
        if which == 1:
            sum_shares(p_shares_k, p_grad_k, n_parts, size_qk, BN, BP)
    if p_shares_log is not None:
        if which == 2:
            sum_shares(p_shares_log, p_grad_log, n_shares, size_log, BN, BP)
