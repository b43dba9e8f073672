"""Rows that are found by operations of torch alone are those that the compiled loops find."""

from typing import Any

import numpy as np
import pytest
import torch

from torchrec_cce import CCEEmbeddingBagConfig, CompositionalEmbeddingBagConfig
from torchrec_cce.maps.pointer_map import PointerMap, Unseen
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.methods.compositional import SignedScheme
from torchrec_cce.methods.quotient_remainder import QuotientRemainderEmbeddingBagConfig
from torchrec_cce.methods.table import FullScheme, PointerScheme

N = 500
INSIDE = np.random.default_rng(0).integers(0, N, 200)
OUTSIDE = np.array([-1, N, 2**63 - 1, -(2**63), 2**40 + 3])


def check(scheme: PointerScheme, ids: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor | None:
    """Compare the rows of `ids`, all of which the table can hold; returns which it says it can."""
    expected = np.empty((scheme.num_columns, len(ids), scheme.num_terms), np.int64)
    assert scheme.rows_into(ids, expected).bad == -1
    found = scheme.on_tensors()(torch.from_numpy(ids))
    np.testing.assert_array_equal(found.rows.numpy(), expected)
    return found.known


SIZES: dict[str, Any] = {"name": "t", "num_embeddings": N, "embedding_dim": 24, "seed": 3}


def check_that_it_knows_its_universe(scheme: PointerScheme) -> None:
    known = check(scheme, INSIDE)
    assert known is not None
    assert known.all()
    outside = scheme.on_tensors()(torch.from_numpy(OUTSIDE)).known
    assert outside is not None
    assert not outside.any()


@pytest.mark.parametrize(
    "scheme",
    [
        FullScheme(num_ids=N),
        CompositionalEmbeddingBagConfig(**SIZES, num_rows=7, num_columns=3, num_terms=2).scheme(),
        CompositionalEmbeddingBagConfig(**SIZES, num_rows=1, num_terms=3).scheme(),
        QuotientRemainderEmbeddingBagConfig(**SIZES, num_rows=23, operation="sum").scheme(),
        QuotientRemainderEmbeddingBagConfig(**SIZES, num_rows=23, operation="concat").scheme(),
        CCEEmbeddingBagConfig(**SIZES, num_rows=2**32).scheme(),
    ],
    ids=["full", "hashed", "one row", "qr sum", "qr concat", "cce"],
)
def test_tables_without_learned_pointers(scheme: PointerScheme) -> None:
    check_that_it_knows_its_universe(scheme)


def test_signs() -> None:
    scheme = CompositionalEmbeddingBagConfig(**SIZES, num_rows=7, num_columns=3, num_terms=2, signed=True).scheme()
    assert isinstance(scheme, SignedScheme)
    check(scheme, INSIDE)
    signs = scheme.on_tensors()(torch.from_numpy(INSIDE)).signs
    assert signs is not None
    np.testing.assert_array_equal(signs.numpy(), scheme.signs(INSIDE))


def clustered(num_rows: int, num_columns: int, bits: Any = 8) -> PointerMap:
    config = CCEEmbeddingBagConfig(**SIZES, num_rows=num_rows, num_columns=num_columns, min_pointer_bits=bits)
    start = config.scheme().pointer_map
    codes = np.random.default_rng(1).integers(0, num_rows, (N, num_columns))
    codes[0] = num_rows - 1
    return start.clustered(config.pointer_format.encode(codes), start.next_helper_hash(5))


@pytest.mark.parametrize("use_helper", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "bits"), [(16, 4, 4), (13, 3, 4), (256, 4, 8), (65536, 2, 8), (2**32, 6, 8)]
)
def test_learned_pointers_of_any_width(num_rows: int, num_columns: int, bits: int, use_helper: bool) -> None:
    config = CCEEmbeddingBagConfig(**SIZES, num_rows=num_rows, num_columns=num_columns, use_helper=use_helper)
    scheme = config.scheme_with(clustered(num_rows, num_columns, bits))
    check_that_it_knows_its_universe(scheme)


@pytest.mark.parametrize("is_clustered", [True, False])
@pytest.mark.parametrize("unseen", ["error", "hash", "first_row"])
def test_vocabularies(unseen: Unseen, is_clustered: bool) -> None:
    config = CCEEmbeddingBagConfig(**SIZES, num_rows=50)
    start = clustered(50, 4) if is_clustered else config.scheme().pointer_map
    keys = np.random.default_rng(2).integers(-(2**63), 2**63 - 1, 300)
    keys[:2] = 2**63 - 1, -(2**63)
    scheme = config.scheme_with(start.with_vocabulary(Vocabulary.build(keys), unseen=unseen))
    strange = np.append(keys, OUTSIDE)
    known = check(scheme, keys if unseen == "error" else strange)
    assert (known is None) == (unseen != "error")
    if unseen == "error":
        found = scheme.on_tensors()(torch.from_numpy(strange)).known
        assert found is not None
        assert found.tolist() == np.isin(strange, keys).tolist()


def test_an_empty_vocabulary() -> None:
    config = CCEEmbeddingBagConfig(**SIZES, num_rows=50)
    empty = Vocabulary.build(np.empty(0, np.int64))
    check(config.scheme_with(config.scheme().pointer_map.with_vocabulary(empty)), OUTSIDE)
    check(config.scheme_with(clustered(50, 4).with_vocabulary(empty)), OUTSIDE)
