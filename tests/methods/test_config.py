"""Table configurations and budgets: what fits, and what is said where it does not."""

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagConfig, PoolingType

from torchrec_cce import CCEEmbeddingBagConfig, CompositionalEmbeddingBagConfig, tables_under_cap
from torchrec_cce.errors import ConfigError

SIZES = {"name": "t", "num_embeddings": 1000, "embedding_dim": 16, "feature_names": ["f"], "num_rows": 10}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_columns": 5}, r"num_columns=5 .*embedding_dim=16.*allowed: 1, 2, 4, 8, 16$"),
        ({"num_columns": 0}, "num_columns=0"),
        ({"num_columns": 64, "embedding_dim": 64}, "allowed: 1, 2, 4, 8, 16, 32$"),
        ({"num_rows": 0}, r"num_rows=0 is not in 1\.\.2\^32"),
        ({"num_rows": 2**32 + 1}, "num_rows=4294967297"),
        ({"num_embeddings": 0}, "num_embeddings=0"),
        ({"num_terms": 3}, "num_terms=3; a CCE table has 2"),
        ({"name": ""}, "needs a name"),
        ({"name": "a@b"}, "'a@b'"),
        ({"feature_names": ["f", "g@h"]}, "'g@h'"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CCEEmbeddingBagConfig(**{**SIZES, **changes})


@pytest.mark.parametrize(
    ("num_rows", "dtype"), [(1, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4"), (2**32, "u4")]
)
def test_pointers_are_as_narrow_as_the_codebook_allows(num_rows: int, dtype: str) -> None:
    assert CCEEmbeddingBagConfig(**{**SIZES, "num_rows": num_rows}).pointer_dtype == np.dtype(dtype)


def test_physical_table() -> None:
    table = CCEEmbeddingBagConfig(**{**SIZES, "feature_names": ["f", "g"], "pooling": PoolingType.MEAN}).physical()
    assert (table.num_embeddings, table.embedding_dim, table.pooling) == (2 * 4 * 10, 4, PoolingType.MEAN)
    assert table.feature_names == ["f#t#0", "f#t#1", "f#t#2", "f#t#3", "g#t#0", "g#t#1", "g#t#2", "g#t#3"]
    weight = torch.empty(80, 4)
    table.init_fn(weight)
    assert 0.2 < weight.abs().max() <= 0.25  # ±1/√16, as DLRM


def test_initialisation_can_be_chosen() -> None:
    weight = torch.empty(80, 4)
    CCEEmbeddingBagConfig(**SIZES, weight_init_min=3.0, weight_init_max=4.0).physical().init_fn(weight)
    assert 3 <= weight.min() <= weight.max() <= 4
    CCEEmbeddingBagConfig(**SIZES, init_fn=torch.nn.init.zeros_).physical().init_fn(weight)
    assert not weight.any()


def test_a_table_without_features_is_its_own_feature() -> None:
    assert CCEEmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, num_rows=2).feature_names == ["t"]


def stock(name: str, n: int) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=name, num_embeddings=n, embedding_dim=16, feature_names=[name])


def test_budget_is_the_papers_worked_example() -> None:
    """A cap of 8000 and vocabularies of 10, 100 and a million: 8000/16 = 500 rows for the large one."""
    tables = [stock("a", 10), stock("b", 100), stock("c", 1_000_000)]
    hashed = tables_under_cap(tables, method="hashing_trick", max_parameters=8000)
    assert hashed[:2] == tables[:2]
    assert isinstance(hashed[2], CompositionalEmbeddingBagConfig)
    assert (hashed[2].num_rows, hashed[2].num_columns, hashed[2].num_terms) == (500, 1, 1)
    clustered = tables_under_cap(tables, method="cce", max_parameters=8000)[2]
    assert isinstance(clustered, CCEEmbeddingBagConfig)
    assert (clustered.num_rows, clustered.num_columns) == (250, 4)


@pytest.mark.parametrize("method", ["hashing_trick", "ce_concat", "ce_hybrid", "cce"])
@pytest.mark.parametrize("cap", [100, 1000, 8001, 15_999])
def test_no_method_exceeds_its_cap(method: str, cap: int) -> None:
    (table,) = tables_under_cap([stock("c", 1000)], method=method, max_parameters=cap)
    assert isinstance(table, CompositionalEmbeddingBagConfig)
    physical = table.physical()
    used = physical.num_embeddings * physical.embedding_dim
    assert cap - 2 * 16 < used <= cap


def test_tables_at_the_cap_and_the_full_method_stay_full() -> None:
    table = stock("c", 1000)
    assert tables_under_cap([table], method="cce", max_parameters=16_000)[0] is table
    assert tables_under_cap([table], method="full", max_parameters=1)[0] is table


def test_impossible_budgets() -> None:
    with pytest.raises(ConfigError, match=r"max_parameters=31 .*cce.*at least 32"):
        tables_under_cap([stock("c", 1000)], method="cce", max_parameters=31)
    with pytest.raises(ConfigError, match="'bloom' is not one of full, hashing_trick"):
        tables_under_cap([stock("c", 1000)], method="bloom", max_parameters=31)  # type: ignore[arg-type]
