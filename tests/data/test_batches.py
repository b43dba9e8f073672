"""Global batches, the ranks' parts of them, and the thread that reads ahead."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.plain_rows import assert_same, cut, joined, numbered
from torchrec_cce.data.batches import global_batches, prefetch, rank_part
from torchrec_cce.data.rows import Rows
from torchrec_cce.errors import ConfigError, DataFileError


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "torchrec_cce.prefetch"]


@given(st.integers(0, 30), st.lists(st.integers(0, 7), max_size=8), st.integers(1, 12))
def test_global_batches(num_rows: int, sizes: list[int], batch_size: int) -> None:
    whole = numbered(num_rows)
    found = list(global_batches(cut(whole, sizes), batch_size))
    starts = range(0, num_rows, batch_size)
    assert len(found) == len(starts)
    for batch, start in zip(found, starts, strict=True):
        assert_same(batch, whole[start : start + batch_size])


def test_batch_within_a_chunk_is_a_view() -> None:
    whole = numbered(10)
    for batch in global_batches([whole], 4):
        assert np.shares_memory(batch.dense, whole.dense)


@given(st.integers(0, 20), st.integers(1, 9))
def test_parts_of_the_ranks_are_the_batch(num_rows: int, world_size: int) -> None:
    whole = numbered(num_rows)
    parts = [rank_part(whole, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert_same(joined(parts), whole)
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1


def test_worked_example() -> None:
    starts = [rank_part(numbered(10), rank=rank, world_size=4).dense[0, 0] for rank in range(4)]
    assert starts == [0, 2, 5, 7]


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="batch_size=0"):
        list(global_batches([numbered(3)], 0))
    for rank in (-1, 2):
        with pytest.raises(ConfigError, match=f"rank={rank} is not in 0..1"):
            rank_part(numbered(3), rank=rank, world_size=2)
    with pytest.raises(ConfigError, match="depth=0"):
        list(prefetch([1], 0))
    assert not threads()


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5))
def test_prefetch_yields_the_same_items(items: list[int], depth: int) -> None:
    assert list(prefetch(items, depth)) == items
    assert list(prefetch(iter(items), depth)) == items
    assert not threads()


def test_prefetch_reads_ahead_but_not_further_than_depth() -> None:
    read: list[int] = []

    def source() -> Iterator[int]:
        for item in range(100):
            read.append(item)
            yield item

    ahead = prefetch(source(), depth=3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while len(read) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    # One taken, three ready, one at hand.
    assert read == [0, 1, 2, 3, 4]
    assert list(ahead) == list(range(1, 100))


class Stop(BaseException):
    """Not even an Exception, as KeyboardInterrupt is not."""


@pytest.mark.parametrize("error", [DataFileError("log.tsv:7: bad"), StopIteration("not the end"), Stop()])
def test_an_error_in_the_thread_surfaces_after_the_items_before_it(error: BaseException) -> None:
    class Source:
        def __init__(self) -> None:
            self.left = 3

        def __iter__(self) -> Iterator[int]:
            yield from (1, 2)
            raise error

    ahead = prefetch(Source(), depth=5)
    assert [next(ahead), next(ahead)] == [1, 2]
    # PEP 479: a StopIteration inside a generator is a RuntimeError, not an early end.
    with pytest.raises((type(error), RuntimeError)):
        next(ahead)
    assert not threads()
    with pytest.raises(StopIteration):
        next(ahead)


def test_an_error_before_the_first_item() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        next(prefetch(7))  # type: ignore[arg-type]
    assert not threads()


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("depth", [1, 4])
def test_the_thread_ends_when_the_consumer_stops(taken: int, depth: int) -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    ahead = prefetch(source(), depth)
    for _ in range(taken):
        next(ahead)
    assert len(threads()) == (1 if taken else 0)
    ahead.close()  # type: ignore[attr-defined]
    assert not threads()
    assert closed.is_set() == bool(taken)


def test_the_thread_ends_when_a_loop_breaks() -> None:
    endless: Iterator[Rows] = (numbered(10) for _ in iter(int, 1))
    for batch in prefetch(global_batches(endless, 4)):
        assert batch.labels.shape == (4,)
        break
    del batch
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not threads()
