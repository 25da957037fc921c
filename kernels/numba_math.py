"""Functions of one number that Numba kernels call on every element.

Each is emitted as LLVM instructions without branches or calls (the float64 exponential apart), so that the loops around
them vectorise.

Importing this module imports Numba.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

_SHORT, _WORD, _SINGLE = ir.IntType(16), ir.IntType(32), ir.FloatType()

# adding 1.5 * 2**23 leaves the nearest integer of a small float32 in the lowest bits of its mantissa
_ROUNDER, _ROUNDER_BITS = 12582912.0, 0x4B400000
_LOG2_E = 1.4426950408889634
# ln 2 in two parts, the first of 9 bits, whose multiples in use are exact
_LN2_HIGH, _LN2_LOW = 0.693359375, -0.00021219444170128554
# below the lower bound exp rounds to 0, above the upper one to infinity
_EXP_BOUNDS = (-104.0, 89.0)
# (exp(r) - 1 - r) / r**2 on |r| <= ln(2) / 2, highest power first: minimax, 3e-9 of exp
_EXP_COEFFICIENTS = (0.0013814320554956794, 0.00836885068565607, 0.041668400168418884, 0.1666651964187622, 0.49999994)


@intrinsic
def exp(typing_context: Any, x: types.Type) -> Any:
    """``exp(x)``: within 2 units in the last place in float32, subnormal results included; libm's in float64."""
    if x == types.float32:
        return x(x), lambda context, builder, signature, values: _exp_single(builder, values[0])
    if x == types.float64:
        return x(x), lambda context, builder, signature, values: builder.call(
            builder.module.declare_intrinsic("llvm.exp", [ir.DoubleType()]), values
        )
    raise TypingError(f"exp takes float32 or float64, got {x}")


@intrinsic
def cast(typing_context: Any, value: types.Type, like: types.Type) -> Any:
    """``value`` in the type of ``like``: beside a bare number, Numba would compute in float64."""
    return like(value, like), lambda context, builder, signature, values: context.cast(builder, values[0], value, like)


@intrinsic
def choose(typing_context: Any, condition: types.Type, yes: types.Type, no: types.Type) -> Any:
    """``yes if condition else no`` of two numbers of one type, without the branch that would keep a loop scalar."""
    return yes(condition, yes, yes), lambda context, builder, signature, values: builder.select(*values)


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


def _exp_single(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x) = 2**n exp(r) with n = round(x / ln 2)."""
    fma = builder.module.declare_intrinsic("llvm.fmuladd", [_SINGLE], ir.FunctionType(_SINGLE, [_SINGLE] * 3))

    def multiply_add(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return builder.call(fma, [a, b, c])

    # ordered comparisons are false for NaN, which therefore passes through
    low, high = map(_single, _EXP_BOUNDS)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
    shifted = multiply_add(x, _single(_LOG2_E), _single(_ROUNDER))
    n = builder.sub(_bits(builder, shifted), _word(_ROUNDER_BITS))
    whole = builder.fsub(shifted, _single(_ROUNDER))
    r = multiply_add(whole, _single(-_LN2_HIGH), x)
    r = multiply_add(whole, _single(-_LN2_LOW), r)
    polynomial = _single(_EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        polynomial = multiply_add(polynomial, r, _single(coefficient))
    value = builder.fadd(multiply_add(builder.fmul(r, r), polynomial, r), _single(1.0))
    # 2**n in two factors: n runs from -150 to 128, beyond the exponents of one float32
    half = builder.ashr(n, _word(1))
    for exponent in (half, builder.sub(n, half)):
        scale = builder.shl(builder.add(exponent, _word(127)), _word(23))
        value = builder.fmul(value, builder.bitcast(scale, _SINGLE))
    return value


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
