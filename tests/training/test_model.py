"""The three compression factors on tables whose sizes are worked out by hand."""

import pytest
from torchrec import EmbeddingBagConfig

from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, CompositionalEmbeddingBagConfig
from torchrec_cce.training.model import sizes_of


def cce(name: str = "user", *, num_embeddings: int = 70_000, num_rows: int = 25) -> CCEEmbeddingBagConfig:
    return CCEEmbeddingBagConfig(
        name=name, num_embeddings=num_embeddings, embedding_dim=16, feature_names=[name], num_rows=num_rows
    )


def small() -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name="day", num_embeddings=7, embedding_dim=16, feature_names=["day"])


def test_pointers_are_counted_once_they_are_stored() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), small()])
    before = sizes_of([collection])
    assert before.full_parameters == 70_007 * 16
    assert before.parameters == 2 * 25 * 16 + 7 * 16
    assert before.full_bytes == 70_007 * 16 * 4
    assert before.table_bytes == (2 * 25 * 16 + 7 * 16) * 4
    assert before.pointer_bytes == 0
    assert before.largest_table == "user"
    assert before.largest_factor == pytest.approx(70_000 * 16 / (2 * 25 * 16))
    assert before.parameter_factor == pytest.approx(70_007 * 16 / 912)
    assert before.byte_factor == pytest.approx(before.parameter_factor)

    collection.recluster(seed=0)
    after = sizes_of([collection])
    assert after.pointer_bytes == 70_000 * 4  # 4 columns of a byte: k is at most 256
    assert after.byte_factor == pytest.approx(70_007 * 16 * 4 / (912 * 4 + 280_000))
    assert after.parameter_factor == before.parameter_factor
    assert after.largest_factor == before.largest_factor


def test_wide_pointers() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(num_embeddings=3000, num_rows=300)])
    collection.recluster(seed=0)
    assert sizes_of([collection]).pointer_bytes == 3000 * 4 * 2


def test_full_tables_are_not_compressed() -> None:
    sizes = sizes_of([CCEEmbeddingBagCollection(tables=[small()])])
    assert (sizes.parameter_factor, sizes.largest_factor, sizes.byte_factor) == (1, 1, 1)


def test_hashed_tables_and_several_collections() -> None:
    hashed = CompositionalEmbeddingBagConfig(
        name="item", num_embeddings=1000, embedding_dim=8, feature_names=["item"], num_rows=50, num_columns=2
    )
    sizes = sizes_of([CCEEmbeddingBagCollection(tables=[hashed]), CCEEmbeddingBagCollection(tables=[small()])])
    assert sizes.parameters == 50 * 8 + 7 * 16
    assert sizes.full_parameters == 1000 * 8 + 7 * 16
    assert sizes.pointer_bytes == 0
    assert sizes.largest_table == "item"
    assert sizes.largest_factor == 20
