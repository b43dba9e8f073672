"""Rows of floats at addresses in memory, held in a variable of a compiled loop, and the operations on them.

A loop over several tables has their addresses, not arrays. How many floats a row has is the length of a tuple, `width`,
so that every width is compiled by itself and LLVM fits the row to the registers that the CPU has. All functions are for
compiled loops; addresses are uint64, and what is there must be memory of the caller's.
"""

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import PrimitiveModel, register_default
from numba.extending import intrinsic

MAX_WIDTH = 64
"""Floats: a wider row is taken in parts."""

_FLOAT_BYTES = 4
_operation = cast(Callable[[Callable[..., Any]], Callable[..., Any]], intrinsic)


class _Row(types.Type):
    def __init__(self, width: int) -> None:
        self.llvm = ir.VectorType(ir.FloatType(), width)
        super().__init__(f"row of {width} floats")


@register_default(_Row)
class _RowModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: _Row) -> None:
        super().__init__(manager, kind, kind.llvm)


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, nothing, zeros)


@_operation
def load_row(_context: Any, _address: Any, width: Any) -> Any:
    """The row at an address, of as many floats as the tuple `width` is long."""
    row = _Row(len(width))

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.load(_at(builder, values[0], row.llvm), align=_FLOAT_BYTES)

    return row(types.uint64, width), generate


@_operation
def store_row(_context: Any, _address: Any, row: Any) -> Any:
    """Write a row to an address."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        builder.store(values[1], _at(builder, values[0], row.llvm), align=_FLOAT_BYTES)
        return context.get_dummy_value()

    return types.void(types.uint64, row), generate


@_operation
def zero_row(_context: Any, width: Any) -> Any:
    """A row of zeros."""
    row = _Row(len(width))

    def generate(_context: Any, _builder: Any, _signature: Any, _values: Any) -> Any:
        return ir.Constant(row.llvm, [0.0] * row.llvm.count)

    return row(width), generate


@_operation
def clear(_context: Any, _address: Any, _num_bytes: Any) -> Any:
    """Write zeros to so many bytes at an address."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        cgutils.memset(builder, _at(builder, values[0], ir.IntType(8)), values[1], 0)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generate


@_operation
def add(_context: Any, left: Any, _right: Any) -> Any:
    """`left + right`."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.fadd(*values)

    return left(left, left), generate


@_operation
def scale(_context: Any, row: Any, _factor: Any) -> Any:
    """`row · factor`, a float32."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.fmul(values[0], _spread(builder, values[1], row.llvm))

    return row(row, types.float32), generate


@_operation
def add_scaled(_context: Any, total: Any, _row: Any, _factor: Any) -> Any:
    """`total + row · factor`, rounded once, as FBGEMM and PyTorch do it."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        kind = total.llvm
        name = f"llvm.fma.v{kind.count}f32"
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return builder.call(fma, [values[1], _spread(builder, values[2], kind), values[0]])

    return total(total, total, types.float32), generate


@_operation
def sum_of_squares(_context: Any, row: Any) -> Any:
    """float32: halves of the row are added until a number is left, which takes as many steps as its width has bits."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        squares, size = builder.fmul(values[0], values[0]), row.llvm.count
        while size > 1:
            low, size = -(-size // 2), size // 2
            nothing = ir.Constant(squares.type, [0.0] * squares.type.count)
            halves = [
                builder.shuffle_vector(squares, nothing, ir.Constant(ir.VectorType(ir.IntType(32), low), at))
                for at in (list(range(low)), [*range(low, low + size), *[low + size] * (low - size)])
            ]
            squares, size = builder.fadd(*halves), low
        return builder.extract_element(squares, ir.Constant(ir.IntType(32), 0))

    return types.float32(row), generate


@_operation
def load_word(_context: Any, _address: Any) -> Any:
    """The 64-bit word at an address, which need not be a multiple of 8."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.load(_at(builder, values[0], ir.IntType(64)), align=1)

    return types.uint64(types.uint64), generate


@_operation
def load_byte(_context: Any, _address: Any) -> Any:
    """The byte at an address, as uint64."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.zext(builder.load(_at(builder, values[0], ir.IntType(8)), align=1), ir.IntType(64))

    return types.uint64(types.uint64), generate


@_operation
def prefetch_at(_context: Any, _address: Any) -> Any:
    """Start loading what is at an address. It is only a hint: a wild address reads nothing."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # read, little temporal locality (a map is far larger than any cache), data
        builder.call(function, [_at(builder, values[0], ir.IntType(8)), flag(0), flag(1), flag(1)])
        return context.get_dummy_value()

    return types.void(types.uint64), generate
