"""The Triton kernels of ``selective_scan``.

A program owns ``BD`` channels of one group and one segment of one sequence. It walks the segment in blocks of ``ROWS``
tokens and within a block takes the N values of the state one after another: the tokens' steps and inputs stay in
registers for all of them, a channel lives in one thread, so the recurrence is a chain of multiply-adds without exchange
between threads, and a value of B or C is loaded once for all BD channels. Between blocks the states are in a carry of
the program's own, which caches hold, so that N has no limit.

Where programs are too few to fill the device sequences are cut into segments: a first launch reduces every segment to
its summary, the pair (A, B) of ``state_out = A state_in + B``, a second one turns these into the states that enter the
segments, and a third one walks.

Values are pairs (real, imaginary); a real one repeats itself, which costs nothing once compiled. A token that is not
there has step 0, which changes nothing.
"""

# Triton takes neither a starred expression nor a value that only one branch would return
# ruff: noqa: RUF005, RET505

import triton
import triton.language as tl

from seqzoo.kernels.linear_scan.gpu_blocks import (
    accumulate,
    apply_summary,
    load_rows,
    load_state,
    sigmoids,
    store_rows,
    store_state,
)
from seqzoo.kernels.linear_scan.gpu_kernels import locate


@triton.jit
def channels(column, D, G, BD: tl.constexpr):
    """The channels of a column of the grid (D where there is none), their group and the tile in it."""
    width = D // G
    n_tiles = tl.cdiv(width, BD)
    i_k = column // n_tiles
    i_d = column % n_tiles
    o_d = i_d * BD + tl.arange(0, BD)
    if G > 1:
        o_d = tl.where(o_d < width, i_k * width + o_d, D)
    return o_d, i_k, i_d


@triton.jit
def load_column(p, row, i, N, D, o_d, COMPLEX: tl.constexpr):
    """The values i of all channels of a tensor ``(..., D, N)``."""
    p_row = p + ((row * D + o_d) * N + i) * (2 if COMPLEX else 1)
    value = tl.load(p_row, mask=o_d < D, other=0.0).to(tl.float32)
    if COMPLEX:
        return value, tl.load(p_row + 1, mask=o_d < D, other=0.0).to(tl.float32)
    else:
        return value, value


@triton.jit
def store_column(p, row, i, N, D, o_d, value, imaginary, needed, COMPLEX: tl.constexpr):
    """The values i of all channels of a tensor ``(..., D, N)``, where ``needed`` (a scalar) holds."""
    mask = o_d < tl.where(needed, D, 0)
    p_row = p + ((row * D + o_d) * N + i) * (2 if COMPLEX else 1)
    tl.store(p_row, value, mask=mask)
    if COMPLEX:
        tl.store(p_row + 1, imaginary, mask=mask)


@triton.jit
def rows_present(left, ROWS: tl.constexpr):
    """Whether each of ``ROWS`` tokens is there, of the number of tokens from the first one on."""
    present = ()
    for r in tl.static_range(ROWS):
        present = present + (r < left,)
    return present


