"""Vectors of sixteen numbers that a compiled loop keeps in a variable, and the operations on them.

numba leaves it to LLVM whether a loop becomes vector code, and short loops that store something mostly do not. Here
each operation is one or two LLVM instructions on 16 lanes, which LLVM fits to the registers that the CPU has.

All functions but `aligned` are for compiled loops. They load from and store to arrays that are flat and aligned, at
indices that are multiples of LANES.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import PrimitiveModel, register_default
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from torchrec_cce.jit import jit

LANES = 16
HIGHEST = np.int32(2**31 - 1)
"""More than the bits of every float32, and more than every row of a table."""
_ALIGNMENT = 64

_operation = cast(Callable[[Callable[..., Any]], Callable[..., Any]], intrinsic)


def aligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A flat copy of `array` that starts at a multiple of 64 bytes, so that no vector crosses a cache line."""
    memory = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype)
    copy[:] = array.reshape(-1)
    return copy


@jit
def aligned_floats(size: int) -> npt.NDArray[np.float32]:
    """[size] float32, not initialised, for compiled loops."""
    memory = np.empty(size + LANES, np.float32)
    start = -(memory.ctypes.data // 4) % LANES
    return memory[start : start + size]


@jit
def aligned_ints(size: int) -> npt.NDArray[np.int32]:
    """[size] int32, not initialised, for compiled loops."""
    memory = np.empty(size + LANES, np.int32)
    start = -(memory.ctypes.data // 4) % LANES
    return memory[start : start + size]


class _Vector(types.Type):
    def __init__(self, scalar: Any) -> None:
        self.scalar = scalar
        super().__init__(f"vector of {LANES} {scalar}")


@register_default(_Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: _Vector) -> None:
        super().__init__(manager, kind, _llvm_of[kind])


_floats, _ints = _Vector(types.float32), _Vector(types.int32)
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
_llvm_of = {_floats: _FLOATS, _ints: _INTS}
_ZEROS = ir.Constant(_FLOATS, [0.0] * LANES)


def _call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def _address(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    data = make_array(array_type)(context, builder, value=array).data
    vector = ir.VectorType(data.type.pointee, LANES)
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def _spread(builder: Any, value: Any) -> Any:
    vector = ir.VectorType(value.type, LANES)
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_INTS, [0] * LANES))


def _mask(builder: Any, lanes: Any) -> Any:
    return builder.zext(builder.bitcast(lanes, ir.IntType(LANES)), ir.IntType(64))


@_operation
def load(_context: Any, array: Any, _at: Any) -> Any:
    """`array[at : at + LANES]`, of float32 or int32."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(_address(context, builder, signature.args[0], *values), align=_ALIGNMENT)

    return (_floats if array.dtype == types.float32 else _ints)(array, types.intp), generate


@_operation
def store(_context: Any, array: Any, _at: Any, vector: Any) -> Any:
    """`array[at : at + LANES] = vector`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[2], _address(context, builder, signature.args[0], *values[:2]), align=_ALIGNMENT)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@_operation
def spread(_context: Any, value: Any) -> Any:
    """A float32 or int32 in every lane."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return _spread(builder, values[0])

    return (_floats if value == types.float32 else _ints)(value), generate


@_operation
def add_square(_context: Any, _total: Any, _left: Any, _right: Any) -> Any:
    """`total + (left − right)²`: the difference is rounded, and then the rest is rounded once, as by `fma`."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        gap = builder.fsub(values[1], values[2])
        return _call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, gap, gap, values[0])

    return _floats(_floats, _floats, _floats), generate


@_operation
def add_square_outside(_context: Any, _total: Any, _value: Any, _low: Any, _high: Any) -> Any:
    """`total + gap²`, where `gap` is from `value` to the interval `low..high`, zero inside it; rounded likewise."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        total, value, low, high = values
        below, above = builder.fsub(low, value), builder.fsub(value, high)
        gap = builder.select(builder.fcmp_ordered(">", below, above), below, above)
        gap = builder.select(builder.fcmp_ordered(">", gap, _ZEROS), gap, _ZEROS)
        return _call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, gap, gap, total)

    return _floats(_floats, _floats, _floats, _floats), generate


@_operation
def bits(_context: Any, _vector: Any) -> Any:
    """The float32 lanes as int32. Of floats that are not negative, the smaller has the smaller bits."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], _INTS)

    return _ints(_floats), generate


