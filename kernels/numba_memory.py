"""How Numba kernels reach memory: rows without bookkeeping, and elements of any dtype in a form that vectorises.

NumPy has no bfloat16 and Numba no 16-bit floats on the CPU: inside kernels **uint16 stands for bfloat16 and int16 for
float16**, which is how :func:`seqzoo.kernels.numba_runtime.array` passes them. :func:`read` widens them to float32,
:func:`write` rounds to them.

A loop over several rows vectorises only if they are known not to overlap. LLVM otherwise compares all their addresses
before each row, which costs as much as 100 elements. So each access names its *stream*, a literal number from 0 to 15:
**within one compiled function, what is reached through different streams must not overlap**.

Importing this module imports Numba.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from seqzoo.kernels.numba_math import narrow_bfloat16, narrow_float16, widen_bfloat16, widen_float16

_STREAMS = 16
_WIDENING = {types.uint16: widen_bfloat16, types.int16: widen_float16}
_NARROWING = {types.uint16: narrow_bfloat16, types.int16: narrow_float16}


@intrinsic
def part(typing_context: Any, array: types.Array, first: types.Integer, count: types.Integer) -> Any:
    """``array[first : first + count]`` of a flat array, unchecked; the array has to outlive it.

    A slice counts references, with atomic operations: twice the time of a row of 64 elements.
    """
    result = types.Array(array.dtype, 1, "C")

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
        whole = make_array(array)(context, builder, values[0])
        start, length = (
            context.cast(builder, value, kind, types.intp) for value, kind in ((values[1], first), (values[2], count))
        )
        view = make_array(result)(context, builder)
        populate_array(
            view,
            data=builder.gep(whole.data, [start]),
            shape=[length],
            strides=[whole.itemsize],
            itemsize=whole.itemsize,
            meminfo=None,
        )
        return view._getvalue()

    return result(array, first, count), generate


@intrinsic(prefer_literal=True)
def read(typing_context: Any, array: types.Array, index: types.Integer, stream: types.IntegerLiteral) -> Any:
    """``array[index]`` in the type that arithmetic uses, unchecked: float32 for the 16-bit types."""
    widening = _WIDENING.get(array.dtype)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
        value = builder.load(_address(context, builder, array, index, values))
        _tag(builder, value, stream.literal_value)
        return value if widening is None else widening(builder, value)

    return (array.dtype if widening is None else types.float32)(array, index, stream), generate


@intrinsic(prefer_literal=True)
def write(
    typing_context: Any, array: types.Array, index: types.Integer, value: types.Number, stream: types.IntegerLiteral
) -> Any:
    """``array[index] = value``, unchecked; rounded to nearest, ties to even."""
    narrowing = _NARROWING.get(array.dtype)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
        number = context.cast(builder, values[2], value, array.dtype if narrowing is None else types.float32)
        if narrowing is not None:
            number = narrowing(builder, number)
        address = _address(context, builder, array, index, values)
        _tag(builder, builder.store(number, address), stream.literal_value)
        return context.get_dummy_value()

    return types.void(array, index, value, stream), generate


def _address(
    context: Any, builder: ir.IRBuilder, array: types.Array, index: types.Integer, values: list[ir.Value]
) -> ir.Value:
    data = make_array(array)(context, builder, values[0]).data
    return builder.gep(data, [context.cast(builder, values[1], index, types.intp)])


def _tag(builder: ir.IRBuilder, access: ir.Instruction, stream: int) -> None:
    """Marks an access as disjoint from those of all other streams of this function, wherever it is inlined."""
    module, name = builder.module, builder.function.name
    domain = module.add_metadata([ir.MetaDataString(module, f"streams of {name}")])
    scopes = [
        module.add_metadata([ir.MetaDataString(module, f"stream {number} of {name}"), domain])
        for number in range(_STREAMS)
    ]
    access.set_metadata("alias.scope", module.add_metadata([scopes.pop(stream)]))
    access.set_metadata("noalias", module.add_metadata(scopes))
