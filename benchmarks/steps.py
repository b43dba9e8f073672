"""Speed of whole DLRM training steps with CCE tables, against full tables, and in a script without sharding:
`python -m benchmarks.steps`. One process, one thread, CPU time, interleaved, medians.

Layers, optimizers and placement are those that `train` has by default: 13 dense features, Adam, rowwise Adagrad for
tables, which are replicated or fused in TBE as the planner has it. Raw IDs are Zipf's, pointers random.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import EmbeddingBagConfig
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.figure import race, report
from benchmarks.lookup import clustered, features_of
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.sharding.planner import CCEShardingPlanner
from torchrec_cce.training.command import quiet_libraries
from torchrec_cce.training.config import ModelConfig, OptimizerConfig
from torchrec_cce.training.interaction import FlatInteraction
from torchrec_cce.training.parallel import Ranks, process_group, shard

SIZES = [10_000] * 8 + [100_000] * 12 + [1_000_000] * 6
NUM_DENSE, NUM_COLUMNS, NUM_ROWS = 13, 4, 1024
WIDTHS = (16, 64)
BATCHES = ((2048, 1), (8192, 1), (2048, 20))
"""Rows, and IDs in a bag."""
Step = Callable[[Batch], None]


def full(dim: int) -> CCEEmbeddingBagCollection:
    return CCEEmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=f"t{i}", num_embeddings=n, embedding_dim=dim, feature_names=[f"f{i}"])
            for i, n in enumerate(SIZES)
        ]
    )


def dlrm(collection: CCEEmbeddingBagCollection, dim: int) -> DLRM:
    """As `training.model.DLRMClicks` has it."""
    config = ModelConfig()
    torch.manual_seed(0)
    model = DLRM(
        collection,
        dense_in_features=NUM_DENSE,
        dense_arch_layer_sizes=[*config.bottom, dim],
        over_arch_layer_sizes=[*config.top, 1],
    )
    model.inter_arch = FlatInteraction(model.inter_arch.F)
    return model


def sharded(collection: CCEEmbeddingBagCollection, dim: int, ranks: Ranks) -> Step:
    """As `train` does it."""
    model = dlrm(collection, dim)
    plan = CCEShardingPlanner(batch_size=BATCHES[0][0], replicate_on_one_rank=True).collective_plan(model)
    return _step(*shard(model, plan, OptimizerConfig(), ranks))


def unsharded(collection: CCEEmbeddingBagCollection, dim: int) -> Step:
    """As a script does it that knows nothing of sharding."""
    model, config = dlrm(collection, dim), OptimizerConfig()
    tables = set(collection.parameters())
    of_tables = RowWiseAdagrad(list(collection.parameters()), lr=config.embedding_learning_rate, eps=1e-8)
    dense = [parameter for parameter in model.parameters() if parameter not in tables]
    return _step(model, of_tables, torch.optim.Adam(dense, lr=config.dense_learning_rate))


def _step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Step:
    model.train()

    def step(batch: Batch) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        logits = model(batch.dense_features, batch.sparse_features).squeeze(1)
        binary_cross_entropy_with_logits(logits, batch.labels).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def batches_of(num_rows: int, bag: int) -> list[Batch]:
    rng = np.random.default_rng(1)
    return [
        Batch(torch.rand(num_rows, NUM_DENSE), features_of(SIZES, num_rows, bag, rng), torch.rand(num_rows).round())
        for _ in range(4)
    ]


def figures(dim: int, ranks: Ranks) -> None:
    steps = {
        "full": sharded(full(dim), dim, ranks),
        "CCE": sharded(clustered(SIZES, dim, NUM_COLUMNS, NUM_ROWS), dim, ranks),
        "CCE, no sharding": unsharded(clustered(SIZES, dim, NUM_COLUMNS, NUM_ROWS), dim),
    }
    for num_rows, bag in BATCHES:
        batches = batches_of(num_rows, bag)

        def some(step: Step, batches: list[Batch] = batches) -> None:
            for batch in batches:
                step(batch)

        candidates = {name: lambda step=step: some(step) for name, step in steps.items()}
        seconds = race(candidates, rounds=5 if bag == 1 else 3)
        shape = f"a DLRM step, d = {dim}, batch {num_rows}, bags of {bag}"
        row = {name: each / len(batches) / num_rows * 1e6 for name, each in seconds.items()}
        ratio = seconds["full"] / seconds["CCE"]
        report(
            f"{shape}, times as fast",
            ratio,
            target="≥ 1.0",
            holds=ratio >= 1.0,
            against=f"full tables, {row['full']:.1f} µs a row; with CCE {row['CCE']:.1f}",
        )
        ratio = seconds["CCE, no sharding"] / seconds["CCE"]
        report(
            f"{shape}, without DistributedModelParallel, of the time",
            ratio,
            target="≤ 1.3",
            holds=ratio <= 1.3,
            against="the same model in DistributedModelParallel",
        )


def main() -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    with process_group() as ranks:
        for dim in WIDTHS:
            figures(dim, ranks)


if __name__ == "__main__":
    main()
