"""Who shards or pipelines a collection in a way that is not as it should be is told so, once, at the first step."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.datasets.utils import Batch
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, table_wise
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan

from tests.support.module_cases import cce, random_features
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingCollection, CCEEmbeddingConfig
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.sharding.pipeline import drain
from torchrec_cce.training.parallel import process_group

IDS = random_features({"user": 1000}, 8, 3, seed=0)


class Model(nn.Module):
    def __init__(self, sparse: CCECollection | EmbeddingBagCollection) -> None:
        super().__init__()
        self.sparse = sparse

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        values = self.sparse(batch.sparse_features).values()
        return values.sum(), values.detach()


def pooled() -> CCEEmbeddingBagCollection:
    return CCEEmbeddingBagCollection([cce(embedding_dim=512)])


def unpooled() -> CCEEmbeddingCollection:
    sizes = {"num_embeddings": 1000, "embedding_dim": 512, "num_rows": 10}
    return CCEEmbeddingCollection([CCEEmbeddingConfig(name="t_user", feature_names=["user"], **sizes)])


def sharded(sparse: CCECollection, how: str, device: torch.device) -> DistributedModelParallel:
    """By TorchRec's own sharders."""
    is_pooled = isinstance(sparse, CCEEmbeddingBagCollection)
    path = "ebc" if is_pooled else "ecs.128"
    placement = column_wise(ranks=[0]) if how == "column_wise" else table_wise(rank=0)
    sharders = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]
    stock = sparse.get_submodule(path)
    plan = construct_module_sharding_plan(
        stock,
        {"t_user": placement},
        sharder=sharders[0 if is_pooled else 1],
        world_size=1,
        local_size=1,
        device_type=device.type,
    )
    return DistributedModelParallel(
        Model(sparse), device=device, plan=ShardingPlan({f"sparse.{path}": plan}), sharders=sharders
    )


@pytest.mark.parametrize("make", [pooled, unpooled])
def test_tables_that_are_split_by_columns(make: Callable[[], CCECollection]) -> None:
    with process_group() as ranks:
        collection = make()
        collection(IDS)
        sharded(collection, "column_wise", ranks.device)
        with pytest.warns(UserWarning, match=r"split by columns: .'t_user': 'column_wise'.*CCEShardingPlanner"):
            look_up(collection)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            look_up(collection)


def look_up(collection: CCECollection) -> None:
    """On the CPU, TorchRec 1.8.0 fails in the lookup of sequences whose tables are split by columns."""
    with nullcontext() if isinstance(collection, CCEEmbeddingBagCollection) else suppress(RuntimeError):
        collection(IDS)


def test_tables_that_are_not_split_by_columns() -> None:
    with process_group() as ranks, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        collection = pooled()
        sharded(collection, "table_wise", ranks.device)
        collection(IDS)


def batches() -> Iterator[Batch]:
    for _ in range(4):
        yield Batch(torch.zeros(8, 1), IDS, torch.zeros(8))


@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_pipeline_that_does_not_run_the_remap_ahead(is_ahead: bool) -> None:
    with process_group() as ranks:
        model = sharded(pooled(), "table_wise", ranks.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        told: list[int] = []
        ahead = {"pipeline_postproc": True} if is_ahead else {}
        pipeline = TrainPipelineSparseDist(model, optimizer, ranks.device, **ahead)
        iterator = batches()
        for _ in range(2):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                pipeline.progress(iterator)
            told.append(sum("Pass pipeline_postproc=True" in str(each.message) for each in found))
        drain(pipeline)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.module.sparse(IDS)
    assert told == ([0, 0] if is_ahead else [1, 0])
