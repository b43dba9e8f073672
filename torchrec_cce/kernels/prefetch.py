"""`prefetch(array, i)` for compiled loops: ask for the cache line of `array[i]` before it is needed."""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_typing_context: Any, array: Any, _index: Any) -> Any:
    """Start loading `array[index]` (any number of dimensions). It is only a hint: a wild index reads nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        struct = context.make_array(signature.args[0])(context, builder, arguments[0])
        row_bytes = cgutils.unpack_tuple(builder, struct.strides)[0]
        base = builder.ptrtoint(struct.data, row_bytes.type)
        address = builder.add(base, builder.mul(arguments[1], row_bytes))
        pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        declared = ir.FunctionType(ir.VoidType(), [pointer.type, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, declared, "llvm.prefetch.p0")
        # read, little temporal locality (a map is far larger than any cache), data
        builder.call(function, [pointer, flag(0), flag(1), flag(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
