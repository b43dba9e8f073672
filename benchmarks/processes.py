"""Fresh processes to measure in, and the memory of the process that measures."""

import multiprocessing
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def fresh(function: Callable[..., T], *args: Any) -> T:
    """What `function(*args)` returns in a new interpreter, which has loaded and allocated nothing before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def memory_bytes(*fields: str) -> int:
    """The sum of `fields` of `/proc/self/status`, e.g. `RssAnon`: the memory in use that no file backs."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[field].split()[0]) for field in fields) * 1024


def mapping_bytes(name: str) -> Counter[str]:
    """Field of `/proc/self/smaps` → its sum over the mappings of files whose path ends with `name`."""
    sizes: Counter[str] = Counter()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):  # the line that starts a mapping: 7f0000000000-7f0000021000 rw-p … path
            inside = rest[-1].endswith(name)
        elif inside and rest[-1] == "kB":
            sizes[key[:-1]] += int(rest[0]) * 1024
    return sizes


class Peak:
    """While entered, samples this process's memory; `grown` is the most that was seen above that at the start."""

    def __init__(self, *fields: str, every: float = 0.01) -> None:
        """`fields` as for `memory_bytes`; `every` so many seconds."""
        self._fields, self._every = fields, every

    def __enter__(self) -> "Peak":
        self._start, self.grown, self._over = memory_bytes(*self._fields), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._every):
            self.grown = max(self.grown, memory_bytes(*self._fields) - self._start)
