"""One way to compile a hot loop: `@jit`, numba's nopython mode with the GIL released and the result cached on disk."""

import hashlib
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import ParamSpec, TypeVar, cast

import numba
import numpy as np
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic

P = ParamSpec("P")
R = TypeVar("R")
_CONSTANTS = (bool, int, float, str, tuple, np.generic)


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` at its first call for each combination of argument types.

    Overflow wraps, there is no bounds checking, and one thread runs it: callers slice work over threads themselves.

    numba takes a cached result for valid as long as the function's own file has the same size and time, although the
    functions it calls and the constants it reads are compiled into it. Here those, of whatever file, count as well.
    They must be defined before `function`.
    """
    compiled = numba.njit(nogil=True, cache=True)(function)
    file = compiled._cache._cache_file
    file._source_stamp = (file._source_stamp, digest(compiled))
    return cast(Callable[P, R], compiled)


def digest(compiled: Dispatcher) -> str:
    """SHA-256 of what is compiled into `compiled`: its code, what it calls, and the constants they read."""
    parts: list[str] = []
    _collect(compiled, parts, set())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _collect(value: object, parts: list[str], seen: set[int]) -> None:
    if isinstance(value, _CONSTANTS):
        parts.append(repr(value))
        return
    function = getattr(value, "py_func" if isinstance(value, Dispatcher) else "_defn", None)
    if not isinstance(value, Dispatcher | _Intrinsic) or id(function) in seen:
        return
    assert isinstance(function, FunctionType)
    seen.add(id(function))
    names = _collect_code(function.__code__, parts)
    free = dict(
        zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
    )
    for name in names:
        parts.append(name)
        _collect(free.get(name, function.__globals__.get(name)), parts, seen)


def _collect_code(code: CodeType, parts: list[str]) -> list[str]:
    """Adds `code`, and returns the names that it and the functions inside it use."""
    names = [*code.co_names, *code.co_freevars]
    parts += [code.co_code.hex(), repr(names)]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names += _collect_code(constant, parts)
        else:
            parts.append(repr(constant))
    return names
