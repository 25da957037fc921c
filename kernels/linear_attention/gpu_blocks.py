"""Pieces of the Triton kernels of ``linear_attention``: tiles loaded and stored, products, sums of logarithms.

Exponents are sums of logarithms over the tokens between two others, taken directly: from the chunk's first token on by
a cumulative sum, to its last one by a cumulative sum from the end. Only the pairs of a scalar decay are differences, of
two cumulative sums split so that they do not cancel (:func:`pair_decay`).
"""

# Triton would not take a value that only one branch returns
# ruff: noqa: RET505, SIM300

import triton
import triton.language as tl

from seqzoo.kernels.dispatch import interpreted

# the interpreter multiplies matrices of bfloat16 as if they were of the integers that hold it
INTERPRETED = tl.constexpr(interpreted())
# of products of float32: three parts of 8 bits each, on tensor cores, where arithmetic in registers would spill
EXACT = tl.constexpr("bf16x6")
# a logarithm below this is a factor of zero, and its multiples of 1/64 add up exactly over a chunk
LEAST = tl.constexpr(-1000.0)
# tokens of a secondary chunk, between which per-key decay is products of matrices
SUB = tl.constexpr(16)


@triton.jit
def exp(x):
    """The exponential to the last bits at any size of x: as a power of two, a device's loses those of ``x log2(e)``."""
    whole = tl.minimum(tl.maximum(tl.floor(x * 1.4426950408889634 + 0.5), -126.0), 127.0)
    # the logarithm of two in a part of few bits, whose multiples are exact, and a rest
    part = (x - whole * 0.693359375) + whole * 2.12194440e-4
    power = ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return power * tl.exp2(part * 1.4426950408889634)


@triton.jit
def load_tile(p, row, stride, o_t, tokens, o_c, width):
    """Rows ``row + o_t`` from a pointer at column 0, columns ``o_c``, zero where there are none: ``[BT, BC]``."""
    # only what a program's tiles share is 64 bits wide: offsets in a tile are kept in registers through a loop
    mask = ((o_t >= 0) & (o_t < tokens))[:, None] & (o_c < width)[None, :]
    return tl.load(p + row * stride + (o_t[:, None] * stride + o_c[None, :]), mask=mask, other=0.0)


@triton.jit
def load_across(p, row, stride, o_t, tokens, o_c, width):
    """:func:`load_tile` transposed: ``[BC, BT]``."""
    mask = (o_c < width)[:, None] & ((o_t >= 0) & (o_t < tokens))[None, :]
    return tl.load(p + row * stride + (o_c[:, None] + o_t[None, :] * stride), mask=mask, other=0.0)


@triton.jit
def store_tile(p, row, stride, o_t, tokens, o_c, width, value):
    """Writes what :func:`load_tile` reads."""
    mask = (o_t < tokens)[:, None] & (o_c < width)[None, :]
    tl.store(p + row * stride + (o_t[:, None] * stride + o_c[None, :]), value, mask=mask)


@triton.jit
def load_state(p, row, K, V, o_k, o_v):
    """A tile of the matrix ``row`` of ``(rows, K, V)``."""
    mask = (o_k < K)[:, None] & (o_v < V)[None, :]
    return tl.load(p + row * K * V + (o_k[:, None] * V + o_v[None, :]), mask=mask, other=0.0)


@triton.jit
def store_state(p, row, K, V, o_k, o_v, value):
    """Writes what :func:`load_state` reads."""
    mask = (o_k < K)[:, None] & (o_v < V)[None, :]
    tl.store(p + row * K * V + (o_k[:, None] * V + o_v[None, :]), value, mask=mask)


@triton.jit
def fixed_log(p, i_h):
    """The logarithm of one head's fixed decay, finite, so that none of it is none."""
    log = tl.load(p + i_h).to(tl.float32)
    return tl.where(log < LEAST, LEAST, log)


@triton.jit
def log_until(p, row, H, i_h, o_t, tokens, DECAY: tl.constexpr, REVERSE: tl.constexpr):
    """The sum of a scalar decay's logarithms from token ``row`` to ``row + o_t``, and of all: ``[BT]`` and a scalar.

    ``o_t`` runs upwards from 0, or with REVERSE downwards to it. A fixed logarithm is multiplied: the errors of adding
    it up would all have one sign.
    """
    if DECAY == "head":
        log = fixed_log(p, i_h)
        return log * (tl.minimum(o_t, tokens - 1) + 1).to(tl.float32), log * tokens.to(tl.float32)
    else:
        log = tl.load(p + (row + o_t) * H + i_h, mask=o_t < tokens, other=0.0).to(tl.float32)
        return tl.cumsum(log, reverse=REVERSE), tl.sum(log, axis=0)


