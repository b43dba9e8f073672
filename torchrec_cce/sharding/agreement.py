"""One rank acts, all ranks hear what came of it."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_first_rank(action: Callable[[], T]) -> T:
    """Call `action` on rank 0 and return its result on every rank, which all call this.

    An exception is raised on every rank too: if only rank 0 knew of it, the others would wait for ever.
    """
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome[0] = (action(), None)
        except Exception as error:  # noqa: BLE001  raised again below, everywhere
            outcome[0] = (None, error)
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]
