"""Tables of float16, bfloat16 and float64 numbers: the embeddings are those of float32, up to rounding, and float32."""

import pytest
import torch
from torchrec import EmbeddingConfig, PoolingType
from torchrec.modules.embedding_configs import DataType

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import (
    METHODS,
    CCEEmbeddingBagCollection,
    CCEEmbeddingCollection,
    CCEEmbeddingConfig,
    ResidentConfig,
    tables_under_cap,
)

ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-6}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("pooling", ["sum", "mean", "weighted"])
def test_every_method(pooling: str, dtype: torch.dtype, method: str) -> None:
    kind, weighted = PoolingType.MEAN if pooling == "mean" else PoolingType.SUM, pooling == "weighted"
    table = full("t_user", ("user",), num_embeddings=1000, pooling=kind)
    collection = CCEEmbeddingBagCollection(
        tables=tables_under_cap([table], method=method, max_parameters=8200), is_weighted=weighted
    )
    features = random_features({"user": 1000}, 8, 3, seed=0, weighted=weighted)
    with torch.no_grad():
        expected = collection(features).values()
    got = collection.to(dtype)(features).values()
    torch.testing.assert_close(got, expected, atol=ROUNDING[dtype], rtol=0)  # and float32
    got.sum().backward()
    weights = [p for name, p in collection.named_parameters() if not name.startswith("residents.")]
    assert {weight.dtype for weight in weights} == {dtype}
    assert all(weight.grad is not None for weight in weights)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rows", ["float32", "float16", "int8"])
@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_residents_and_a_clustering(pooling: PoolingType, rows: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    collection = CCEEmbeddingBagCollection(tables=[cce(residents=ResidentConfig(dtype=rows), pooling=pooling)])
    features = random_features({"user": 1000}, 8, 3, seed=0)
    collection.admit(seed=0)
    with torch.no_grad():
        expected = collection(features).values()
    collection.to(dtype)
    got = collection(features).values()
    torch.testing.assert_close(got, expected, atol=ROUNDING[dtype], rtol=0)
    (report,) = collection.recluster(seed=1).values()
    assert report.generation == 1
    assert collection.codewords.embedding_bags["t_user"].weight.dtype == dtype


@pytest.mark.parametrize("dtype", ROUNDING)
def test_sequences(dtype: torch.dtype) -> None:
    sizes = {"num_embeddings": 1000, "embedding_dim": 16, "feature_names": ["user"]}
    collection = CCEEmbeddingCollection(
        tables=[CCEEmbeddingConfig(name="a", num_rows=10, **sizes), EmbeddingConfig(name="b", **sizes)]
    )
    features = random_features({"user": 1000}, 8, 3, seed=0)
    expected = collection(features)
    for name, sequence in collection.to(dtype)(features).items():
        torch.testing.assert_close(sequence.values(), expected[name].values(), atol=ROUNDING[dtype], rtol=0)


def test_the_type_of_a_configuration() -> None:
    tables = [cce(data_type=DataType.FP16), full(data_type=DataType.FP16)]
    collection = CCEEmbeddingBagCollection(tables=tables, is_weighted=True)
    assert {weight.dtype for weight in collection.parameters()} == {torch.float16}
    features = random_features({"user": 1000, "day": 7}, 8, 3, seed=0, weighted=True)
    got = collection(features).values()
    expected = collection.float()(features).values()
    torch.testing.assert_close(got, expected, atol=ROUNDING[torch.float16], rtol=0)
