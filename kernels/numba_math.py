"""Functions of one number that Numba kernels call on every element.

Each is emitted as LLVM instructions without branches or calls (the float64 exponential apart), so that the loops around
them vectorise.

Importing this module imports Numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

_SHORT, _WORD, _SINGLE = ir.IntType(16), ir.IntType(32), ir.FloatType()

# adding 1.5 * 2**23 leaves the nearest integer of a small float32 in the lowest bits of its mantissa
_ROUNDER, _ROUNDER_BITS = 12582912.0, 0x4B400000
_LOG2_E = 1.4426950408889634
# ln 2 in two parts, the first of 9 bits, whose multiples in use are exact
_LN2_HIGH, _LN2_LOW = 0.693359375, -0.00021219444170128554
_LN2 = 0.6931471805599453
# below the lower bound exp rounds to 0, above the upper one to infinity
_EXP_BOUNDS = (-104.0, 89.0)
# below the lower bound 1 + exp rounds to 1, above the upper one its inverse vanishes beside every normal number
_SIGMOID_BOUNDS = (-87.0, 89.0)
# (exp(r) - 1 - r) / r**2 on |r| <= ln(2) / 2, highest power first: minimax, 3e-9 of exp
_EXP_COEFFICIENTS = (0.0013814320554956794, 0.00836885068565607, 0.041668400168418884, 0.1666651964187622, 0.49999994)
# below the lower bound exp_decay is 0, above the upper one infinity
_DECAY_BOUNDS = (-88.0, 89.0)
# (log(1 + y) - y) / y**2 for y from 0 to 1, highest power first: minimax, 1e-9 of log1p
_LOG1P_COEFFICIENTS = (
    0.0020729470238311618,
    -0.013631473708026268,
    0.0419813377654847,
    -0.08307402813445573,
    0.1246711834569044,
    -0.16129333337501214,
    0.198979312017712,
    -0.24988578865199831,
    0.3333268976242757,
    -0.4999998729028321,
)


@intrinsic
def exp(typing_context: Any, x: types.Type) -> Any:
    """``exp(x)``: within 2 units in the last place in float32, subnormal results included; libm's in float64."""
    return _exp(x)


@intrinsic
def sigmoid(typing_context: Any, x: types.Type) -> Any:
    """``1 / (1 + exp(-x))``: within 6 units in the last place in float32 where that is normal."""
    if x == types.float32:
        return x(x), lambda context, builder, signature, values: _sigmoid_single(builder, values[0])
    if x == types.float64:

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
            one = ir.Constant(ir.DoubleType(), 1.0)
            exponential = builder.module.declare_intrinsic("llvm.exp", [ir.DoubleType()])
            return builder.fdiv(one, builder.fadd(one, builder.call(exponential, [builder.fneg(values[0])])))

        return x(x), generate
    raise TypingError(f"sigmoid takes float32 or float64, got {x}")


@intrinsic
def exp_decay(typing_context: Any, x: types.Type) -> Any:
    """``exp(x)`` in fewer instructions: its relative error in float32 is below ``1e-7 + 3e-9 |x|``.

    That makes an absolute error of one unit in the last place of 1 where x is negative. 0 below the normal numbers. In
    float64 and complex128 as :func:`exp`.
    """
    if x == types.float32:
        return x(x), lambda context, builder, signature, values: _exp_decay_single(builder, values[0])
    return _exp(x)


@intrinsic
def softplus(typing_context: Any, x: types.Type) -> Any:
    """``log(1 + exp(x))``: within 3 units in the last place in float32 where that is normal; libm's in float64."""
    if x == types.float32:
        return x(x), lambda context, builder, signature, values: _softplus_single(builder, values[0])
    if x == types.float64:

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
            kind = ir.DoubleType()
            exponential = builder.module.declare_intrinsic("llvm.exp", [kind])
            logarithm = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), "log1p")
            low, high = _around_zero(builder, values[0])
            return builder.fadd(high, builder.call(logarithm, [builder.call(exponential, [low])]))

        return x(x), generate
    raise TypingError(f"softplus takes float32 or float64, got {x}")


@intrinsic
def cast(typing_context: Any, value: types.Type, like: types.Type) -> Any:
    """``value`` in the type of ``like``: beside a bare number, Numba would compute in float64."""
    return like(value, like), lambda context, builder, signature, values: context.cast(builder, values[0], value, like)


@intrinsic
def choose(typing_context: Any, condition: types.Type, yes: types.Type, no: types.Type) -> Any:
    """``yes if condition else no`` of two numbers of one type, without the branch that would keep a loop scalar."""
    return yes(condition, yes, yes), lambda context, builder, signature, values: builder.select(*values)


