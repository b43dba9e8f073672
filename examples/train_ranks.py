"""A training script of one's own for several ranks: planner, pipeline, clusterings, publishing, checkpoints, resuming.

    torchrun --standalone --nproc_per_node 2 examples/train_ranks.py runs/mine

It trains three stretches of batches, with a clustering before each but the first. Started again, on any number of
ranks, it goes on from its last checkpoint.
"""

import argparse
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, Registry
from torchrec_cce.sharding.agreement import on_first_rank
from torchrec_cce.sharding.distributed_checkpoint import load_checkpoint
from torchrec_cce.sharding.pipeline import drain
from torchrec_cce.sharding.planner import CCEShardingPlanner
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.sharding.sharders import get_cce_sharders
from torchrec_cce.sharding.tables import ShardedMaps

NUM_USERS, NUM_DAYS, BATCH_SIZE, STRETCH = 20_000, 7, 128, 15


def batches(first: int, last: int) -> Iterator[Batch]:
    """This rank's rows of the global batches `first..last - 1`; clicks depend on groups of users and on the day."""
    rank, size = dist.get_rank(), BATCH_SIZE // dist.get_world_size()
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        users = torch.randint(0, NUM_USERS, (BATCH_SIZE,), generator=generator)
        days = torch.randint(0, NUM_DAYS, (BATCH_SIZE,), generator=generator)
        dense, labels = torch.rand(BATCH_SIZE, 2, generator=generator), ((users % 8) > days).float()
        mine = slice(rank * size, (rank + 1) * size)
        sparse = KeyedJaggedTensor(
            keys=["user", "day"],
            values=torch.cat([users[mine], days[mine]]),
            lengths=torch.ones(2 * size, dtype=torch.int32),
        )
        yield Batch(dense[mine], sparse, labels[mine])


def build(device: torch.device) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """The model as the planner places it, with its optimizers."""
    ebc = CCEEmbeddingBagCollection(
        tables=[
            CCEEmbeddingBagConfig(
                name="t_user", num_embeddings=NUM_USERS, embedding_dim=16, feature_names=["user"], num_rows=100
            ),
            EmbeddingBagConfig(name="t_day", num_embeddings=NUM_DAYS, embedding_dim=16, feature_names=["day"]),
        ],
        device=torch.device("meta"),
    )
    torch.manual_seed(0)
    dlrm = DLRM(
        ebc,
        dense_in_features=2,
        dense_arch_layer_sizes=[16, 16],
        over_arch_layer_sizes=[16, 1],
        dense_device=device,
    )
    model, sharders = DLRMTrain(dlrm), get_cce_sharders()
    planner = CCEShardingPlanner(
        batch_size=BATCH_SIZE // dist.get_world_size(),
        # On any number of ranks the same: below, the optimizer of a table depends on it.
        constraints={
            "t_user": ParameterConstraints(sharding_types=["row_wise"]),
            "t_day": ParameterConstraints(sharding_types=["data_parallel"]),
        },
    )
    plan = planner.collective_plan(model, sharders)
    # FBGEMM updates the tables that are split; those that are replicated have the optimizer of the dense parameters.
    placement = {table: how.sharding_type for tables in plan.plan.values() for table, how in tables.items()}
    split = [ebc.ebc.embedding_bags[table].weight for table, how in placement.items() if how != "data_parallel"]
    apply_optimizer_in_backward(RowWiseAdagrad, split, {"lr": 0.05, "eps": 1e-8})
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    rest = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    dense = KeyedOptimizerWrapper(rest, lambda parameters: torch.optim.Adagrad(parameters, lr=0.05))
    return sharded, CombinedOptimizer([sharded.fused_optimizer, dense])


def save(folder: Path, model: DistributedModelParallel, optimizer: CombinedOptimizer, progress: torch.Tensor) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": progress}
    dcp.save(state, checkpoint_id=folder)


def load(
    folder: Path, model: DistributedModelParallel, optimizer: CombinedOptimizer, registry: Registry
) -> torch.Tensor:
    """The maps first: weights load only with the maps they were trained with."""
    progress = torch.zeros(2, dtype=torch.int64)
    dcp.load({"progress": progress}, checkpoint_id=folder)
    if progress[1]:
        registry.open(int(progress[1])).attach(ShardedMaps(model))
    load_checkpoint(folder, model, optimizer)
    return progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stretches", type=int, default=3, help="stretches to have trained at the end")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")

    model, optimizer = build(device)
    registry = Registry(arguments.run_dir / "maps")
    progress = torch.zeros(2, dtype=torch.int64)  # stretches trained, version of the maps
    checkpoints = sorted(arguments.run_dir.glob("checkpoint-*/.metadata"))  # which is written last
    if checkpoints:
        progress = load(checkpoints[-1].parent, model, optimizer, registry)
    pipeline = TrainPipelineSparseDist(model, optimizer, device, pipeline_postproc=True)
    for stretch in range(int(progress[0]), arguments.stretches):
        if stretch > 0:
            reports = recluster_sharded(model, optimizer, seed=0)
            tables = ShardedMaps(model).snapshot(reports)
            published = on_first_rank(partial(registry.publish, tables))
            registry.open(published.version).attach(ShardedMaps(model))
            progress[1] = published.version
        stream = batches(stretch * STRETCH, (stretch + 1) * STRETCH)
        losses = []
        while True:
            try:
                loss, *_ = pipeline.progress(stream)
            except StopIteration:
                break
            losses.append(loss)
        drain(pipeline)
        progress[0] = stretch + 1
        save(arguments.run_dir / f"checkpoint-{stretch + 1:04d}", model, optimizer, progress)
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"stretch {stretch + 1}: loss {mean / dist.get_world_size():.6f}, maps version {int(progress[1])}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
