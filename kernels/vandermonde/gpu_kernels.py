"""The Triton kernels of ``vandermonde``.

A position is ``l = i BC + j`` and its power the product of two, ``exp(x BC i) exp(x j)``, so that a tile of ``BR`` rows
of ``BC`` positions is a matrix product over the terms. Both factors are made in registers and in double precision, of
which the matrix products alone are not: there are few of them, and the phase needs it.
"""

import triton
import triton.language as tl

from seqzoo.kernels.linear_attention.gpu_blocks import dot

INVERSE_TURN = tl.constexpr(0.15915494309189535)
QUARTER = tl.constexpr(1.5707963267948966)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_exponents(p_exponents, i_d, N, o_n):
    """The real parts in powers of two and the imaginary ones in turns, of some terms of a channel: float64."""
    p = p_exponents + (i_d.to(tl.int64) * N + o_n) * 2
    # of a term that is not there all powers are 1
    rates = tl.load(p, mask=o_n < N, other=0.0) * LOG2_E
    return rates, tl.load(p + 1, mask=o_n < N, other=0.0) * INVERSE_TURN


@triton.jit
def load_weights(p_weights, i_d, N, o_n):
    """Real and imaginary parts."""
    p = p_weights + (i_d.to(tl.int64) * N + o_n) * 2
    return tl.load(p, mask=o_n < N, other=0.0), tl.load(p + 1, mask=o_n < N, other=0.0)


@triton.jit
def powers(rates, turns, o_l):
    """``2 ** (rates o_l)`` times the point that many turns round the circle, at whole positions: real, imaginary.

    Within 1e-9 of their size, so that rounding them to float32 is all that they are off by.
    """
    l = o_l.to(tl.float64)
    exponent = rates * l
    whole = tl.minimum(tl.maximum(tl.floor(exponent + 0.5), -127.0), 128.0)
    # below the normal numbers of float32 nothing is left
    r = tl.where(exponent < -127.0, 0.0, exponent - whole) * LN_2
    size = (((r * (1 / 40320) + 1 / 5040) * r + 1 / 720) * r + 1 / 120) * r + 1 / 24
    size = (((size * r + 1 / 6) * r + 0.5) * r + 1.0) * r + 1.0
    size *= ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True).to(tl.float64)
    angle = turns * l
    angle = (angle - tl.floor(angle + 0.5)) * 4.0
    quarter = tl.floor(angle + 0.5)
    # at most half a quarter of a turn to either side
    a = (angle - quarter) * QUARTER
    z = a * a
    sine = (((z * (-1 / 39916800) + 1 / 362880) * z - 1 / 5040) * z + 1 / 120) * z - 1 / 6
    sine = sine * z * a + a
    cosine = (((z * (-1 / 3628800) + 1 / 40320) * z - 1 / 720) * z + 1 / 24) * z - 0.5
    cosine = cosine * z + 1.0
    n = quarter.to(tl.int32) & 3
    odd = (n & 1) == 1
    re, im = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return size * tl.where((n == 1) | (n == 2), -re, re), size * tl.where(n >= 2, -im, im)


@triton.jit(do_not_specialize=["length", "N"])
def forward_kernel(
    p_exponents, p_weights, p_kernel, length, N,
    BR: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Writes a tile of a channel's kernel."""
    n_tiles = tl.cdiv(length, BR * BC)
    i_d, i_t = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    o_r, o_c = i_t * BR + tl.arange(0, BR), tl.arange(0, BC)
    total = tl.zeros((BR, BC), tl.float32)
    for n in range(0, N, BN):
        o_n = n + tl.arange(0, BN)
        rates, turns = load_exponents(p_exponents, i_d, N, o_n)
        weights_re, weights_im = load_weights(p_weights, i_d, N, o_n)
        re, im = powers(rates[None, :], turns[None, :], (o_r * BC)[:, None])
        coarse_re = re * weights_re[None, :] - im * weights_im[None, :]
        coarse_im = re * weights_im[None, :] + im * weights_re[None, :]
        fine_re, fine_im = powers(rates[:, None], turns[:, None], o_c[None, :])
        total = dot(coarse_re.to(tl.float32), fine_re.to(tl.float32), total)
        total = dot(coarse_im.to(tl.float32), -fine_im.to(tl.float32), total)
    o_l = o_r[:, None] * BC + o_c[None, :]
    tl.store(p_kernel + i_d.to(tl.int64) * length + o_l, total, mask=o_l < length)


@triton.jit(do_not_specialize=["D", "length", "N", "tiles"])
def backward_kernel(
    p_grad, p_exponents, p_sums, D, length, N, tiles,
    BR: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Writes, over so many tiles and for some terms, the sums of the conjugate powers times g and times l g.

    ``p_sums`` is ``(segments, 4, D, N)``: real and imaginary parts of the first, then those of the second. In a tile
    with U and V the sums over j of the fine factors times g and j g, they are those over i of the coarse factors times
    U, and times ``BC i U + V``.
    """
    n_blocks = tl.cdiv(N, BN)
    i_n = tl.program_id(0) % n_blocks
    i_d, i_g = tl.program_id(0) // n_blocks % D, tl.program_id(0) // n_blocks // D
    o_n, o_c = i_n * BN + tl.arange(0, BN), tl.arange(0, BC)
    rates, turns = load_exponents(p_exponents, i_d, N, o_n)
    exact_re, exact_im = powers(rates[None, :], turns[None, :], o_c[:, None])
    fine_re, fine_im = exact_re.to(tl.float32), exact_im.to(tl.float32)
    zero = tl.zeros((BR, BN), tl.float32)
    sum_re, sum_im = tl.zeros((BN,), tl.float64), tl.zeros((BN,), tl.float64)
    late_re, late_im = tl.zeros((BN,), tl.float64), tl.zeros((BN,), tl.float64)
    for tile in range(i_g * tiles, tl.minimum((i_g + 1) * tiles, tl.cdiv(length, BR * BC))):
        o_r = tile * BR + tl.arange(0, BR)
        o_l = o_r[:, None] * BC + o_c[None, :]
        b_g = tl.load(p_grad + i_d.to(tl.int64) * length + o_l, mask=o_l < length, other=0.0)
        b_late = b_g * o_c[None, :].to(tl.float32)
        u_re, u_im = dot(b_g, fine_re, zero).to(tl.float64), dot(b_g, fine_im, zero).to(tl.float64)
        v_re, v_im = dot(b_late, fine_re, zero).to(tl.float64), dot(b_late, fine_im, zero).to(tl.float64)
        begin = (o_r * BC)[:, None]
        v_re += u_re * begin
        v_im += u_im * begin
        # conjugates: the imaginary parts count negatively
        re, im = powers(rates[None, :], turns[None, :], begin)
        sum_re += tl.sum(re * u_re - im * u_im, axis=0)
        sum_im -= tl.sum(re * u_im + im * u_re, axis=0)
        late_re += tl.sum(re * v_re - im * v_im, axis=0)
        late_im -= tl.sum(re * v_im + im * v_re, axis=0)
    p = p_sums + (i_g.to(tl.int64) * 4 * D + i_d) * N + o_n
    rows = D.to(tl.int64) * N
    tl.store(p, sum_re, mask=o_n < N)
    tl.store(p + rows, sum_im, mask=o_n < N)
    tl.store(p + 2 * rows, late_re, mask=o_n < N)
    tl.store(p + 3 * rows, late_im, mask=o_n < N)