@intrinsic
def reassociable_add(typing_context: Any, x: types.Type, y: types.Type) -> Any:
    """``x + y`` in a sum whose order is the compiler's choice: a loop that adds with it vectorises."""
    return x(x, x), lambda context, builder, signature, values: builder.fadd(*values, flags=("reassoc", "contract"))


@intrinsic
def conjugate(typing_context: Any, x: types.Type) -> Any:
    """The complex conjugate; real numbers as they are."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
        if not isinstance(x, types.Complex):
            return values[0]
        number = context.make_complex(builder, x, value=values[0])
        number.imag = builder.fneg(number.imag)
        return number._getvalue()

    return x(x), generate


def _word(value: int) -> ir.Constant:
    return ir.Constant(_WORD, value)


def _single(value: float) -> ir.Constant:
    return ir.Constant(_SINGLE, value)


def _bits(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return builder.bitcast(x, _WORD)


def _exp(x: types.Type) -> Any:
    if x == types.float32:
        return x(x), lambda context, builder, signature, values: _exp_single(builder, values[0])
    if x == types.float64:
        return x(x), lambda context, builder, signature, values: builder.call(
            builder.module.declare_intrinsic("llvm.exp", [ir.DoubleType()]), values
        )
    if x == types.complex128:
        return x(x), _exp_complex
    raise TypingError(f"exp takes float32, float64 or complex128, got {x}")


def _exp_single(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x) = 2**n exp(r) with n = round(x / ln 2)."""
    value, n = _exp_parts(builder, x, _EXP_BOUNDS, (_LN2_HIGH, _LN2_LOW))
    # 2**n in two factors: n runs from -150 to 128, beyond the exponents of one float32
    half = builder.ashr(n, _word(1))
    for exponent in (half, builder.sub(n, half)):
        value = builder.fmul(value, _power_of_two(builder, exponent))
    return value


