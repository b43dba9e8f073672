"""Several full tables that read one feature, alone and beside a compressed one, against TorchRec's own collections."""

import copy
import dataclasses

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingCollection, EmbeddingConfig, PoolingType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.types import ParameterConstraints

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingCollection
from torchrec_cce.errors import ConfigError, InvalidIDError
from torchrec_cce.methods.compositional import CompositionalEmbeddingBagConfig
from torchrec_cce.sharding.planner import CCEShardingPlanner
from torchrec_cce.sharding.sharders import get_cce_sharders
from torchrec_cce.training.parallel import process_group

LARGE, SMALL = full("t_large", ("day", "hour"), num_embeddings=50), full(pooling=PoolingType.MEAN)
FEATURES = random_features({"user": 1000, "hour": 50, "day": 7}, batch_size=5, max_length=3, seed=0)


def collection(pooling: PoolingType = PoolingType.MEAN) -> CCEEmbeddingBagCollection:
    torch.manual_seed(0)
    tables = [LARGE, cce(), dataclasses.replace(SMALL, pooling=pooling)]
    return CCEEmbeddingBagCollection(tables=copy.deepcopy(tables))


def test_embeddings_are_those_of_the_stock_collection() -> None:
    ours, stock = collection(), EmbeddingBagCollection(tables=copy.deepcopy([LARGE, SMALL]))
    for table in ("t_large", "t_day"):
        stock.embedding_bags[table].weight.data.copy_(ours.ebc.embedding_bags[table].weight)
    expected = stock(FEATURES).to_dict()
    rows = ours.remap(FEATURES)
    assert len(set(rows.keys())) == len(rows.keys())
    for found in (ours(FEATURES).to_dict(), ours(rows).to_dict()):
        assert found.keys() == {"day@t_large", "day@t_day", "hour", "user"}
        for key, values in expected.items():
            torch.testing.assert_close(found[key], values)


def test_sequences() -> None:
    tables = [
        EmbeddingConfig(name=name, num_embeddings=50, embedding_dim=8, feature_names=["day"]) for name in ("t_a", "t_b")
    ]
    ours, stock = CCEEmbeddingCollection(tables=copy.deepcopy(tables)), EmbeddingCollection(tables=tables)
    stock.load_state_dict({f"embeddings.{name}.weight": ours.embeddings[name].weight for name in ("t_a", "t_b")})
    found = ours(FEATURES)
    for key, sequence in stock(FEATURES).items():
        torch.testing.assert_close(found[key].values(), sequence.values())


def test_an_id_that_one_of_the_tables_lacks_is_refused() -> None:
    beyond = random_features({"user": 1000, "hour": 50, "day": 1}, batch_size=5, max_length=3, seed=0)
    beyond.values()[-1] = 7
    with pytest.raises(InvalidIDError, match=r"raw ID 7 .* is not in 0..6, the universe of table 't_day'"):
        collection().remap(beyond)


@pytest.mark.parametrize("placement", ["data_parallel", "table_wise", "row_wise"])
def test_sharded(placement: str) -> None:
    pooling = PoolingType.SUM if placement == "row_wise" else PoolingType.MEAN  # TorchRec cannot mix them there
    ours = collection(pooling)
    expected = ours(FEATURES).values().detach()
    weights = {name: value.clone() for name, value in ours.state_dict().items()}
    with process_group() as ranks:
        constraints = {table: ParameterConstraints(sharding_types=[placement]) for table in ("t_large", "t_day")}
        plan = CCEShardingPlanner(batch_size=5, constraints=constraints).collective_plan(ours)
        model = DistributedModelParallel(ours, device=ranks.device, plan=plan, sharders=get_cce_sharders())
        model.load_state_dict(weights)
        torch.testing.assert_close(model(FEATURES).values(), expected)


def test_two_poolings_of_one_feature_beside_a_signed_table() -> None:
    signed = CompositionalEmbeddingBagConfig(
        name="t_s",
        num_embeddings=1000,
        embedding_dim=16,
        feature_names=["user"],
        num_rows=10,
        signed=True,
        num_columns=4,
        num_terms=1,
    )
    with pytest.raises(
        ConfigError, match=r"'day' is read by the full tables \['t_large', 't_day'\], some of which pool"
    ):
        CCEEmbeddingBagCollection(tables=copy.deepcopy([LARGE, SMALL, signed]))
