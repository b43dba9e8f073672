"""One way to compile a hot loop: `@jit`, numba's nopython mode with the GIL released and the result cached on disk."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` at its first call for each combination of argument types.

    Overflow wraps, there is no bounds checking, and one thread runs it: callers slice work over threads themselves.
    """
    return cast(Callable[P, R], numba.njit(nogil=True, cache=True)(function))
