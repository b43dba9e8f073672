"""All ranks act, or all hear why not."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

K = TypeVar("K")
T = TypeVar("T")
V = TypeVar("V")


def from_each_rank(value: T) -> list[T]:
    """Rank → its `value`, on every rank, which all call this."""
    everyones: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(everyones, value)
    return everyones


def on_first_rank(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `action` on rank 0 of `group` (all, if None) and return its result on every rank, which all call this.

    An exception is raised on every rank too: if only rank 0 knew of it, the others would wait for ever.
    """
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = (action(), None)
        except Exception as error:  # noqa: BLE001  raised again below, everywhere
            outcome[0] = (None, error)
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def on_all_ranks(action: Callable[[], T]) -> T:
    """Call `action` on every rank, without collectives in it, and return each rank's own result.

    If it fails on some ranks, the exception of the first of them is raised on every one.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001  raised again below, everywhere
        failure = error
    first = next((each for each in from_each_rank(failure) if each is not None), None)
    if first is not None:
        raise failure or first  # with this rank's own traceback, if it is one of those
    return result  # type: ignore[return-value]


def from_all_ranks(action: Callable[[], dict[K, V]]) -> dict[K, V]:
    """Call `action` as `on_all_ranks` does, and return what all ranks found together, on every rank."""
    return {key: value for part in from_each_rank(on_all_ranks(action)) for key, value in part.items()}
