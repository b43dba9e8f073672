"""Files written in parts, however the parts are cut and however much a call takes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_cce.jobs.remap import output as gathered
from torchrec_cce.jobs.remap.output import Gathered


def write(path: Path, parts: Sequence[Any]) -> None:
    with path.open("wb", 0) as file:
        sink = Gathered(file.fileno())
        for part in parts:
            sink.write(part)
        sink.flush()


@given(
    parts=st.lists(st.binary(max_size=20), max_size=40),
    enough=st.integers(1, 100),
    most=st.integers(1, 9),
    each=st.integers(1, 30),
)
def test_any_parts_in_any_calls(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], enough: int, most: int, each: int
) -> None:
    """The system may write less than it is asked to."""
    path = tmp_path_factory.getbasetemp() / "parts"
    calls = []

    def some(descriptor: int, buffers: list[memoryview]) -> int:
        calls.append(buffers)
        assert len(buffers) <= most
        return os.write(descriptor, b"".join(buffers)[:each])

    with (
        mock.patch.multiple(gathered, _ENOUGH_BYTES=enough, _MOST_PARTS=most),
        mock.patch.object(os, "writev", some),
    ):
        write(path, parts)
    assert path.read_bytes() == b"".join(parts)


def test_whatever_has_bytes(tmp_path: Path) -> None:
    numbers = np.arange(1000, dtype=np.uint64)
    large = bytes(range(256)) * 10_000
    parts = [b"", numbers.data, memoryview(large)[3:], pa.py_buffer(b"abc"), bytearray(b"d"), *[b"x"] * 3000]
    with mock.patch.object(os, "writev", wraps=os.writev) as calls:
        write(tmp_path / "file", parts)
    expected = numbers.tobytes() + large[3:] + b"abcd" + b"x" * 3000
    assert (tmp_path / "file").read_bytes() == expected
    assert calls.call_count < 10


def test_a_full_disk_is_an_error() -> None:
    with open("/dev/full", "wb", 0) as file, pytest.raises(OSError, match="No space"):
        Gathered(file.fileno()).write(b"x" * (1 << 20))
