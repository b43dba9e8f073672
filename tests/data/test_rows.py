"""`Rows`: slices, concatenation, and the TorchRec batch made of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.plain_rows import assert_same, bags_of, column, cut, joined, numbered, rows
from torchrec_cce.data.rows import Column, Rows, concat, log_transform, thinned, to_batch
from torchrec_cce.errors import ConfigError


@given(rows(), st.lists(st.integers(0, 5), max_size=4))
def test_slices_concatenate_to_the_whole(whole: Rows, sizes: list[int]) -> None:
    assert_same(joined(cut(whole, sizes)), whole)


@given(rows(), st.integers(-15, 15), st.integers(-15, 15), st.integers(0, 5))
def test_slice_is_the_slice_of_the_list_of_bags(whole: Rows, start: int, stop: int, again: int) -> None:
    part = whole[start:stop][again:]
    np.testing.assert_array_equal(part.labels, whole.labels[start:stop][again:])
    assert part.dense.shape == (len(part), whole.dense.shape[1])
    for feature, bags in whole.ids.items():
        assert bags_of(part.ids[feature]) == bags_of(bags)[start:stop][again:]


def test_slices_are_views() -> None:
    whole = numbered(10)
    part = whole[2:7]
    assert np.shares_memory(part.labels, whole.labels)
    assert np.shares_memory(part.dense, whole.dense)
    for feature in whole.ids:
        assert np.shares_memory(part.ids[feature].values, whole.ids[feature].values)


def test_concat_of_single_and_multi_hot_chunks() -> None:
    first = Rows(labels=np.zeros(2, np.float32), dense=np.zeros((2, 0), np.float32), ids={"f": column([[7], [8]])})
    second = Rows(labels=np.ones(2, np.float32), dense=np.zeros((2, 0), np.float32), ids={"f": column([[], [9, 9]])})
    both = concat([first, second])
    assert bags_of(both.ids["f"]) == [[7], [8], [], [9, 9]]
    assert concat([first]) is first


def test_concat_refuses_rows_that_differ() -> None:
    with pytest.raises(ConfigError, match=r"features \['a', 'c'\] and 2 dense columns cannot follow"):
        concat([numbered(3), numbered(3, ("a", "c"))])
    with pytest.raises(ConfigError, match="empty list"):
        concat([])


@given(rows(), st.lists(st.integers(0, 5), max_size=4), st.integers(1, 5), st.integers(0, 14))
def test_thinned_is_every_nth_row_however_the_stream_was_cut(
    whole: Rows, sizes: list[int], every: int, first: int
) -> None:
    parts = list(thinned(cut(whole, sizes), every=every, first=first))
    assert all(map(len, parts))
    expected = [whole[row : row + 1] for row in range(first, len(whole), every)]
    assert_same(joined([whole[:0], *parts]), joined([whole[:0], *expected]))


def test_nothing_is_copied_where_every_row_is_taken() -> None:
    chunks = cut(numbered(10), [3, 0, 4])
    found = list(thinned(chunks, every=1))
    assert all(one is other for one, other in zip(found, [chunks[0], *chunks[2:]], strict=True))


def test_thinned_refuses_what_cannot_be() -> None:
    for every, first in ((0, 0), (1, -1)):
        with pytest.raises(ConfigError, match=f"every={every} must be at least 1, first={first} at least 0"):
            list(thinned([numbered(3)], every=every, first=first))


@given(rows(min_rows=1), st.permutations(["one", "maybe", "many"]))
def test_batch_holds_the_same_bags(whole: Rows, features: list[str]) -> None:
    sparse = to_batch(whole, features).sparse_features
    assert sparse.keys() == features
    assert sparse.stride() == len(whole)
    assert sparse.values().dtype == torch.int64
    assert sparse.lengths().dtype == torch.int32
    for feature, jagged in sparse.to_dict().items():
        assert [bag.tolist() for bag in jagged.to_dense()] == bags_of(whole.ids[feature])


def test_batch_of_single_ids_knows_its_offsets() -> None:
    whole = numbered(6, ("a", "b", "many"))
    batch = to_batch(whole, ["b", "a"])
    sparse = batch.sparse_features
    assert sparse.values().tolist() == [*range(1000, 1006), *range(6)]
    assert sparse.offsets().tolist() == list(range(13))
    assert sparse.length_per_key() == [6, 6]
    assert sparse["a"].values().tolist() == list(range(6))
    assert batch.labels.data_ptr() == whole.labels.ctypes.data
    assert batch.dense_features.data_ptr() == whole.dense.ctypes.data


def test_batch_of_no_rows() -> None:
    batch = to_batch(numbered(4)[4:], ["a", "b"])
    assert batch.sparse_features.stride() == 0
    assert batch.sparse_features.lengths().shape == (0,)
    assert batch.dense_features.shape == (0, 2)


def test_batch_of_an_unknown_feature() -> None:
    with pytest.raises(ConfigError, match=r"\['z'\] are not among those of the rows: \['a', 'b'\]"):
        to_batch(numbered(3), ["a", "z"])


def test_log_transform_is_that_of_dlrm() -> None:
    dense = np.array([[-2.0, 0.0, 1.0, 1e6]], dtype=np.float32)
    log_transform(dense)
    np.testing.assert_allclose(dense, [[0.0, 0.0, np.log(2), np.log(1e6 + 1)]], rtol=1e-6)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="values is int32"):
        Column(values=np.zeros(3, np.int32))
    with pytest.raises(ConfigError, match="lengths is int64"):
        Column(values=np.zeros(3, np.int64), lengths=np.ones(3, np.int64))
    with pytest.raises(ConfigError, match="lengths sum to 2, but there are 3 values"):
        Column(values=np.zeros(3, np.int64), lengths=np.ones(2, np.int32))
    good = numbered(3)
    with pytest.raises(ConfigError, match="labels is float64"):
        Rows(labels=np.zeros(3), dense=good.dense, ids=good.ids)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"must be float32 \[2, D\]"):
        Rows(labels=good.labels[:2], dense=good.dense, ids=good.ids)
    with pytest.raises(ConfigError, match="feature 'a' has 3 rows, the labels have 2"):
        Rows(labels=good.labels[:2], dense=good.dense[:2], ids=good.ids)
    with pytest.raises(ConfigError, match="step 2 is not 1"):
        good[::2]
