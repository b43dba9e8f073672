"""The gather's loops against plain numpy, their bounds, and the words that they move."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.kernel_references import reference_gather
from torchrec_cce.kernels.packed import _AHEAD, as_packed, gather_rows, gather_words

Unsigned = npt.NDArray[np.unsignedinteger]

pointer_dtypes = st.sampled_from([np.uint8, np.uint16, np.uint32])
counts = st.one_of(st.integers(0, 5), st.integers(_AHEAD - 2, _AHEAD + 2), st.integers(0, 4 * _AHEAD))
INT64 = np.iinfo(np.int64)


def random_array(shape: tuple[int, ...], dtype: type, seed: int, *, shift: int = 0, writeable: bool = True) -> Unsigned:
    """Random bits in a buffer that starts `shift` bytes past a multiple of 64."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.random.default_rng(seed).integers(0, 256, size + 128, dtype=np.uint8)
    start = -buffer.ctypes.data % 64 + shift
    array = buffer[start : start + size].view(dtype).reshape(shape)
    array.flags.writeable = writeable
    return array


def check_against_reference(source: Unsigned, ids: npt.NDArray[np.int64]) -> int:
    """Gather between two guard rows; returns the position that the loop returned."""
    framed = np.full((len(ids) + 2, *source.shape[1:]), 77, source.dtype)
    bad = (gather_words if source.ndim == 1 else gather_rows)(source, ids, framed[1:-1])
    expected, expected_bad = reference_gather(source, ids)
    np.testing.assert_array_equal(framed[1:-1], expected)
    assert (framed[[0, -1]] == 77).all()
    assert bad == expected_bad
    return bad


@given(
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64]),
    num_ids=st.integers(1, 300),
    count=counts,
    writeable=st.booleans(),
    shift=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**32),
)
def test_words_equal_the_reference(
    dtype: type, num_ids: int, count: int, writeable: bool, shift: int, seed: int
) -> None:
    words = random_array((num_ids,), dtype, seed, shift=shift, writeable=writeable)
    ids = np.random.default_rng(seed).integers(0, num_ids, count)
    assert check_against_reference(words, ids) == -1


@given(
    dtype=pointer_dtypes,
    num_ids=st.integers(1, 300),
    num_columns=st.integers(1, 32),
    count=counts,
    writeable=st.booleans(),
    shift=st.integers(0, 8),
    seed=st.integers(0, 2**32),
)
def test_gathered_words_are_the_gathered_pointers(
    dtype: type, num_ids: int, num_columns: int, count: int, writeable: bool, shift: int, seed: int
) -> None:
    pointers = random_array((num_ids, num_columns), dtype, seed, shift=shift, writeable=writeable)
    ids = np.random.default_rng(seed).integers(0, num_ids, count)
    words = as_packed(pointers)
    out = np.empty((count, *words.shape[1:]), words.dtype)
    assert (gather_words if words.ndim == 1 else gather_rows)(words, ids, out) == -1
    np.testing.assert_array_equal(out.view(dtype).reshape(count, num_columns), pointers[ids])
    assert check_against_reference(words, ids) == -1
    assert check_against_reference(pointers, ids) == -1


@given(
    width=st.sampled_from([None, 1, 3, 16]),
    num_ids=st.integers(0, 100),
    count=st.integers(1, 3 * _AHEAD),
    bad=st.lists(
        st.tuples(
            st.integers(0, 3 * _AHEAD), st.sampled_from(["negative", "n", "n + 1", "2**32", "largest", "smallest"])
        ),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 2**32),
)
def test_first_id_outside_is_reported_and_bad_ids_write_zero(
    width: int | None, num_ids: int, count: int, bad: list[tuple[int, str]], seed: int
) -> None:
    outside = {"negative": -1, "n": num_ids, "n + 1": num_ids + 1}
    outside |= {"2**32": 2**32, "largest": INT64.max, "smallest": INT64.min}
    source = random_array((num_ids,) if width is None else (num_ids, width), np.uint64, seed)
    # A map without IDs has only bad ones.
    ids = np.random.default_rng(seed).integers(0, num_ids, count) if num_ids else np.zeros(count, np.int64)
    for position, kind in bad:
        ids[position % count] = outside[kind]
    first = min(position % count for position, _ in bad) if num_ids else 0
    assert check_against_reference(source, ids) == first


@pytest.mark.parametrize("bad_id", [-1, 50, INT64.max, INT64.min])
@pytest.mark.parametrize("position", [0, 1, _AHEAD - 1, _AHEAD, 2 * _AHEAD - 1, 2 * _AHEAD])
def test_a_bad_id_at_any_position(bad_id: int, position: int) -> None:
    ids = np.arange(2 * _AHEAD + 1) % 50
    ids[position] = bad_id
    for shape in ((50,), (50, 3)):
        assert check_against_reference(random_array(shape, np.uint32, 0), ids) == position


@given(dtype=pointer_dtypes, num_ids=st.integers(0, 20), num_columns=st.integers(1, 32), seed=st.integers(0, 2**32))
def test_words_are_a_view_of_the_pointers(dtype: type, num_ids: int, num_columns: int, seed: int) -> None:
    pointers = random_array((num_ids, num_columns), dtype, seed)
    words = as_packed(pointers)
    row_bytes = num_columns * pointers.itemsize
    width = next(size for size in (8, 4, 2, 1) if row_bytes % size == 0)
    assert words.itemsize == width
    assert words.shape == ((num_ids,) if row_bytes == width else (num_ids, row_bytes // width))
    assert words.flags.c_contiguous
    assert words.ctypes.data == pointers.ctypes.data
    assert np.shares_memory(words, pointers) == (num_ids > 0)
    np.testing.assert_array_equal(words.view(dtype).reshape(pointers.shape), pointers)


def test_column_0_is_in_the_lowest_bits() -> None:
    assert as_packed(np.array([[1, 2, 3, 4]], np.uint16)).tolist() == [0x0004_0003_0002_0001]


@pytest.mark.parametrize(
    ("shift", "dtype", "shape"),
    [(8, np.uint64, (9,)), (4, np.uint32, (9, 2)), (2, np.uint16, (9, 4)), (1, np.uint16, (9, 4))],
)
def test_words_are_no_wider_than_the_alignment_of_the_buffer(shift: int, dtype: type, shape: tuple[int, ...]) -> None:
    pointers = random_array((9, 4), np.uint16, 0, shift=shift)
    words = as_packed(pointers)
    assert words.dtype == dtype
    assert words.shape == shape
    assert np.shares_memory(words, pointers)


def test_a_read_only_file(tmp_path: Path) -> None:
    pointers = random_array((100, 4), np.uint16, 0)
    pointers.tofile(tmp_path / "pointers")
    mapped = np.memmap(tmp_path / "pointers", np.uint16, "r", shape=(100, 4))
    words = as_packed(np.asarray(mapped))
    assert words.dtype == np.uint64
    assert not words.flags.writeable
    out = np.empty(200, np.uint64)
    assert gather_words(words, np.arange(200) % 100, out) == -1
    np.testing.assert_array_equal(out.view(np.uint16).reshape(200, 4), np.tile(pointers, (2, 1)))
