"""The Triton kernels of ``cauchy``, on the rows of ``chunked``.

A node lives in one thread, which makes P and Q of each pole there in float64 and uses them for ``BM`` sums. The forward
pass walks over the poles with those sums in registers; the backward pass walks over the nodes with the gradients of
``BN`` poles in registers, and adds up the threads' shares once, at the end of its segment of nodes.
"""

# Triton takes no starred expression
# ruff: noqa: RUF005

import triton
import triton.language as tl


@triton.jit
def load_angles(p_tables, F, o_j):
    """Sine and cosine of half the nodes' angles; beyond the last node what makes rows finite."""
    s = tl.load(p_tables + o_j, mask=o_j < F, other=0.0)
    return s, tl.load(p_tables + F + o_j, mask=o_j < F, other=1.0)


@triton.jit
def load_pair(p_numbers, index, present, other):
    """A complex number where it is present (a scalar); elsewhere the real number ``other``."""
    return tl.load(p_numbers + 2 * index, mask=present, other=other), tl.load(
        p_numbers + 2 * index + 1, mask=present, other=0.0
    )


@triton.jit
def rows(a, b, angles, PAIRS: tl.constexpr):
    """Real and imaginary parts of a pole's P and Q at some nodes, in float64."""
    s, c = angles
    if PAIRS:
        s2, c2, sc = s * s, c * c, s * c
        x, y = (a * a + b * b) * c2 - s2, 2.0 * a * sc
        scale = 1.0 / (x * x + y * y)
        x, y = x * scale, y * scale
        real, imag = a * c2 + s2, (1.0 - a) * sc
        result = -imag * y - real * x, imag * x - real * y, b * (sc * y - c2 * x), -b * (sc * x + c2 * y)
    else:
        x, y = -a * c, s - b * c
        scale = 0.5 / (x * x + y * y)
        real, imag = (c * x + s * y) * scale, (s * x - c * y) * scale
        result = real, imag, -imag, real
    return result


@triton.jit
def forward_kernel(
    p_weights, p_poles, p_tables, p_sums, M, N, F, PAIRS: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr
):  # fmt: skip
    DTYPE: tl.constexpr = p_sums.dtype.element_ty
    blocks = tl.cdiv(F, BJ)
    i_d, i_m = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1) * BM
    o_j = tl.program_id(0) % blocks * BJ + tl.arange(0, BJ)
    angles = load_angles(p_tables, F, o_j)
    sums = ()
    for _ in tl.static_range(2 * BM):
        sums = sums + (tl.zeros((BJ,), DTYPE),)
    for n in range(N):
        a, b = load_pair(p_poles, i_d * N + n, True, -1.0)
        p, q, r, t = rows(a, b, angles, PAIRS)
        p, q, r, t = p.to(DTYPE), q.to(DTYPE), r.to(DTYPE), t.to(DTYPE)
        longer = ()
        for m in tl.static_range(BM):
            u, v = load_pair(p_weights, (i_d * M + i_m + m) * N + n, i_m + m < M, 0.0)
            longer = longer + (sums[2 * m] + (u * p + v * r), sums[2 * m + 1] + (u * q + v * t))
        sums = longer
    for m in tl.static_range(BM):
        p_sum = p_sums + 2 * ((i_d * M + i_m + m) * F + o_j)
        m_sum = o_j < tl.where(i_m + m < M, F, 0)
        tl.store(p_sum, sums[2 * m], mask=m_sum)
        tl.store(p_sum + 1, sums[2 * m + 1], mask=m_sum)


