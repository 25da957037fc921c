"""The Triton kernels of ``causal_conv``.

A program owns ``BD`` channels of one segment of one sequence and walks it serially, the last W - 1 inputs in registers;
a channel lives in one thread, so nothing is exchanged between threads and no input is read twice but the W - 1 around
the cut between two segments. ``ROWS`` tokens are loaded before the first is used.
"""

# Triton takes neither a starred expression nor a value that only one branch would return
# ruff: noqa: RUF005

import triton
import triton.language as tl

from seqzoo.kernels.linear_scan.gpu_blocks import load_rows, load_state, sigmoids
from seqzoo.kernels.linear_scan.gpu_kernels import locate


@triton.jit
def load_taps(p_weight, p_bias, D, o_d, DTYPE: tl.constexpr, W: tl.constexpr):
    """The weights, the oldest input's first, and behind them the bias."""
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.load(p_weight + o_d.to(tl.int64) * W + j, mask=o_d < D, other=0.0).to(DTYPE),)
    bias = tl.zeros_like(taps[0])
    if p_bias is not None:
        bias = load_state(p_bias, 0, D, o_d, False)[0].to(DTYPE)
    return taps + (bias,)


@triton.jit
def load_input(p_x, p_initial, i_s, start, position, D, o_d, W: tl.constexpr):
    """The input at a position of a sequence; the state's before the first token."""
    value = tl.load(p_x + (start + position) * D + o_d, mask=o_d < tl.where(position >= 0, D, 0), other=0.0)
    if p_initial is not None:
        early = o_d < tl.where(position < 0, D, 0)
        row = i_s.to(tl.int64) * (W - 1) + W - 1 + position
        value = tl.where(early, tl.load(p_initial + row * D + o_d, mask=early, other=0.0), value)
    return value


@triton.jit
def load_window(p_x, p_initial, i_s, start, position, D, o_d, DTYPE: tl.constexpr, W: tl.constexpr):
    """The W - 1 inputs before a position of a sequence, oldest first."""
    window = ()
    for j in tl.static_range(W - 1):
        value = load_input(p_x, p_initial, i_s, start, position - (W - 1) + j, D, o_d, W)
        window = window + (value.to(DTYPE),)
    return window


@triton.jit
def extend(window, rows, DTYPE: tl.constexpr, ROWS: tl.constexpr):
    """The window with the inputs of ``ROWS`` tokens behind it."""
    for r in tl.static_range(ROWS):
        window = window + (rows[r][0].to(DTYPE),)
    return window


@triton.jit
def convolve(inputs, taps, FIRST: tl.constexpr, W: tl.constexpr):
    """What is under the activation, of the token whose window begins at the entry FIRST."""
    value = taps[W]
    for j in tl.static_range(W):
        value += taps[j] * inputs[FIRST + j]
    return value