@triton.jit
def log_behind(p, row, H, i_h, o_t, tokens, DECAY: tl.constexpr):
    """The sum of a scalar decay's logarithms behind token ``row + o_t`` up to the last of ``tokens``: ``[BT]``."""
    if DECAY == "head":
        return fixed_log(p, i_h) * tl.maximum(tokens - 1 - o_t, 0).to(tl.float32)
    else:
        log = tl.load(p + (row + 1 + o_t) * H + i_h, mask=o_t + 1 < tokens, other=0.0).to(tl.float32)
        return tl.cumsum(log, reverse=True)


@triton.jit
def pair_decay(p, row, H, i_h, o_c, tokens, DECAY: tl.constexpr, ACROSS: tl.constexpr):
    """``exp(g_i - g_j)`` for ``j <= i``, else zero, of the cumulative sum g: ``[i, j]``, or ``[j, i]`` with ACROSS.

    A difference of two long sums would lose what a short one needs, so each logarithm is split into a multiple of 1/64,
    whose sums and differences are exact, and a rest below 1/128 in size, whose sums are small.
    """
    if DECAY == "head":
        log = tl.load(p + i_h + tl.zeros_like(o_c)).to(tl.float32)
    else:
        log = tl.load(p + (row + o_c) * H + i_h, mask=o_c < tokens, other=0.0).to(tl.float32)
    log = tl.where(log < LEAST, LEAST, log)
    coarse = tl.floor(log * 64.0 + 0.5) * 0.015625
    fine = log - coarse
    if DECAY == "head":
        fine *= (o_c + 1).to(tl.float32)
        coarse *= (o_c + 1).to(tl.float32)
    else:
        fine = tl.cumsum(fine)
        coarse = tl.cumsum(coarse)
    if ACROSS:
        between = (coarse[None, :] - coarse[:, None]) + (fine[None, :] - fine[:, None])
        return exp(tl.where(o_c[None, :] >= o_c[:, None], between, float("-inf")))
    else:
        between = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
        return exp(tl.where(o_c[:, None] >= o_c[None, :], between, float("-inf")))


@triton.jit
def pair_logs(log):
    """``g_i - g_j`` for ``j <= i``, else -inf, of the cumulative sums g of SUB rows, as in :func:`pair_decay`.

    ``[SUB, SUB, BK]``.
    """
    log = tl.where(log < LEAST, LEAST, log)
    coarse = tl.floor(log * 64.0 + 0.5) * 0.015625
    fine = tl.cumsum(log - coarse, axis=0)
    coarse = tl.cumsum(coarse, axis=0)
    o_i = tl.arange(0, SUB)
    between = (coarse[:, None, :] - coarse[None, :, :]) + (fine[:, None, :] - fine[None, :, :])
    return tl.where((o_i[:, None] >= o_i[None, :])[:, :, None], between, float("-inf"))


@triton.jit
def dot(a, b, total):
    """``total + a b`` of operands of one dtype, to the last bit of float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    elif a.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision=EXACT)
    else:
        return tl.dot(a, b, total)


@triton.jit
def product(a, b, total, KIND: tl.constexpr, FINE: tl.constexpr):
    """``total + a b``, accumulated in float32, of operands in the activations' dtype KIND or in float32.

    FINE keeps float32 operands exact to their last bit, which float32 results need; without it they are as exact as
    results in KIND need. One exact bfloat16 operand takes the other one in three parts of 8 bits.
    """
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return dot(a, b, total)
    elif KIND == tl.bfloat16 and not FINE:
        return dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    elif a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        rest = b - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return dot(a, high, dot(a, middle, dot(a, low, total)))
    elif b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return dot(high, b, dot(middle, b, dot(low, b, total)))
    else:
        return dot(a.to(tl.float32), b.to(tl.float32), total)


@triton.jit
def ones(mask, KIND: tl.constexpr):
    """A matrix of ones and zeros in a dtype whose products with float32 :func:`product` keeps exact."""
    return tl.where(mask, 1.0, 0.0).to(tl.bfloat16 if KIND == tl.bfloat16 else tl.float32)


@triton.jit
def suffix_in_blocks(x, C: tl.constexpr, BK: tl.constexpr):
    """Sums over the rows from each one to the last of its block of SUB rows: ``[C, BK]``."""
    blocks = tl.reshape(x, (C // SUB, SUB, BK))
    return tl.reshape(tl.cumsum(blocks, axis=1, reverse=True), (C, BK))