@triton.jit
def backward_kernel(
    p_grad,
    p_weights,
    p_poles,
    p_tables,
    p_grad_weights,
    p_grad_poles,
    D,
    M,
    N,
    F,
    segment,
    PAIRS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
):
    DTYPE: tl.constexpr = p_grad.dtype.element_ty
    groups = tl.cdiv(N, BN)
    i_d, i_n = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups * BN
    i_m, i_s = tl.program_id(1) * BM, tl.program_id(2)
    zero, wide_zero = tl.zeros((BJ,), DTYPE), tl.zeros((BJ,), tl.float64)
    # real and imaginary part of every weight's gradient, pole after pole, and of every pole's
    of_weights, of_poles = (), ()
    for _ in tl.static_range(2 * BM * BN):
        of_weights = of_weights + (zero,)
    for _ in tl.static_range(2 * BN):
        of_poles = of_poles + (wide_zero,)
    for start in range(i_s * segment, tl.minimum((i_s + 1) * segment, F), BJ):
        o_j = start + tl.arange(0, BJ)
        angles = load_angles(p_tables, F, o_j)
        k_real, k_imag = 2.0 * angles[1] * angles[1], 2.0 * angles[0] * angles[1]
        arriving = ()
        for m in tl.static_range(BM):
            p_sum = p_grad + 2 * ((i_d * M + i_m + m) * F + o_j)
            m_sum = o_j < tl.where(i_m + m < M, F, 0)
            arriving = arriving + (
                tl.load(p_sum, mask=m_sum, other=0.0),
                tl.load(p_sum + 1, mask=m_sum, other=0.0),
            )
        longer, more = (), ()
        for n in tl.static_range(BN):
            a, b = load_pair(p_poles, i_d * N + i_n + n, i_n + n < N, -1.0)
            p, q, r, t = rows(a, b, angles, PAIRS)
            p_low, q_low, r_low, t_low = p.to(DTYPE), q.to(DTYPE), r.to(DTYPE), t.to(DTYPE)
            u_real, u_imag, v_real, v_imag = zero, zero, zero, zero
            for m in tl.static_range(BM):
                x, y = arriving[2 * m], arriving[2 * m + 1]
                present = (i_n + n < N) & (i_m + m < M)
                u, v = load_pair(p_weights, (i_d * M + i_m + m) * N + i_n + n, present, 0.0)
                u_real += u * x
                u_imag += u * y
                v_real += v * x
                v_imag += v * y
                longer = longer + (
                    of_weights[2 * (n * BM + m)] + (x * p_low + y * q_low),
                    of_weights[2 * (n * BM + m) + 1] + (x * r_low + y * t_low),
                )
            u, v, x, y = u_real.to(tl.float64), u_imag.to(tl.float64), v_real.to(tl.float64), v_imag.to(tl.float64)
            A, B = 0.5 * (p * p - q * q - r * r + t * t), p * q - r * t
            C, E = p * r - q * t, p * t + q * r
            # times k
            A, B = k_real * A + k_imag * B, k_real * B - k_imag * A
            C, E = k_real * C + k_imag * E, k_real * E - k_imag * C
            more = more + (
                of_poles[2 * n] + (u * A + v * B + x * C + y * E),
                of_poles[2 * n + 1] + (u * C + v * E - x * A - y * B),
            )
        of_weights, of_poles = longer, more
    slot = i_s.to(tl.int64)
    for n in tl.static_range(BN):
        for m in tl.static_range(BM):
            p_to = p_grad_weights + 2 * (((slot * D + i_d) * M + i_m + m) * N + i_n + n)
            present = (i_n + n < N) & (i_m + m < M)
            tl.store(p_to, tl.sum(of_weights[2 * (n * BM + m)]), mask=present)
            tl.store(p_to + 1, tl.sum(of_weights[2 * (n * BM + m) + 1]), mask=present)
        p_to = p_grad_poles + 2 * (((slot * tl.num_programs(1) + tl.program_id(1)) * D + i_d) * N + i_n + n)
        tl.store(p_to, tl.sum(of_poles[2 * n]), mask=i_n + n < N)
        tl.store(p_to + 1, tl.sum(of_poles[2 * n + 1]), mask=i_n + n < N)