@triton.jit
def load_numbers(p, row, present, i, i_k, G, N, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """The values i of group i_k of ``ROWS`` tokens of a tensor ``(..., G, N)``, scalars as pairs."""
    numbers = ()
    WORDS: tl.constexpr = 2 if COMPLEX else 1
    stride = G * N * WORDS
    p_number = p + ((row * G + i_k) * N + i) * WORDS
    for r in tl.static_range(ROWS):
        value = tl.load(p_number, mask=present[r], other=0.0).to(tl.float32)
        if COMPLEX:
            numbers = numbers + ((value, tl.load(p_number + 1, mask=present[r], other=0.0).to(tl.float32)),)
        else:
            numbers = numbers + ((value, value),)
        p_number += stride
    return numbers


@triton.jit
def stack(values, ROWS: tl.constexpr):
    """``ROWS`` blocks ``[BD]`` as one ``[BD, ROWS]``."""
    # what is joined first becomes the slowest index
    for level in tl.static_range(ROWS.bit_length() - 1):
        pairs = ()
        for r in tl.static_range(ROWS >> (level + 1)):
            pairs = pairs + (tl.join(values[r], values[r + (ROWS >> (level + 1))]),)
        values = pairs
    return tl.reshape(values[0], values[0].shape[0], ROWS)


@triton.jit
def unstack(tile, ROWS: tl.constexpr):
    """The inverse of :func:`stack`."""
    parts = (tile,)
    for level in tl.static_range(ROWS.bit_length() - 1):
        even, odd = (), ()
        for r in tl.static_range(1 << level):
            pair = parts[r] if 2 << level == ROWS else tl.reshape(parts[r], parts[r].shape[0], ROWS >> (level + 1), 2)
            first, second = tl.split(pair)
            even = even + (first,)
            odd = odd + (second,)
        parts = even + odd
    return parts


@triton.jit
def product_error(x, y, product):
    """``x y - product`` where product is their rounded product; the halves' own products are exact."""
    x_high = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    y_high = (y.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    x_low, y_low = x - x_high, y - y_high
    return ((x_high * y_high - product) + (x_high * y_low + x_low * y_high)) + x_low * y_low


@triton.jit
def exponential(x, low):
    """``e**(x + low)`` to 0.8 units in the last place where that is normal, for a low that x does not show.

    The device's own errs more, and to one side; over a long memory such errors add up, and so does the rounding of an A
    that log2(e) is folded into. ``x = k log(2) + f``, and ``e**f`` is ``1 + f + f^2 q(f)``; the sum with 1.5 * 2**23
    rounds and leaves k in the low bits.
    """
    x = tl.clamp(x, -87.6, 89.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = x * 1.4426950408889634 + 12582912.0
    k = shifted - 12582912.0
    f = (x - k * 0.693359375) + (k * 2.1219444e-4 + low)
    q = 0.04166635125875473 + f * (0.008369239047169685 + f * 0.0013941240031272173)
    q = 1.0 + f * (0.5 + f * (0.16666504740715027 + f * q))
    mantissa = (1.0 + f * q).to(tl.int32, bitcast=True)
    value = (mantissa + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)
    return tl.where(x > 88.72283, float("inf"), value)


@triton.jit
def softplus(x):
    """``log(1 + e^x)`` to a relative error: log1p of ``w`` as w less a series in ``w / (2 + w)``, at most a third."""
    small = exponential(-tl.abs(x), 0.0)
    half = 0.5 * small * small
    t = small / (2.0 + small)
    s = t * t
    # 2/3 + 2/5 s + ... + 2/13 s^5
    series = 0.2222222222 + s * (0.1818181818 + s * 0.1538461538)
    series = 0.6666666667 + s * (0.4 + s * (0.2857142857 + s * series))
    return tl.maximum(x, 0.0) + (small - (half - t * (half + s * series)))


@triton.jit
def sine_cosine(x, low):
    """Of ``x + low``, fp32 angles up to some ten thousand, after reduction to an eighth of a turn.

    The library's own takes a path through local memory for the greatest angles, which would count as spills.
    """
    quarter = tl.floor(x * 0.6366197723675814 + 0.5)
    near = (x - quarter * 1.5703125) - quarter * 4.837512969970703e-4
    rest = low - quarter * 7.549789948768648e-8
    r = near + rest
    rest = (near - r) + rest
    s = r * r
    sine = r + (r * s * (-1.6666654611e-1 + s * (8.3321608736e-3 - s * 1.9515295891e-4)) + rest)
    series = 4.166664568298827e-2 + s * (-1.388731625493765e-3 + s * 2.443315711809948e-5)
    cosine = 1.0 - (0.5 * s - (s * s * series - r * rest))
    turn = quarter.to(tl.int32) & 3
    odd = (turn & 1) == 1
    first, second = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return tl.where(turn >= 2, -first, first), tl.where((turn == 1) | (turn == 2), -second, second)


@triton.jit
def load_bias(p, D, o_d):
    """A parameter ``(D,)``; zero when there is none."""
    if p is None:
        return tl.zeros(o_d.shape, tl.float32)
    else:
        return tl.load(p + o_d, mask=o_d < D, other=0.0).to(tl.float32)


@triton.jit
def singles(values, ROWS: tl.constexpr):
    """``ROWS`` values as tuples of one."""
    found = ()
    for r in tl.static_range(ROWS):
        found = found + ((values[r],),)
    return found


@triton.jit
def load_norms(p_B, row, present, i_k, G, N, ROWS: tl.constexpr):
    """``|B|^2`` of ``ROWS`` tokens."""
    norms = ()
    for r in tl.static_range(ROWS):
        norms = norms + (r * 0.0,)
    for i in range(N):
        b = load_numbers(p_B, row, present, i, i_k, G, N, False, ROWS)
        sums = ()
        for r in tl.static_range(ROWS):
            sums = sums + (norms[r] + b[r][0] * b[r][0],)
        norms = sums
    return norms


@triton.jit
def load_steps(p_delta, bias, row, room, D, o_d, SOFTPLUS: tl.constexpr, ROWS: tl.constexpr):
    """The steps of ``ROWS`` tokens, zero where there is none, and what the softplus was taken of."""
    deltas = load_rows(p_delta, row, 1, room, D, o_d, False, ROWS)
    entered = ()
    for r in tl.static_range(ROWS):
        entered = entered + (deltas[r][0].to(tl.float32) + bias,)
    steps = unstack(softplus(stack(entered, ROWS)), ROWS) if SOFTPLUS else entered
    found = ()
    for r in tl.static_range(ROWS):
        found = found + ((tl.where(room > r, steps[r], 0.0), entered[r]),)
    return found


@triton.jit
def load_tokens(
    p_u, p_delta, p_B, bias, row, present, room, D, o_d, i_k, G, N,
    LONGHORN: tl.constexpr, SOFTPLUS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of ``ROWS`` tokens the rates, which are the steps and of Longhorn eps, and the inputs, rate times u."""
    values = load_rows(p_u, row, 1, room, D, o_d, False, ROWS)
    steps = load_steps(p_delta, bias, row, room, D, o_d, SOFTPLUS, ROWS)
    rates, inputs = (), ()
    norms = load_norms(p_B, row, present, i_k, G, N, ROWS) if LONGHORN else ()
    for r in tl.static_range(ROWS):
        step, _ = steps[r]
        rate = step / (1.0 + step * norms[r]) if LONGHORN else step
        rates = rates + (rate,)
        inputs = inputs + (rate * values[r][0].to(tl.float32),)
    return rates, inputs


@triton.jit
def decays(rates, rate_of_decay, numbers, LONGHORN: tl.constexpr, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """The factors of ``ROWS`` tokens for one value of the state, of its A or, of Longhorn, its B."""
    A, A_im = rate_of_decay
    factors = ()
    if LONGHORN:
        for r in tl.static_range(ROWS):
            a = 1.0 - rates[r] * numbers[r][0] * numbers[r][0]
            factors = factors + ((a, a),)
    else:
        tile = stack(rates, ROWS)
        exponents = tile * A[:, None]
        if COMPLEX:
            # a phase that is not forgotten shows every rounding of its exponent
            sizes = exponential(exponents, product_error(tile, A[:, None], exponents))
            angles = tile * A_im[:, None]
            sine, cosine = sine_cosine(angles, product_error(tile, A_im[:, None], angles))
            real, imaginary = unstack(sizes * cosine, ROWS), unstack(sizes * sine, ROWS)
        else:
            real = unstack(exponential(exponents, 0.0), ROWS)
            imaginary = real
        for r in tl.static_range(ROWS):
            factors = factors + ((real[r], imaginary[r]),)
    return factors


@triton.jit
def advance(factors, inputs, numbers, h, h_im, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """The states before and after each of ``ROWS`` tokens, as ROWS + 1 pairs."""
    states = ((h, h_im),)
    for r in tl.static_range(ROWS):
        a, a_im = factors[r]
        b, b_im = numbers[r]
        x = a * h + inputs[r] * b
        if COMPLEX:
            x = x - a_im * h_im
            h_im = a * h_im + a_im * h + inputs[r] * b_im
        h = x
        states = states + ((h, h if not COMPLEX else h_im),)
    return states


@triton.jit
def retreat(factors, readers, gradients, carry, carry_im, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """Of ``ROWS`` tokens the gradients in their states and the carries before them, two pairs each."""
    found = ()
    for r in tl.static_range(ROWS - 1, -1, -1):
        a, a_im = factors[r]
        c, c_im = readers[r]
        gamma = gradients[r] * c + carry
        carry = a * gamma
        if COMPLEX:
            gamma_im = carry_im - gradients[r] * c_im
            carry += a_im * gamma_im
            carry_im = a * gamma_im - a_im * gamma
            found = ((gamma, gamma_im, carry, carry_im),) + found
        else:
            found = ((gamma, gamma, carry, carry),) + found
    return found


@triton.jit
def add_channels(values, ROWS: tl.constexpr):
    """The sums over channels of ``ROWS`` tokens' values, ``[ROWS]``."""
    return tl.sum(stack(values, ROWS), axis=0)


@triton.jit
def read_out(sums, states, numbers, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """Adds ``Re(C h)`` of one value of the state to the outputs of ``ROWS`` tokens."""
    found = ()
    for r in tl.static_range(ROWS):
        y = sums[r] + numbers[r][0] * states[r + 1][0]
        if COMPLEX:
            y = y - numbers[r][1] * states[r + 1][1]
        found = found + (y,)
    return found


@triton.jit
def zeros(BD: tl.constexpr, ROWS: tl.constexpr):
    """``ROWS`` tokens of zeros."""
    zero = tl.zeros((BD,), tl.float32)
    rows = ()
    for _ in tl.static_range(ROWS):
        rows = rows + (zero,)
    return rows


@triton.jit
def load_output_gradients(p_grad_y, p_z, row, room, D, o_d, ROWS: tl.constexpr):
    """The gradients of the outputs of ``ROWS`` tokens before the gate."""
    gradients = load_rows(p_grad_y, row, 1, room, D, o_d, False, ROWS)
    found = ()
    if p_z is None:
        for r in tl.static_range(ROWS):
            found = found + (gradients[r][0].to(tl.float32),)
    else:
        gates = load_rows(p_z, row, 1, room, D, o_d, False, ROWS)
        for r in tl.static_range(ROWS):
            gate = gates[r][0].to(tl.float32)
            found = found + (gradients[r][0].to(tl.float32) * gate * sigmoids(gate)[0],)
    return found


@triton.jit
def begin(p_A, p_rates, p_state, p_carry, slot, i_s, N, D, o_d, SPLIT: tl.constexpr, COMPLEX: tl.constexpr):
    """Fills a program's carry with a state and lays out its A as the states are: threads read neighbours, not rows.

    SPLIT: a scan over the summaries has filled the carry.
    """
    h = tl.zeros(o_d.shape, tl.float32)
    h_im = h
    for i in range(N):
        if p_A is not None:
            A, A_im = load_column(p_A, slot * 0, i, N, D, o_d, COMPLEX)
            store_state(p_rates, slot * N + i, D, o_d, A, A_im, N > 0, COMPLEX)
        if not SPLIT:
            if p_state is not None:
                h, h_im = load_column(p_state, i_s, i, N, D, o_d, COMPLEX)
            store_state(p_carry, slot * N + i, D, o_d, h, h_im, N > 0, COMPLEX)
    tl.debug_barrier()


@triton.jit
def load_rate(p_rates, slot, i, N, D, o_d, COMPLEX: tl.constexpr):
    """A of the value i of the state; zero of Longhorn, which has none."""
    if p_rates is None:
        zero = tl.zeros(o_d.shape, tl.float32)
        return zero, zero
    else:
        return load_state(p_rates, slot * N + i, D, o_d, COMPLEX)


@triton.jit
def multiply(factors, product, product_im, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """Extends the product of the factors by ``ROWS`` tokens."""
    for r in tl.static_range(ROWS):
        a, a_im = factors[r]
        x = a * product
        if COMPLEX:
            x = x - a_im * product_im
            product_im = a * product_im + a_im * product
        product = x
    return product, product_im


@triton.jit
def store_sums(p, offsets, m_r, values, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """Writes the sums over channels of ``ROWS`` tokens' pairs."""
    real, imaginary = (), ()
    for r in tl.static_range(ROWS):
        real = real + (values[r][0],)
        imaginary = imaginary + (values[r][1],)
    tl.store(p + offsets, add_channels(real, ROWS), mask=m_r)
    if COMPLEX:
        tl.store(p + offsets + 1, add_channels(imaginary, ROWS), mask=m_r)


@triton.jit
def reader_gradients(gradients, states, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """The gradients of C of ``ROWS`` tokens, of each channel."""
    found = ()
    for r in tl.static_range(ROWS):
        h, h_im = states[r + 1]
        in_C = gradients[r] * h
        found = found + ((in_C, -gradients[r] * h_im if COMPLEX else in_C),)
    return found


@triton.jit
def value_gradients(
    rates, inputs, rate_of_decay, numbers, states, results, in_rates, in_inputs,
    LONGHORN: tl.constexpr, COMPLEX: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What one value of the state adds to the gradients of ``ROWS`` tokens' rates and inputs.

    With e the gradient of an exponent, ``carry conj(h)`` of the state before, ``e conj(A)`` is that of the step and
    ``step e`` that of A.

    Returns:
        the gradients in the rates (but for those that reach the step through the input) and in the inputs, the
        gradients of B of each channel, and that of A.
    """
    A, A_im = rate_of_decay
    in_A = tl.zeros(A.shape, tl.float32)
    in_A_im = in_A
    longer_rates, longer_inputs, in_B = (), (), ()
    for r in tl.static_range(ROWS):
        b, b_im = numbers[r]
        rate = rates[r]
        h, h_im = states[r]
        gamma, gamma_im, carry, carry_im = results[r]
        in_input = in_inputs[r] + gamma * b
        in_number = gamma * inputs[r]
        in_number_im = in_number
        if LONGHORN:
            in_factor = gamma * h
            in_rate = in_rates[r] - b * b * in_factor
            in_number -= 2.0 * b * rate * in_factor
        elif COMPLEX:
            in_input += gamma_im * b_im
            in_number_im = gamma_im * inputs[r]
            in_exponent = carry * h + carry_im * h_im
            in_exponent_im = carry_im * h - carry * h_im
            in_rate = in_rates[r] + A * in_exponent + A_im * in_exponent_im
            in_A += rate * in_exponent
            in_A_im += rate * in_exponent_im
        else:
            in_exponent = carry * h
            in_rate = in_rates[r] + A * in_exponent
            in_A += rate * in_exponent
        longer_rates = longer_rates + (in_rate,)
        longer_inputs = longer_inputs + (in_input,)
        in_B = in_B + ((in_number, in_number_im),)
    return longer_rates, longer_inputs, in_B, in_A, in_A_im


@triton.jit
def token_gradients(
    values, steps, rates, gradients, weight, in_rates, in_inputs,
    LONGHORN: tl.constexpr, SOFTPLUS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of ``ROWS`` tokens the gradients of u, delta and D and, of Longhorn, in ``|B|^2``."""
    found = ()
    for r in tl.static_range(ROWS):
        step, entered = steps[r]
        value = values[r][0].to(tl.float32)
        scale = rates[r] if LONGHORN else step
        in_step = in_rates[r] + in_inputs[r] * value
        in_norm = in_step
        if LONGHORN:
            # eps = step / (1 + step |B|^2): its derivatives are (eps / step)^2 and -eps^2
            in_norm = -in_step * scale * scale
            share = tl.where(step == 0, 1.0, scale / tl.where(step == 0, 1.0, step))
            in_step *= share * share
        if SOFTPLUS:
            in_step *= sigmoids(entered)[0]
        in_value = in_inputs[r] * scale + gradients[r] * weight
        found = found + ((in_value, in_step, gradients[r] * value, in_norm),)
    return found


@triton.jit
def store_gate_gradients(
    p_grad_z, p_z, p_grad_y, row, room, D, o_d, sums, values, weight, ROWS: tl.constexpr
):  # fmt: skip
    """Writes the gradients of ``ROWS`` tokens' gates, ``sums`` being what C reads."""
    gates = load_rows(p_z, row, 1, room, D, o_d, False, ROWS)
    gradients = load_rows(p_grad_y, row, 1, room, D, o_d, False, ROWS)
    found = ()
    for r in tl.static_range(ROWS):
        gate = gates[r][0].to(tl.float32)
        share, rest = sigmoids(gate)
        y = sums[r] + weight * values[r][0].to(tl.float32)
        found = found + ((gradients[r][0].to(tl.float32) * y * share * (1.0 + gate * rest),),)
    store_rows(p_grad_z, row, 1, room, D, o_d, found, 0, False, ROWS)


@triton.jit
def enter_blocks(
    p_u, p_delta, p_B, bias, p_chunks, p_rates, p_entered, slot, chunk, start, n, D, o_d, i_k, G, N,
    LONGHORN: tl.constexpr, SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Finds the states that enter the blocks of a chunk, of the n tokens that are left from its first one on."""
    for i in range(N):
        h, h_im = load_state(p_chunks, chunk * N + i, D, o_d, COMPLEX)
        store_state(p_entered, slot * BLOCKS * N + i, D, o_d, h, h_im, n > 0, COMPLEX)
    tl.debug_barrier()
    for k in range(tl.cdiv(tl.minimum(n, BLOCKS * ROWS), ROWS) - 1):
        row = start + k * ROWS
        left = n - k * ROWS
        room = tl.where(o_d < D, left, 0)
        present = rows_present(left, ROWS)
        entry = (slot * BLOCKS + k) * N
        rates, inputs = load_tokens(
            p_u, p_delta, p_B, bias, row, present, room, D, o_d, i_k, G, N, LONGHORN, SOFTPLUS, ROWS
        )  # fmt: skip
        for i in range(N):
            A = load_rate(p_rates, slot, i, N, D, o_d, COMPLEX)
            h, h_im = load_state(p_entered, entry + i, D, o_d, COMPLEX)
            numbers = load_numbers(p_B, row, present, i, i_k, G, N, COMPLEX, ROWS)
            factors = decays(rates, A, numbers, LONGHORN, COMPLEX, ROWS)
            h, h_im = advance(factors, inputs, numbers, h, h_im, COMPLEX, ROWS)[ROWS]
            store_state(p_entered, entry + N + i, D, o_d, h, h_im, n > 0, COMPLEX)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "S", "segment"])
def summary_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_z, p_bias, p_grad_y, p_rates, p_factors, p_addends, p_cu, T, S, D, G, N, segment,
    ADJOINT: tl.constexpr, SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes the summary of every segment that another one follows.

    ADJOINT: of the backward pass, where the carry goes from the last token to the first,
    ``carry = conj(a) (conj(C) grad_y + carry)``. The product of real exponentials is one of the sum of the steps.
    """
    LONGHORN: tl.constexpr = p_A is None
    MULTIPLIED: tl.constexpr = LONGHORN or COMPLEX
    n_columns = G * tl.cdiv(D // G, BD)
    i_slot = tl.program_id(0) // n_columns
    o_d, i_k, _ = channels(tl.program_id(0) % n_columns, D, G, BD)
    _, i_g, n_segments, start, length, _, _ = locate(i_slot, p_cu, T, S, segment, CHUNK)
    needed = (i_g > 0) & (i_g < n_segments) if ADJOINT else i_g + 1 < n_segments
    if needed:
        slot = i_slot.to(tl.int64)
        begin(p_A, p_rates, None, None, slot, slot, N, D, o_d, True, COMPLEX)
        bias = load_bias(p_bias, D, o_d)
        zero = tl.zeros((BD,), tl.float32)
        total, lost = zero, zero
        for i in range(N):
            store_state(p_addends, slot * N + i, D, o_d, zero, zero, needed, COMPLEX)
            if MULTIPLIED:
                store_state(p_factors, slot * N + i, D, o_d, zero + 1.0, zero, needed, COMPLEX)
        tl.debug_barrier()
        n = tl.minimum(length - i_g * segment, segment)
        n_blocks = tl.cdiv(n, ROWS)
        for k in range(n_blocks):
            block = (n_blocks - 1 - k if ADJOINT else k) * ROWS
            row = start + i_g * segment + block
            left = n - block
            room = tl.where(o_d < D, left, 0)
            present = rows_present(left, ROWS)
            rates, inputs = load_tokens(
                p_u, p_delta, p_B, bias, row, present, room, D, o_d, i_k, G, N, LONGHORN, SOFTPLUS, ROWS
            )  # fmt: skip
            if ADJOINT:
                gradients = load_output_gradients(p_grad_y, p_z, row, room, D, o_d, ROWS)
            if not MULTIPLIED:
                total, lost = accumulate(total, lost, singles(rates, ROWS), room, 0, ROWS)
            for i in range(N):
                A = load_rate(p_rates, slot, i, N, D, o_d, COMPLEX)
                h, h_im = load_state(p_addends, slot * N + i, D, o_d, COMPLEX)
                if LONGHORN or not ADJOINT:
                    numbers = load_numbers(p_B, row, present, i, i_k, G, N, COMPLEX, ROWS)
                else:
                    numbers = ()
                factors = decays(rates, A, numbers, LONGHORN, COMPLEX, ROWS)
                if ADJOINT:
                    readers = load_numbers(p_C, row, present, i, i_k, G, N, COMPLEX, ROWS)
                    before = retreat(factors, readers, gradients, h, h_im, COMPLEX, ROWS)[0]
                    h, h_im = before[2], before[3]
                else:
                    h, h_im = advance(factors, inputs, numbers, h, h_im, COMPLEX, ROWS)[ROWS]
                store_state(p_addends, slot * N + i, D, o_d, h, h_im, needed, COMPLEX)
                if MULTIPLIED:
                    product, product_im = load_state(p_factors, slot * N + i, D, o_d, COMPLEX)
                    product, product_im = multiply(factors, product, product_im, COMPLEX, ROWS)
                    store_state(p_factors, slot * N + i, D, o_d, product, product_im, needed, COMPLEX)
            tl.debug_barrier()
        for i in range(N):
            if not MULTIPLIED:
                A = load_rate(p_rates, slot, i, N, D, o_d, COMPLEX)
                store_state(p_factors, slot * N + i, D, o_d, exponential(total * A[0], 0.0), total, needed, COMPLEX)
            elif COMPLEX and ADJOINT:
                product, product_im = load_state(p_factors, slot * N + i, D, o_d, COMPLEX)
                store_state(p_factors, slot * N + i, D, o_d, product, -product_im, needed, COMPLEX)


@triton.jit(do_not_specialize=["T", "S", "segment"])
def enter_kernel(
    p_state, p_factors, p_addends, p_cu, T, S, D, N, segment,
    ADJOINT: tl.constexpr, COMPLEX: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Replaces the addend of every segment by the state that enters it; from the last to the first if ADJOINT.

    A program owns ``BD`` channels of one value of one sequence's state.
    """
    n_columns = tl.cdiv(D, BD)
    o_d = tl.program_id(0) % n_columns * BD + tl.arange(0, BD)
    i = tl.program_id(0) // n_columns % N
    i_s = tl.program_id(0) // n_columns // N
    if p_cu is None:
        n_segments = tl.maximum(T - 1, 0) // segment + 1
        slot = i_s.to(tl.int64) * n_segments
    else:
        first = tl.load(p_cu + i_s)
        n_segments = tl.maximum(tl.load(p_cu + i_s + 1) - first - 1, 0) // segment + 1
        slot = (first // segment + i_s).to(tl.int64)
    h = tl.zeros((BD,), tl.float32)
    h_im = h
    if p_state is not None:
        h, h_im = load_column(p_state, i_s.to(tl.int64), i, N, D, o_d, COMPLEX)
    step = -N if ADJOINT else N
    row = (slot + n_segments - 1 if ADJOINT else slot) * N + i
    for k in range(0, n_segments, ROWS):
        room = tl.where(o_d < D, n_segments - k, 0)
        factors = load_rows(p_factors, row + step * k, step, room, D, o_d, COMPLEX, ROWS)
        addends = load_rows(p_addends, row + step * k, step, room, D, o_d, COMPLEX, ROWS)
        entered = ()
        for r in tl.static_range(ROWS):
            entered = entered + ((h, h_im),)
            # of the last segment there is no summary, and nothing that it enters
            h, h_im = apply_summary(factors[r], addends[r], h, h_im, COMPLEX)
        store_rows(p_addends, row + step * k, step, room, D, o_d, entered, 0, COMPLEX, ROWS)


@triton.jit(do_not_specialize=["T", "S", "segment"])
def forward_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_state, p_y, p_final, p_chunks, p_rates, p_carry, p_cu,
    T, S, D, G, N, segment,
    SPLIT: tl.constexpr, SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes y, the state that enters every chunk and the final state.

    SPLIT: the carry holds what enters the segments, instead of ``p_state``.
    """
    LONGHORN: tl.constexpr = p_A is None
    n_columns = G * tl.cdiv(D // G, BD)
    i_slot = tl.program_id(0) // n_columns
    o_d, i_k, _ = channels(tl.program_id(0) % n_columns, D, G, BD)
    i_s, i_g, n_segments, start, length, chunk, n_chunks = locate(i_slot, p_cu, T, S, segment, CHUNK)
    if i_g < n_segments:
        slot = i_slot.to(tl.int64)
        begin(p_A, p_rates, p_state, p_carry, slot, i_s.to(tl.int64), N, D, o_d, SPLIT, COMPLEX)
        bias = load_bias(p_bias, D, o_d)
        n = tl.minimum(length - i_g * segment, segment)
        chunk += i_g * (segment // CHUNK)
        for block in range(0, n, ROWS):
            row = start + i_g * segment + block
            left = n - block
            room = tl.where(o_d < D, left, 0)
            present = rows_present(left, ROWS)
            rates, inputs = load_tokens(
                p_u, p_delta, p_B, bias, row, present, room, D, o_d, i_k, G, N, LONGHORN, SOFTPLUS, ROWS
            )  # fmt: skip
            sums = zeros(BD, ROWS)
            for i in range(N):
                A = load_rate(p_rates, slot, i, N, D, o_d, COMPLEX)
                h, h_im = load_state(p_carry, slot * N + i, D, o_d, COMPLEX)
                store_state(
                    p_chunks, (chunk + block // CHUNK) * N + i, D, o_d, h, h_im, block % CHUNK == 0, COMPLEX
                )  # fmt: skip
                numbers = load_numbers(p_B, row, present, i, i_k, G, N, COMPLEX, ROWS)
                readers = load_numbers(p_C, row, present, i, i_k, G, N, COMPLEX, ROWS)
                factors = decays(rates, A, numbers, LONGHORN, COMPLEX, ROWS)
                states = advance(factors, inputs, numbers, h, h_im, COMPLEX, ROWS)
                sums = read_out(sums, states, readers, COMPLEX, ROWS)
                store_state(p_carry, slot * N + i, D, o_d, states[ROWS][0], states[ROWS][1], n > 0, COMPLEX)
            tl.debug_barrier()
            if p_D is not None:
                weight = load_bias(p_D, D, o_d)
                values = load_rows(p_u, row, 1, room, D, o_d, False, ROWS)
                outputs = ()
                for r in tl.static_range(ROWS):
                    outputs = outputs + (sums[r] + weight * values[r][0].to(tl.float32),)
            else:
                outputs = sums
            rows = ()
            if p_z is not None:
                gates = load_rows(p_z, row, 1, room, D, o_d, False, ROWS)
                for r in tl.static_range(ROWS):
                    gate = gates[r][0].to(tl.float32)
                    rows = rows + ((outputs[r] * gate * sigmoids(gate)[0],),)
            else:
                for r in tl.static_range(ROWS):
                    rows = rows + ((outputs[r],),)
            store_rows(p_y, row, 1, room, D, o_d, rows, 0, False, ROWS)
        # the last row that a packed sequence owns, where it does not need it
        n_own = tl.cdiv(n, CHUNK) + i_g * (segment // CHUNK)
        last = i_g + 1 == n_segments
        for i in range(N):
            h, h_im = load_state(p_carry, slot * N + i, D, o_d, COMPLEX)
            store_column(p_final, i_s.to(tl.int64), i, N, D, o_d, h, h_im, last, COMPLEX)
            store_state(
                p_chunks, (chunk + tl.cdiv(n, CHUNK)) * N + i, D, o_d, h, h_im, last & (n_own < n_chunks), COMPLEX
            )  # fmt: skip


@triton.jit(do_not_specialize=["T", "S", "segment", "tokens"])
def backward_kernel(
    p_grad_y, p_state, p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_chunks,
    p_grad_u, p_grad_delta, p_grad_z, p_grad_state, p_parts_B, p_parts_C, p_parts_norm, p_parts,
    p_rates, p_carry, p_lost, p_entered, p_cu, T, S, D, G, N, segment, tokens,
    SPLIT: tl.constexpr, SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes the gradients a token and partial sums of the others, from the last chunk of a segment to its first.

    With gamma_t the gradient in h_t: ``gamma_t = conj(C_t) grad_y_t + carry``, ``carry = conj(a_t) gamma_t``, entered
    by the gradient of the final state. h is recomputed from the state that entered the chunk: a first sweep finds the
    states that enter its blocks of ROWS tokens, a second one takes the blocks from the last to the first.

    Partial sums: of the gradients of B and C, and of Longhorn's in ``|B|^2``, one a tile of channels, ``(tiles, tokens,
    G, N)`` and ``(tiles, tokens, G)``; of those of A, D and the bias one a slot, N rows, one and one of D channels,
    which are zero in a surplus slot.
    """
    LONGHORN: tl.constexpr = p_A is None
    BLOCKS: tl.constexpr = CHUNK // ROWS
    WORDS: tl.constexpr = 2 if COMPLEX else 1
    n_columns = G * tl.cdiv(D // G, BD)
    i_slot = tl.program_id(0) // n_columns
    o_d, i_k, i_d = channels(tl.program_id(0) % n_columns, D, G, BD)
    i_s, i_g, n_segments, start, length, chunk, _ = locate(i_slot, p_cu, T, S, segment, CHUNK)
    slot = i_slot.to(tl.int64)
    # the rows of A are missing where there is none
    p_parts += slot * ((0 if LONGHORN else N * WORDS) + 2) * D
    p_parts_last = p_parts + (0 if LONGHORN else N * WORDS) * D
    bias = load_bias(p_bias, D, o_d)
    weight = load_bias(p_D, D, o_d)
    o_r = tl.arange(0, ROWS)
    zero = tl.zeros((BD,), tl.float32)
    total_D, lost_D, total_bias, lost_bias = zero, zero, zero, zero
    if not LONGHORN:
        for i in range(N):
            store_state(p_parts, i, D, o_d, zero, zero, N > 0, COMPLEX)
            store_state(p_lost, slot * N + i, D, o_d, zero, zero, N > 0, COMPLEX)
    if i_g < n_segments:
        begin(p_A, p_rates, p_state, p_carry, slot, i_s.to(tl.int64), N, D, o_d, SPLIT, COMPLEX)
        n = tl.minimum(length - i_g * segment, segment)
        n_chunks = tl.cdiv(n, CHUNK)
        chunk += i_g * (segment // CHUNK)
        start += i_g * segment
        for c in range(n_chunks):
            first = (n_chunks - 1 - c) * CHUNK
            n_blocks = tl.cdiv(tl.minimum(n - first, CHUNK), ROWS)
            enter_blocks(
                p_u, p_delta, p_B, bias, p_chunks, p_rates, p_entered, slot, chunk + n_chunks - 1 - c, start + first,
                n - first, D, o_d, i_k, G, N, LONGHORN, SOFTPLUS, COMPLEX, BLOCKS, ROWS,
            )  # fmt: skip
            for k in range(n_blocks):
                block = first + (n_blocks - 1 - k) * ROWS
                row = start + block
                left = n - block
                room = tl.where(o_d < D, left, 0)
                present = rows_present(left, ROWS)
                entry = (slot * BLOCKS + n_blocks - 1 - k) * N
                m_r = o_r < left
                part = (i_d * tokens.to(tl.int64) + row) * G + i_k
                rates, inputs = load_tokens(
                    p_u, p_delta, p_B, bias, row, present, room, D, o_d, i_k, G, N, LONGHORN, SOFTPLUS, ROWS
                )  # fmt: skip
                gradients = load_output_gradients(p_grad_y, p_z, row, room, D, o_d, ROWS)
                sums, in_inputs, in_rates = zeros(BD, ROWS), zeros(BD, ROWS), zeros(BD, ROWS)
                for i in range(N):
                    A = load_rate(p_rates, slot, i, N, D, o_d, COMPLEX)
                    h, h_im = load_state(p_entered, entry + i, D, o_d, COMPLEX)
                    carry, carry_im = load_state(p_carry, slot * N + i, D, o_d, COMPLEX)
                    numbers = load_numbers(p_B, row, present, i, i_k, G, N, COMPLEX, ROWS)
                    readers = load_numbers(p_C, row, present, i, i_k, G, N, COMPLEX, ROWS)
                    factors = decays(rates, A, numbers, LONGHORN, COMPLEX, ROWS)
                    states = advance(factors, inputs, numbers, h, h_im, COMPLEX, ROWS)
                    if p_z is not None:
                        sums = read_out(sums, states, readers, COMPLEX, ROWS)
                    p_number = ((part + o_r * G) * N + i) * WORDS
                    store_sums(
                        p_parts_C, p_number, m_r, reader_gradients(gradients, states, COMPLEX, ROWS), COMPLEX, ROWS
                    )
                    results = retreat(factors, readers, gradients, carry, carry_im, COMPLEX, ROWS)
                    in_rates, in_inputs, in_B, in_A, in_A_im = value_gradients(
                        rates, inputs, A, numbers, states, results, in_rates, in_inputs, LONGHORN, COMPLEX, ROWS
                    )  # fmt: skip
                    store_sums(p_parts_B, p_number, m_r, in_B, COMPLEX, ROWS)
                    carry, carry_im = results[0][2], results[0][3]
                    store_state(p_carry, slot * N + i, D, o_d, carry, carry_im, n > 0, COMPLEX)
                    if not LONGHORN:
                        before, before_im = load_state(p_parts, i, D, o_d, COMPLEX)
                        lost, lost_im = load_state(p_lost, slot * N + i, D, o_d, COMPLEX)
                        in_A, in_A_im = in_A - lost, in_A_im - lost_im
                        after, after_im = before + in_A, before_im + in_A_im
                        lost, lost_im = (after - before) - in_A, (after_im - before_im) - in_A_im
                        store_state(p_parts, i, D, o_d, after, after_im, n > 0, COMPLEX)
                        store_state(p_lost, slot * N + i, D, o_d, lost, lost_im, n > 0, COMPLEX)
                tl.debug_barrier()
                values = load_rows(p_u, row, 1, room, D, o_d, False, ROWS)
                steps = load_steps(p_delta, bias, row, room, D, o_d, SOFTPLUS, ROWS)
                found = token_gradients(
                    values, steps, rates, gradients, weight, in_rates, in_inputs, LONGHORN, SOFTPLUS, ROWS
                )  # fmt: skip
                store_rows(p_grad_u, row, 1, room, D, o_d, found, 0, False, ROWS)
                store_rows(p_grad_delta, row, 1, room, D, o_d, found, 1, False, ROWS)
                total_bias, lost_bias = accumulate(total_bias, lost_bias, found, room, 1, ROWS)
                total_D, lost_D = accumulate(total_D, lost_D, found, room, 2, ROWS)
                if LONGHORN:
                    in_norms = ()
                    for r in tl.static_range(ROWS):
                        in_norms = in_norms + (found[r][3],)
                    tl.store(p_parts_norm + part + o_r * G, add_channels(in_norms, ROWS), mask=m_r)
                if p_z is not None:
                    store_gate_gradients(p_grad_z, p_z, p_grad_y, row, room, D, o_d, sums, values, weight, ROWS)
        for i in range(N):
            carry, carry_im = load_state(p_carry, slot * N + i, D, o_d, COMPLEX)
            store_column(p_grad_state, i_s.to(tl.int64), i, N, D, o_d, carry, carry_im, i_g == 0, COMPLEX)
    store_state(p_parts_last, 0, D, o_d, total_D, total_D, N >= 0, False)
    store_state(p_parts_last, 1, D, o_d, total_bias, total_bias, N >= 0, False)


@triton.jit
def add_parts(p, parts, stride, o, m, ROWS: tl.constexpr):
    """The sum over ``parts`` rows of ``stride`` numbers at offsets o, in a fixed order."""
    total = tl.zeros(o.shape, tl.float32)
    for k in range(0, parts, ROWS):
        addend = tl.zeros(o.shape, tl.float32)
        for r in tl.static_range(ROWS):
            addend += tl.load(p + (k + r) * stride + o, mask=m & (o < tl.where(k + r < parts, stride, 0)), other=0.0)
        total += addend
    return total


@triton.jit(do_not_specialize=["tiles", "slots", "rows"])
def reduce_kernel(
    p_parts_B, p_parts_C, p_parts_norm, p_parts, p_B, p_grad_B, p_grad_C, p_grad_A, p_grad_D, p_grad_bias,
    tiles, slots, D, N, rows, numbers,
    COMPLEX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the partial sums of a backward pass in a fixed order.

    The first programs own ``BLOCK`` numbers of the gradients of B and C, of which there are ``rows`` of N times the
    words of one; the others BLOCK of the ``numbers`` that a slot has of the gradients of A, D and the bias.
    """
    WORDS: tl.constexpr = 2 if COMPLEX else 1
    block = tl.program_id(0).to(tl.int64)
    rows += block * 0
    numbers += block * 0
    size = N * WORDS
    n_blocks = tl.cdiv(rows * size, BLOCK)
    if block < n_blocks:
        o = block * BLOCK + tl.arange(0, BLOCK)
        m = o < rows * size
        in_B = add_parts(p_parts_B, tiles, rows * size, o, m, ROWS)
        if p_parts_norm is not None:
            in_norm = add_parts(p_parts_norm, tiles, rows, o // N, m, ROWS)
            in_B += 2.0 * in_norm * tl.load(p_B + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_grad_B + o, in_B, mask=m)
        tl.store(p_grad_C + o, add_parts(p_parts_C, tiles, rows * size, o, m, ROWS), mask=m)
    else:
        o = (block - n_blocks) * BLOCK + tl.arange(0, BLOCK)
        m = o < numbers
        total = add_parts(p_parts, slots, numbers, o, m, ROWS)
        last = numbers - 2 * D
        if p_grad_A is not None:
            # rows of channels become channels of rows
            i, d, word = o // (D * WORDS), o // WORDS % D, o % WORDS
            tl.store(p_grad_A + (d * N + i) * WORDS + word, total, mask=o < last)
        if p_grad_D is not None:
            tl.store(p_grad_D + o - last, total, mask=(o >= last) & (o < last + D))
        if p_grad_bias is not None:
            tl.store(p_grad_bias + o - last - D, total, mask=(o >= last + D) & m)