def _sigmoid_single(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """1 / (1 + exp(-x)): beside the 1 a coarser exponential will do, and its n is the exponent of one float32."""
    value, n = _exp_parts(builder, builder.fneg(x), _SIGMOID_BOUNDS, (_LN2,))
    small = builder.fmul(value, _power_of_two(builder, n))
    return builder.fdiv(_single(1.0), builder.fadd(_single(1.0), small))


def _exp_complex(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
    """exp(a) (cos b + i sin b)."""
    number = context.make_complex(builder, types.complex128, value=values[0])
    size, cosine, sine = (
        builder.call(builder.module.declare_intrinsic(f"llvm.{name}", [x.type]), [x])
        for name, x in (("exp", number.real), ("cos", number.imag), ("sin", number.imag))
    )
    number.real, number.imag = builder.fmul(size, cosine), builder.fmul(size, sine)
    return number._getvalue()


def _exp_decay_single(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x) = 2**n exp(r), where the rounding to n leaves the bits of 2**n."""
    multiply_add = _multiply_add(builder)
    low, high = map(_single, _DECAY_BOUNDS)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
    shifted = multiply_add(x, _single(_LOG2_E), _single(_ROUNDER + 127))
    r = multiply_add(builder.fsub(shifted, _single(_ROUNDER + 127)), _single(-_LN2), x)
    scale = builder.bitcast(builder.shl(_bits(builder, shifted), _word(23)), _SINGLE)
    polynomial = _single(_EXP_COEFFICIENTS[0])
    for coefficient in (*_EXP_COEFFICIENTS[1:], 1.0, 1.0):
        polynomial = multiply_add(polynomial, r, _single(coefficient))
    return builder.fmul(polynomial, scale)


def _softplus_single(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """max(x, 0) + log(1 + y) with y = exp(-|x|), between 0 and 1."""
    multiply_add = _multiply_add(builder)
    low, high = _around_zero(builder, x)
    y = _exp_single(builder, low)
    polynomial = _single(_LOG1P_COEFFICIENTS[0])
    for coefficient in _LOG1P_COEFFICIENTS[1:]:
        polynomial = multiply_add(polynomial, y, _single(coefficient))
    return builder.fadd(high, multiply_add(builder.fmul(y, y), polynomial, y))


def _around_zero(builder: ir.IRBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """-|x| and max(x, 0); both NaN where x is."""
    zero, negative = ir.Constant(x.type, 0.0), builder.fneg(x)
    below = builder.fcmp_ordered("<", x, zero)
    return builder.select(below, x, negative), builder.select(below, zero, x)


def _multiply_add(builder: ir.IRBuilder) -> Callable[[ir.Value, ir.Value, ir.Value], ir.Value]:
    fma = builder.module.declare_intrinsic("llvm.fmuladd", [_SINGLE], ir.FunctionType(_SINGLE, [_SINGLE] * 3))
    return lambda a, b, c: builder.call(fma, [a, b, c])


def _power_of_two(builder: ir.IRBuilder, n: ir.Value) -> ir.Value:
    """2**n from -126 to 127, and infinity for 128."""
    return builder.bitcast(builder.shl(builder.add(n, _word(127)), _word(23)), _SINGLE)


def _exp_parts(
    builder: ir.IRBuilder, x: ir.Value, bounds: tuple[float, float], ln2: tuple[float, ...]
) -> tuple[ir.Value, ir.Value]:
    """exp(r) and n, with x between the bounds, n = round(x / ln 2) and r = x - n ln 2, of a sum of parts of ln 2."""
    multiply_add = _multiply_add(builder)
    # ordered comparisons are false for NaN, which therefore passes through
    low, high = map(_single, bounds)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
    shifted = multiply_add(x, _single(_LOG2_E), _single(_ROUNDER))
    n = builder.sub(_bits(builder, shifted), _word(_ROUNDER_BITS))
    whole = builder.fsub(shifted, _single(_ROUNDER))
    r = x
    for part in ln2:
        r = multiply_add(whole, _single(-part), r)
    polynomial = _single(_EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        polynomial = multiply_add(polynomial, r, _single(coefficient))
    return builder.fadd(multiply_add(builder.fmul(r, r), polynomial, r), _single(1.0)), n


def widen_bfloat16(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Emits the float32 of bfloat16 bits."""
    return builder.bitcast(builder.shl(builder.zext(x, _WORD), _word(16)), _SINGLE)


def narrow_bfloat16(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Emits the bits of the bfloat16 nearest to a float32, ties to even."""
    bits = _bits(builder, x)
    high = builder.lshr(bits, _word(16))
    bias = builder.add(builder.and_(high, _word(1)), _word(0x7FFF))
    rounded = builder.lshr(builder.add(bits, bias), _word(16))
    quiet = builder.or_(high, _word(0x40))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", x, x), quiet, rounded), _SHORT)


def widen_float16(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Emits the float32 of float16 bits."""
    bits = builder.zext(x, _WORD)
    sign = builder.shl(builder.and_(bits, _word(0x8000)), _word(16))
    placed = builder.shl(builder.and_(bits, _word(0x7FFF)), _word(13))
    exponent = builder.and_(placed, _word(0x1F << 23))
    normal = builder.add(placed, _word((127 - 15) << 23))
    special = builder.add(placed, _word((255 - 31) << 23))
    # with one added to the exponent, less that power of two: exact, and no float32 on the way is subnormal
    above = builder.bitcast(builder.add(placed, _word((127 - 14) << 23)), _SINGLE)
    subnormal = _bits(builder, builder.fsub(above, _single(2.0**-14)))
    magnitude = builder.select(builder.icmp_unsigned("==", exponent, _word(0x1F << 23)), special, normal)
    magnitude = builder.select(builder.icmp_unsigned("==", exponent, _word(0)), subnormal, magnitude)
    return builder.bitcast(builder.or_(magnitude, sign), _SINGLE)


def narrow_float16(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Emits the bits of the float16 nearest to a float32, ties to even."""
    bits = _bits(builder, x)
    sign = builder.and_(builder.lshr(bits, _word(16)), _word(0x8000))
    magnitude = builder.and_(bits, _word(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, _word(13)), _word(1))
    rebiased = builder.sub(magnitude, _word(((127 - 15) << 23) - 0xFFF))
    normal = builder.lshr(builder.add(rebiased, odd), _word(13))
    # the unit in the last place of 0.5 is that of a subnormal float16
    raised = builder.fadd(builder.bitcast(magnitude, _SINGLE), _single(0.5))
    subnormal = builder.sub(_bits(builder, raised), _word(126 << 23))
    result = builder.select(builder.icmp_unsigned("<", magnitude, _word(113 << 23)), subnormal, normal)
    result = builder.select(builder.icmp_unsigned(">=", magnitude, _word(143 << 23)), _word(0x7C00), result)
    result = builder.select(builder.icmp_unsigned(">", magnitude, _word(255 << 23)), _word(0x7E00), result)
    return builder.trunc(builder.or_(result, sign), _SHORT)
