"""The modulus pre-hash against Python's own integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.plain_rows import INT64, assert_same, bags_of, numbered, rows
from torchrec_cce.data.rows import Rows, bound, modulus
from torchrec_cce.errors import ConfigError


@given(st.lists(INT64), st.integers(1, 2**63 - 1) | st.integers(1, 100))
def test_modulus_is_that_of_the_unsigned_number(ids: list[int], size: int) -> None:
    found = modulus(np.array(ids, dtype=np.int64), size)
    assert found.dtype == np.int64
    assert found.tolist() == [key % 2**64 % size for key in ids]


def test_golden_values() -> None:
    assert modulus(np.array([-1, 0x68FD1E64, 10, 9]), 10).tolist() == [5, 0x68FD1E64 % 10, 0, 9]


def test_ids_that_lie_inside_are_not_copied() -> None:
    ids = np.arange(10)
    assert modulus(ids, 10) is ids
    assert modulus(ids[:0], 1).tolist() == []
    assert modulus(ids, 9) is not ids


@pytest.mark.parametrize("size", [0, -5, 2**63])
def test_impossible_universe(size: int) -> None:
    with pytest.raises(ConfigError, match=f"num_embeddings={size} is not in"):
        modulus(np.arange(3), size)


@given(rows())
def test_bound_leaves_other_features_and_bags_alone(whole: Rows) -> None:
    bounded = bound(whole, {"many": 7, "one": 2**40})
    assert bags_of(bounded.ids["many"]) == [[key % 2**64 % 7 for key in bag] for bag in bags_of(whole.ids["many"])]
    assert bags_of(bounded.ids["one"]) == [[key % 2**64 % 2**40 for key in bag] for bag in bags_of(whole.ids["one"])]
    assert bounded.ids["maybe"] is whole.ids["maybe"]
    assert list(bounded.ids) == list(whole.ids)
    assert_same(bound(bounded, {"many": 7, "one": 2**40}), bounded)


def test_bound_by_an_unknown_feature() -> None:
    with pytest.raises(ConfigError, match=r"\['z'\] are not among those of the rows: \['a', 'b'\]"):
        bound(numbered(3), {"a": 5, "z": 5})