@_operation
def float_of(_context: Any, _value: Any) -> Any:
    """The float32 that has the bits of an int32."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.FloatType())

    return types.float32(types.int32), generate


@_operation
def smaller(_context: Any, _left: Any, _right: Any) -> Any:
    """The smaller of two int32 in each lane."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return _call(builder, f"llvm.smin.v{LANES}i32", _INTS, *values)

    return _ints(_ints, _ints), generate


@_operation
def smallest(_context: Any, _vector: Any) -> Any:
    """The smallest of the int32 lanes."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return _call(builder, f"llvm.vector.reduce.smin.v{LANES}i32", ir.IntType(32), values[0])

    return types.int32(_ints), generate


@_operation
def where_equal(_context: Any, _vector: Any, _value: Any, _chosen: Any) -> Any:
    """The lanes of `chosen` where the int32 `vector` is `value`, elsewhere HIGHEST."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        vector, value, chosen = values
        equal = builder.icmp_signed("==", vector, _spread(builder, value))
        return builder.select(equal, chosen, ir.Constant(_INTS, [int(HIGHEST)] * LANES))

    return _ints(_ints, types.int32, _ints), generate


@_operation
def at_most(_context: Any, _vector: Any, _value: Any) -> Any:
    """An int64 in which bit i is set where lane i of the int32 `vector` is at most `value`."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return _mask(builder, builder.icmp_signed("<=", values[0], _spread(builder, values[1])))

    return types.int64(_ints, types.int32), generate


@_operation
def lowest_bit(_context: Any, _mask: Any) -> Any:
    """The index of the lowest bit that is set in an int64 other than 0."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.cttz(values[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@_operation
def nearer(_context: Any, _code: Any, _best: Any, _row: Any, _distance: Any) -> Any:
    """`row` where `distance < best`, the smaller of `row` and `code` where the two are equal, and else `code`."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        code, best, row, distance = values
        at_par = _call(builder, f"llvm.smin.v{LANES}i32", _INTS, code, row)
        kept = builder.select(builder.icmp_signed("==", distance, best), at_par, code)
        return builder.select(builder.icmp_signed("<", distance, best), row, kept)

    return _ints(_ints, _ints, _ints, _ints), generate


@_operation
def bits_of(_context: Any, _value: Any) -> Any:
    """The int32 that has the bits of a float32."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.IntType(32))

    return types.int32(types.float32), generate


@_operation
def spread_at(_context: Any, array: Any, _at: Any) -> Any:
    """`array[at]` of float32 in every lane, at any index that is not negative."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = make_array(signature.args[0])(context, builder, value=values[0]).data
        return _spread(builder, builder.load(builder.gep(data, [values[1]])))

    return _floats(array, types.intp), generate


@_operation
def add_product(_context: Any, _total: Any, _left: Any, _right: Any) -> Any:
    """`total + left·right`, rounded once."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        total, left, right = values
        return _call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, left, right, total)

    return _floats(_floats, _floats, _floats), generate


@_operation
def lower(_context: Any, _left: Any, _right: Any) -> Any:
    """The lower of two float32 in each lane; `right` where either is NaN."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *values), *values)

    return _floats(_floats, _floats), generate


@_operation
def higher(_context: Any, _left: Any, _right: Any) -> Any:
    """The higher of two float32 in each lane; `right` where either is NaN."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *values), *values)

    return _floats(_floats, _floats), generate


@_operation
def where_lower(_context: Any, _left: Any, _right: Any, _chosen: Any, _otherwise: Any) -> Any:
    """The int32 `chosen` in the lanes where the float32 `left` is lower than `right`, and else `otherwise`."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        left, right, chosen, otherwise = values
        return builder.select(builder.fcmp_ordered("<", left, right), chosen, otherwise)

    return _ints(_floats, _floats, _ints, _ints), generate


@_operation
def not_higher(_context: Any, _left: Any, _right: Any) -> Any:
    """An int64 in which bit i is set where lane i of the float32 `left` is at most that of `right`."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return _mask(builder, builder.fcmp_ordered("<=", *values))

    return types.int64(_floats, _floats), generate
