"""From a reader's chunks to training batches: global batches, each rank's part of them, and reading ahead."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from torchrec_cce.data.rows import Rows, concat
from torchrec_cce.errors import ConfigError

T = TypeVar("T")


def global_batches(chunks: Iterable[Rows], batch_size: int) -> Iterator[Rows]:
    """Cut a stream of rows anew, into `batch_size` rows each.

    The last batch may have fewer; none is empty. The batches are the same however the stream was cut before. A batch
    within one chunk is a view of it.

    Raises:
        ConfigError: `batch_size < 1`, or chunks that differ in their features.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is not at least 1")
    parts: list[Rows] = []
    filled = 0
    for chunk in chunks:
        start = 0
        while start < len(chunk):
            part = chunk[start : start + batch_size - filled]
            parts.append(part)
            start += len(part)
            filled += len(part)
            if filled == batch_size:
                yield concat(parts)
                parts, filled = [], 0
    if parts:
        yield concat(parts)


def rank_part(rows: Rows, *, rank: int, world_size: int) -> Rows:
    """The consecutive rows of a global batch that `rank` trains on, as a view.

    The parts of all ranks, one after the other, are `rows`; their sizes differ by at most one. A last global batch of
    fewer rows than ranks leaves some ranks with an empty part, which TorchRec's modules refuse.
    Worked example: 10 rows over 4 ranks are rows 0..2, 2..5, 5..7, 7..10.

    Raises:
        ConfigError: `rank` is not in `0..world_size`.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank={rank} is not in 0..{world_size - 1} (world_size={world_size})")
    return rows[rank * len(rows) // world_size : (rank + 1) * len(rows) // world_size]


def prefetch(items: Iterable[T], depth: int = 4) -> Iterator[T]:
    """Iterate over `items` in a background thread that keeps `depth` items ready and one more at hand.

    What the thread raises is raised here, right after the items before it. The thread starts with the first item asked
    for and has ended when this iterator ends, is closed, or is collected.

    Raises:
        ConfigError: `depth < 1`.
    """
    if depth < 1:
        raise ConfigError(f"depth={depth} is not at least 1")
    ready: queue.SimpleQueue[tuple[list[T], BaseException | None]] = queue.SimpleQueue()
    free = threading.Semaphore(depth)
    stop = threading.Event()

    def work() -> None:
        try:
            for item in items:
                free.acquire()
                if stop.is_set():
                    break
                ready.put(([item], None))
            ready.put(([], None))
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            ready.put(([], error))
        finally:
            # A generator's files are closed here and now, not when it is collected.
            close = getattr(items, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, name="torchrec_cce.prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if not item:
                return
            free.release()
            yield item[0]
    finally:
        stop.set()
        free.release()
        thread.join()
