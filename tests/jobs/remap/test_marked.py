"""Counting in Parquet's hybrid encoding, against decoding it value by value."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.support.kernel_references import reference_count
from torchrec_cce.jobs.remap.parquet.hybrid import count_marked


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def encoded(parts: list[tuple[bool, list[int]]], bit_width: int) -> bytes:
    """Parts of values: packed in groups of eight, or one value many times."""
    out = b""
    for packed, values in parts:
        if packed:
            number = sum(value << bit_width * place for place, value in enumerate(values))
            out += varint(len(values) // 8 << 1 | 1) + number.to_bytes(len(values) * bit_width // 8, "little")
        else:
            out += varint(len(values) << 1) + values[0].to_bytes((bit_width + 7) // 8, "little")
    return out


@st.composite
def hybrids(draw: st.DrawFn) -> tuple[list[tuple[bool, list[int]]], int]:
    bit_width = draw(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 20]))
    value = st.integers(0, 2**bit_width - 1)
    packed = st.integers(1, 4).flatmap(lambda groups: st.lists(value, min_size=8 * groups, max_size=8 * groups))
    run = st.tuples(value, st.integers(1, 300)).map(lambda pair: [pair[0]] * pair[1])
    parts = draw(st.lists(st.tuples(st.just(True), packed) | st.tuples(st.just(False), run), min_size=1, max_size=5))
    return parts, bit_width


@given(hybrid=hybrids(), seed=st.integers(0, 9), short=st.integers(0, 7))
def test_counts_what_is_marked(hybrid: tuple[list[tuple[bool, list[int]]], int], seed: int, short: int) -> None:
    """Also where the last group of eight has values that are none."""
    parts, bit_width = hybrid
    values = [value for _, part in parts for value in part]
    count = max(0, len(values) - short) if parts[-1][0] else len(values)
    marks = np.random.default_rng(seed).random(2**bit_width) < 0.5
    data = encoded(parts, bit_width)
    expected = int(np.count_nonzero(marks[values[:count]]))
    assert reference_count(data, bit_width, count, marks) == expected
    assert count_marked(np.frombuffer(data, np.uint8), bit_width, count, marks) == expected


@given(hybrid=hybrids(), cut=st.integers(1, 40))
def test_what_ends_too_early_is_noticed(hybrid: tuple[list[tuple[bool, list[int]]], int], cut: int) -> None:
    parts, bit_width = hybrid
    data = encoded(parts, bit_width)
    count = sum(len(values) for _, values in parts)
    marks = np.ones(2**bit_width, np.bool_)
    data = data[: max(0, len(data) - cut)]
    assert count_marked(np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8), bit_width, count, marks) == -1


def test_what_cannot_be_is_noticed() -> None:
    marks = np.ones(5, np.bool_)
    for data, bit_width, count in [
        (encoded([(False, [5])], 3), 3, 1),  # no such entry
        (encoded([(True, [0, 1, 2, 3, 4, 5, 6, 7])], 3), 3, 8),
        (b"\x00\x00" * 9, 3, 1),  # runs of nothing
        (b"\xff" * 20, 3, 1),  # a header without end
        (encoded([(False, [1])], 3), 33, 1),
    ]:
        assert count_marked(np.frombuffer(data, np.uint8), bit_width, count, marks) == -1
    assert count_marked(np.frombuffer(encoded([(True, list(range(8)))], 3), np.uint8), 3, 5, marks) == 5
