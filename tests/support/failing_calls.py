"""Every call on a file or a store fails in its turn: what is there then, and whether the next try succeeds."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tests.support.file_calls import watched
from torchrec_cce.errors import CCEError


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Something to be done in a folder, and what may be there when it did not succeed."""

    prepared: Path
    """The folder before; it is copied for each try."""
    act: Callable[[Path], object]
    """Do it, in a copy. It is called again after it failed, and must succeed then."""
    wrong: Callable[[Path, bool], list[str]]
    """What is wrong in a folder afterwards; the second argument says whether it must have been done."""
    left: Callable[[Path], list[str]] = lambda _: []
    """What has no use in a folder. It may be there after a failure, but not after the next try."""


@dataclass(kw_only=True)
class Sweep:
    tries: int = 0
    failed: int = 0
    """Tries that ended with an error; in the others, the call could be done without."""
    violations: list[str] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.violations = []


def sweep(scene: Scene, scratch: Path, *, numbers: Iterable[int] | None = None) -> Sweep:
    """Fail the n-th call, for each of `numbers`; None is all there are.

    A failure is "input/output error" and "no space left" by turns. It must end in an error that a command turns into a
    line, or in nothing at all.
    """
    found = Sweep()
    for number in numbers or count(1):
        folder = scratch / "try"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(scene.prepared, folder)
        failing = _Failing(number, errno.EIO if number % 2 else errno.ENOSPC)
        ended = _ended(lambda: _act(scene, folder, failing))  # noqa: B023
        if failing.failed is None:
            if numbers is None:
                break
            continue
        found.tries += 1
        found.failed += ended is not None
        at = f"call {number}, {failing.failed}"
        if ended is not None and not isinstance(ended, CCEError | OSError):
            found.violations.append(f"{at}: {type(ended).__name__}: {ended}")
        found.violations += [f"{at}: {wrong}" for wrong in scene.wrong(folder, ended is None)]
        again = _ended(lambda: scene.act(folder))  # noqa: B023
        if again is not None:
            found.violations.append(f"{at}: the next try failed: {type(again).__name__}: {again}")
        found.violations += [f"{at}, after the next try: {wrong}" for wrong in scene.wrong(folder, True)]
        found.violations += [f"{at}: left after the next try: {name}" for name in scene.left(folder)]
    return found


def calls_of(scene: Scene, scratch: Path) -> int:
    """How many calls it takes."""
    folder = scratch / "count"
    shutil.copytree(scene.prepared, folder)
    failing = _Failing(-1, 0)
    _act(scene, folder, failing)
    return failing.count


def some_of(number: int, wanted: int) -> Iterator[int]:
    """About `wanted` of the numbers from 1 to `number`, evenly, of both parities."""
    step = max(1, number // wanted) | 1
    return iter(range(1, number + 1, step))


def _act(scene: Scene, folder: Path, failing: "_Failing") -> None:
    with watched(folder, failing.before):
        scene.act(folder)


def _ended(action: Callable[[], Any]) -> Exception | None:
    try:
        action()
    except Exception as error:  # noqa: BLE001  which of them are allowed is for the caller to judge
        return error
    return None


class _Failing:
    def __init__(self, number: int, code: int) -> None:
        self._number, self._code = number, code
        self.count = 0
        self.failed: str | None = None

    def before(self, kind: str, path: Path) -> None:
        self.count += 1
        if self.count == self._number:
            self.failed = f"{kind} of {path.name}"
            raise OSError(self._code, os.strerror(self._code), str(path))