@triton.jit(do_not_specialize=["T", "S", "segment"])
def forward_kernel(
    p_x, p_weight, p_bias, p_initial, p_y, p_final, p_cu, T, S, D, segment,
    DTYPE: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes y, and the last W - 1 inputs of every sequence."""
    n_columns = tl.cdiv(D, BD)
    slot = tl.program_id(0) // n_columns
    o_d = tl.program_id(0) % n_columns * BD + tl.arange(0, BD)
    i_s, i_g, n_segments, start, length, _, _ = locate(slot, p_cu, T, S, segment, 1)
    if i_g < n_segments:
        taps = load_taps(p_weight, p_bias, D, o_d, DTYPE, W)
        first = i_g * segment
        n = tl.minimum(length - first, segment)
        window = load_window(p_x, p_initial, i_s, start, first, D, o_d, DTYPE, W)
        for k in range(0, n, ROWS):
            room = tl.where(o_d < D, n - k, 0)
            row = start + first + k
            inputs = extend(window, load_rows(p_x, row, 1, room, D, o_d, False, ROWS), DTYPE, ROWS)
            for r in tl.static_range(ROWS):
                value = convolve(inputs, taps, r, W)
                if SILU:
                    value *= sigmoids(value)[0]
                tl.store(p_y + (row + r) * D + o_d, value, mask=room > r)
            window = inputs[ROWS:]
        if i_g + 1 == n_segments:
            for j in tl.static_range(W - 1):
                value = load_input(p_x, p_initial, i_s, start, length - (W - 1) + j, D, o_d, W)
                tl.store(p_final + (i_s.to(tl.int64) * (W - 1) + j) * D + o_d, value, mask=o_d < D)


@triton.jit
def load_arriving(p_grad_y, p_grad_final, i_s, row, here, room, D, o_d, W: tl.constexpr, ROWS: tl.constexpr):
    """What arrives from ``ROWS`` tokens; from the i-th behind the sequence what does from row i of the final state.

    That row stands for the input that the token would be the last to see.
    """
    p_y, p_final = p_grad_y + row * D, p_grad_final + (i_s.to(tl.int64) * (W - 1) - here) * D
    rows = ()
    for r in tl.static_range(ROWS):
        p_row = tl.where(r < here, p_y, p_final) + r * D.to(tl.int64)
        rows = rows + (tl.load(p_row + o_d, mask=room > r, other=0.0),)
    return rows


@triton.jit(do_not_specialize=["T", "S", "segment"])
def backward_kernel(
    p_grad_y, p_grad_final, p_x, p_weight, p_bias, p_initial, p_grad_x, p_grad_initial, p_sums, p_cu,
    T, S, D, segment,
    DTYPE: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the inputs, of the initial states, and a slot's sums for those of weights and bias.

    With inner_t the gradient under the activation, ``grad_x_t = sum_k weight_{W-1-k} inner_{t+k}``: a segment's first
    W - 1 tokens complete those of the inputs before it, which at a sequence's start are the state's and elsewhere left
    to the segment before; it walks as many tokens on to complete its own.
    """
    n_columns = tl.cdiv(D, BD)
    slot = tl.program_id(0) // n_columns
    o_d = tl.program_id(0) % n_columns * BD + tl.arange(0, BD)
    i_s, i_g, n_segments, start, length, _, _ = locate(slot, p_cu, T, S, segment, 1)
    zero = tl.zeros((BD,), DTYPE)
    sums = ()
    for _ in tl.static_range(W + 1):
        sums = sums + (zero,)
    if i_g < n_segments:
        taps = load_taps(p_weight, p_bias, D, o_d, DTYPE, W)
        first = i_g * segment
        n = tl.minimum(length - first, segment)
        window = load_window(p_x, p_initial, i_s, start, first, D, o_d, DTYPE, W)
        before = ()
        for _ in tl.static_range(W - 1):
            before = before + (zero,)
        for k in range(0, n + W - 1, ROWS):
            row = start + first + k
            # tokens from here on: of the segment, of the sequence, and on which its inputs' gradients wait
            own, here, wanted = n - k, length - first - k, n + (W - 1) - k
            room = tl.where(o_d < D, tl.minimum(here, wanted), 0)
            inputs = extend(window, load_rows(p_x, row, 1, room, D, o_d, False, ROWS), DTYPE, ROWS)
            arriving = load_arriving(
                p_grad_y, p_grad_final, i_s, row, here, tl.where(o_d < D, wanted, 0), D, o_d, W, ROWS
            )  # fmt: skip
            inner = before
            for r in tl.static_range(ROWS):
                grad = arriving[r].to(DTYPE)
                behind = tl.where(r < here, 0.0, grad)
                if SILU:
                    value = convolve(inputs, taps, r, W)
                    gate, rest = sigmoids(value)
                    grad *= gate * (1.0 + value * rest)
                grad = tl.where(r < here, grad, 0.0)
                inner = inner + (grad,)
                counted = tl.where(r < own, grad, 0.0)
                longer = ()
                for j in tl.static_range(W):
                    longer = longer + (sums[j] + counted * inputs[r + j],)
                sums = longer + (sums[W] + counted,)
                result = behind
                for j in tl.static_range(W):
                    result += taps[W - 1 - j] * inner[r + j]
                # of the input W - 1 tokens before
                target = o_d < tl.where((k + r >= W - 1) & (r < wanted), D, 0)
                tl.store(p_grad_x + (row + r - (W - 1)) * D + o_d, result, mask=target)
                if r < W - 1 and p_grad_initial is not None:
                    target = o_d < tl.where(first + k == 0, D, 0)
                    tl.store(p_grad_initial + (i_s.to(tl.int64) * (W - 1) + r) * D + o_d, result, mask=target)
            window, before = inputs[ROWS:], inner[ROWS:]
    N_SUMS: tl.constexpr = W if p_bias is None else W + 1
    for j in tl.static_range(N_SUMS):
        tl.store(p_sums + (slot.to(tl.int64) * N_SUMS + j) * D + o_d, sums[j], mask=o_d < D)
