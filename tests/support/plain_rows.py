"""Rows of data that are made at random, cut into chunks, joined and compared."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from torchrec_cce.data.rows import Column, Rows, concat

INT64 = st.integers(-(2**63), 2**63 - 1)


def column(bags: Sequence[Sequence[int]]) -> Column:
    """The column of these bags; `lengths` only where some bag does not hold exactly one ID."""
    lengths = np.array([len(bag) for bag in bags], dtype=np.int32)
    values = np.array([key for bag in bags for key in bag], dtype=np.int64)
    return Column(values=values) if (lengths == 1).all() else Column(values=values, lengths=lengths)


def bags_of(part: Column) -> list[list[int]]:
    return [part.slice(row, row + 1).values.tolist() for row in range(len(part))]


def assert_same(found: Rows, expected: Rows) -> None:
    """Equal in every cell; None and all-ones `lengths` are the same bags."""
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.dense, expected.dense)
    assert list(found.ids) == list(expected.ids)
    for feature in found.ids:
        np.testing.assert_array_equal(found.ids[feature].values, expected.ids[feature].values)
        np.testing.assert_array_equal(found.ids[feature].dense_lengths(), expected.ids[feature].dense_lengths())


def numbered(num_rows: int, features: Sequence[str] = ("a", "b")) -> Rows:
    """Rows that show their own position in every part; the last feature has 0, 1 or 2 IDs in a bag."""
    position = np.arange(num_rows)
    ids = {feature: Column(values=position + 1000 * i) for i, feature in enumerate(features[:-1])}
    ids[features[-1]] = column([[row] * (row % 3) for row in range(num_rows)] if num_rows else [])
    return Rows(
        labels=(position % 2).astype(np.float32), dense=np.stack([position, -position], 1).astype(np.float32), ids=ids
    )


@st.composite
def rows(draw: st.DrawFn, *, min_rows: int = 0, multi_hot: bool = True) -> Rows:
    """Rows with features `one` (a single ID), `maybe` (at most one) and, if `multi_hot`, `many`."""
    size = draw(st.integers(min_rows, 12))
    width = draw(st.integers(0, 3))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    cells = draw(st.lists(finite, min_size=size * width, max_size=size * width))
    most = {"one": (1, 1), "maybe": (0, 1)} | ({"many": (0, 3)} if multi_hot else {})
    return Rows(
        labels=np.array(draw(st.lists(st.sampled_from([0, 1]), min_size=size, max_size=size)), dtype=np.float32),
        dense=np.array(cells, dtype=np.float32).reshape(size, width),
        ids={
            feature: column(draw(st.lists(st.lists(INT64, min_size=low, max_size=high), min_size=size, max_size=size)))
            for feature, (low, high) in most.items()
        },
    )


def cut(whole: Rows, sizes: Sequence[int]) -> list[Rows]:
    """`whole` as chunks of these sizes, and the rest as the last one."""
    chunks, start = [], 0
    for size in [*sizes, len(whole)]:
        chunks.append(whole[start : start + size])
        start += len(chunks[-1])
    return chunks


def joined(chunks: Sequence[Rows]) -> Rows:
    return concat(list(chunks))
