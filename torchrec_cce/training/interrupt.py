"""Ctrl-C and SIGTERM as a request to stop after the batch at hand."""

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is remembered; a second one acts as it always did."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._received = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def on_any_rank(self) -> bool:
        """Whether some rank was asked to stop: the same answer on all of them, which call it after every batch."""
        if dist.get_world_size() == 1:
            return self._received
        votes = torch.tensor(int(self._received))
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes)
