"""What the planner is told of a table: its columns, not its features."""

from typing import Any

import pytest
import torch
from torchrec import EmbeddingBagConfig
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator

from torchrec_cce import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingConfig,
    CompositionalEmbeddingBagConfig,
    ResidentConfig,
)
from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.sharding.constraints import column_constraints
from torchrec_cce.sharding.planner import planning_topology
from torchrec_cce.sharding.sharders import SHARDING_TYPES, get_cce_sharders


def cce(**changes: Any) -> CCEEmbeddingBagConfig:
    values: dict[str, Any] = {"num_embeddings": 1000, "embedding_dim": 16, "num_rows": 10, "feature_names": ["a", "b"]}
    return CCEEmbeddingBagConfig(name="t", **{**values, **changes})


def test_a_bag_of_l_ids_is_c_bags_of_two_l_rows() -> None:
    given = {"t": ParameterConstraints(pooling_factors=[20.0, 3.0], num_poolings=[1.0, 2.0], batch_sizes=[64, 32])}
    one = column_constraints([cce()], given)["t"]
    assert one.pooling_factors == [40.0] * 4 + [6.0] * 4
    assert one.num_poolings == [1.0] * 4 + [2.0] * 4
    assert one.batch_sizes == [64] * 4 + [32] * 4
    assert one.feature_names == [f"{feature}#t#{j}" for feature in "ab" for j in range(4)]


@pytest.mark.parametrize(
    ("table", "pooling_factors"),
    [
        (cce(), [2.0] * 8),
        (cce(num_columns=2, feature_names=["a"]), [2.0] * 2),
        (
            CompositionalEmbeddingBagConfig(
                name="t", num_embeddings=9, embedding_dim=8, num_rows=3, num_columns=2, num_terms=3
            ),
            [3.0] * 2,
        ),
        (EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=8, feature_names=["a", "b"]), [1.0] * 2),
    ],
)
def test_what_nothing_is_known_of(table: EmbeddingBagConfig, pooling_factors: list[float]) -> None:
    one = column_constraints([table])["t"]
    assert one.pooling_factors == pooling_factors
    assert one.num_poolings is one.batch_sizes is one.compute_kernels is None
    assert one.sharding_types == list(SHARDING_TYPES)


def test_the_planner_sees_every_column() -> None:
    """Not one feature with one ID a row, as it would without constraints."""
    table = cce(feature_names=["a"])
    constraints = column_constraints([table], {"t": ParameterConstraints(pooling_factors=[20.0])})
    topology = planning_topology("cuda", world_size=2, device_bytes=10**9, host_bytes=10**9)
    collection = CCEEmbeddingBagCollection([table], device=torch.device("meta"))
    options = EmbeddingEnumerator(topology, 100, constraints=constraints).enumerate(collection, get_cce_sharders())
    assert options
    for option in options:
        assert (option.num_inputs, option.input_lengths) == (4, [40.0] * 4)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 6])
def test_narrow_columns_are_only_replicated(width: int) -> None:
    table = cce(embedding_dim=2 * width, num_columns=2)
    one = column_constraints([table], {"t": ParameterConstraints(compute_kernels=["fused", "dense"])})["t"]
    assert (one.sharding_types, one.compute_kernels) == (["data_parallel"], ["dense"])


@pytest.mark.parametrize("kind", [CCEEmbeddingBagConfig, CCEEmbeddingConfig])
def test_the_rows_of_residents_are_a_table_with_the_features_of_theirs(kind: type[CCEConfig]) -> None:
    table = kind(
        name="t",
        num_embeddings=1000,
        embedding_dim=16,
        num_rows=10,
        feature_names=["a", "b"],
        residents=ResidentConfig(),
    )
    found = column_constraints([table], {"t": ParameterConstraints(pooling_factors=[20.0, 3.0])})
    assert found["t"].pooling_factors == [20.0] * 4 + [3.0] * 4
    assert found["t_residents"].pooling_factors == [20.0, 3.0]
    assert found["t_residents"].feature_names == ["a#t#residents", "b#t#residents"]


def test_what_the_user_wants_is_kept() -> None:
    given = ParameterConstraints(
        sharding_types=["row_wise", "column_wise"], compute_kernels=["fused"], enforce_hbm=True
    )
    one = column_constraints([cce()], {"t": given})["t"]
    assert (one.sharding_types, one.compute_kernels, one.enforce_hbm) == (["row_wise"], ["fused"], True)
    assert given.pooling_factors == [1.0], "the caller's own"


@pytest.mark.parametrize(
    ("table", "given", "message"),
    [
        (cce(), {"u": ParameterConstraints()}, r"constraints of \['u'\]; the tables are t"),
        (
            cce(),
            {"t": ParameterConstraints(pooling_factors=[1.0] * 8)},
            r"table 't': pooling_factors=.* has 8 values; the table has 2 features, a, b",
        ),
        (
            cce(),
            {"t": ParameterConstraints(sharding_types=["column_wise"])},
            r"table 't': sharding_types=\['column_wise'\] allows none of data_parallel.*rowwise Adagrad",
        ),
        (
            cce(num_columns=8),
            {"t": ParameterConstraints(sharding_types=["row_wise"])},
            r"table 't': .* allows none of data_parallel; FBGEMM's fused kernels read rows of a multiple of 4 floats, "
            "and these have 2",
        ),
    ],
)
def test_constraints_that_cannot_be_met(
    table: EmbeddingBagConfig, given: dict[str, ParameterConstraints], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        column_constraints([table], given)
