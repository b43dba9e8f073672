"""Calls in threads of which the results come in order."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def in_order(calls: Sequence[Callable[[], T]], num_threads: int) -> Iterator[T]:
    """The results of `calls` in their order, few of them ahead: at most twice as many as threads."""
    if num_threads == 1:
        yield from (call() for call in calls)
        return
    left = iter(calls)
    with ThreadPoolExecutor(num_threads) as threads:
        ahead: list[Future[T]] = [threads.submit(call) for call in islice(left, 2 * num_threads)]
        try:
            while ahead:
                result = ahead.pop(0).result()
                ahead += [threads.submit(call) for call in islice(left, 1)]
                yield result
        finally:
            for future in ahead:
                future.cancel()
