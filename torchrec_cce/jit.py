"""One way to compile a hot loop: `@jit`, numba's nopython mode with the GIL released and the result cached on disk.

`prefetch(array, i)` is for such loops: ask for the cache line of `array[i]` before it is needed.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.caching import IndexDataCacheFile
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic
from numba.extending import intrinsic

P = ParamSpec("P")
R = TypeVar("R")
_DIGEST_BYTES = 32
_CONSTANTS = (bool, int, float, str, tuple, np.generic)


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` at its first call for each combination of argument types.

    Overflow wraps, there is no bounds checking, and one thread runs it: callers slice work over threads themselves.

    numba takes a cached result for valid as long as the function's own file has not changed, although the functions it
    calls and the constants it reads are compiled into it. Here those, of whatever file, count as well. They must be
    defined before `function`.
    """
    compiled = numba.njit(nogil=True, cache=True)(function)
    file = compiled._cache._cache_file
    file.__class__ = _CheckedFile
    file._source_stamp = (file._source_stamp, _digest(function))
    return cast(Callable[P, R], compiled)


class _CheckedFile(IndexDataCacheFile):
    """numba's cached results with a SHA-256 behind each file: what is damaged is compiled anew, and never run.

    The files stay such as numba reads, which looks at nothing behind the end of a pickle.
    """

    def _load_index(self) -> Any:
        return super()._load_index() if _is_whole(self._index_path) else {}

    def _load_data(self, name: str) -> Any:
        path = self._data_path(name)
        if not _is_whole(path):
            raise OSError(f"{path}: damaged, or of an older release")  # which numba takes for a file that has gone
        return super()._load_data(name)

    @contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[BytesIO]:
        with super()._open_for_write(filepath) as file:
            content = BytesIO()
            yield content
            file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest())


def _is_whole(path: str) -> bool:
    try:
        content = Path(path).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _digest(function: Callable[..., object]) -> str:
    """SHA-256 of what is compiled into `function`: its code, what it calls, and the constants they read."""
    parts: list[str] = []
    _add_function(function, parts, set())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _add_function(function: Callable[..., object], parts: list[str], seen: set[int]) -> None:
    assert isinstance(function, FunctionType)
    if id(function) in seen:
        return
    seen.add(id(function))
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    values = {**function.__globals__, **dict(zip(function.__code__.co_freevars, cells, strict=True))}
    for name in _add_code(function.__code__, parts):
        value = values.get(name)
        parts.append(name)
        if isinstance(value, Dispatcher):
            _add_function(value.py_func, parts, seen)
        elif isinstance(value, _Intrinsic):
            _add_function(value._defn, parts, seen)
        elif isinstance(value, _CONSTANTS):
            parts.append(repr(value))


def _add_code(code: CodeType, parts: list[str]) -> list[str]:
    """Returns the names that `code` and the functions inside it use."""
    names = [*code.co_names, *code.co_freevars]
    parts += [code.co_code.hex(), repr(names)]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names += _add_code(constant, parts)
        else:
            parts.append(repr(constant))
    return names


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
