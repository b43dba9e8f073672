"""One model trained with and without TorchRec's pipelines, clustered in the middle."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.postproc import PipelinedPostproc
from torchrec.optim.keyed import CombinedOptimizer

from tests.support.distributed_cases import Case, rank_batches
from tests.support.launch import on_ranks
from tests.support.parity import COLLECTION, Outcome, join, mean_over_ranks, outcome_of, shard
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.sharding.pipeline import RowCollate, drain
from torchrec_cce.sharding.recluster import recluster_sharded

CASE = Case(
    placement={
        "user": "row_wise",
        "item": "table_wise",
        "tag": "row_wise",
        "day": "data_parallel",
        "signed": "table_wise",
        "qr_concat": "row_wise",
    },
    with_computed=True,
)
STEPS = 12
CLUSTER_AFTER = 6
EVALUATED = 3
"""Batches of the pass without training at the end."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    outcome: Outcome
    maps: dict[str, str]
    """Table → generation and digest of its map."""
    evaluated: list[float]
    drained: int = 0
    """Batches that were in flight when the tables were to be clustered."""


class Trainer:
    """A sharded model and a way to train it."""

    def __init__(self, device: torch.device, local_size: int) -> None:
        self.device = device
        self.model: DistributedModelParallel
        self.optimizer: CombinedOptimizer
        self.model, self.optimizer = shard(CASE, device, local_size)
        self.pipeline = TrainPipelineSparseDist(self.model, self.optimizer, device, pipeline_postproc=True)
        self.losses: list[float] = []
        self.drained = 0

    @property
    def collection(self) -> CCEEmbeddingBagCollection:
        collection = self.model.module.get_submodule(COLLECTION)
        assert isinstance(collection, CCEEmbeddingBagCollection)
        return collection

    def plainly(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self.optimizer.zero_grad()
            loss, _ = self.model(batch.to(self.device))
            loss.backward()
            self.optimizer.step()
            self.losses.append(mean_over_ranks(loss))

    def pipelined(self, batches: Iterable[Batch]) -> None:
        """To the end of the batches, after which none is in flight."""
        iterator = iter(batches)
        while True:
            try:
                loss, *_ = self.pipeline.progress(iterator)
            except StopIteration:
                break
            self.losses.append(mean_over_ranks(loss))
            assert isinstance(self.collection.remap, PipelinedPostproc), "the remap is not pipelined"
            assert self.collection.ebc in self.pipeline._pipelined_modules
        self.drained += len(drain(self.pipeline))

    def drained_in_the_middle(self, batches: Sequence[Batch]) -> None:
        """The iterator does not end, and two batches are in flight when somebody wants to cluster."""
        iterator = iter([*batches, *batches])
        for _ in range(len(batches) - 2):
            loss, *_ = self.pipeline.progress(iterator)
            self.losses.append(mean_over_ranks(loss))
        rest: list[tuple[torch.Tensor, ...]] = drain(self.pipeline)
        self.drained += len(rest)
        self.losses += [mean_over_ranks(loss) for loss, *_ in rest]

    def collated(self, batches: Sequence[Batch], train: Callable[[Iterable[Batch]], None]) -> None:
        """Remapped by the worker of a data loader of its own for each stretch."""
        collate = RowCollate(self.collection, batches.__getitem__)
        # Forked, as it is by default but not in a process that the fork server started.
        loader = DataLoader(
            range(len(batches)), batch_size=None, num_workers=1, collate_fn=collate, multiprocessing_context="fork"
        )
        train(collate.batches(loader))


WAYS: dict[str, Callable[[Trainer, Sequence[Batch]], None]] = {
    "plain": Trainer.plainly,
    "pipelined": Trainer.pipelined,
    "drained in the middle": Trainer.drained_in_the_middle,
    "collated": lambda trainer, batches: trainer.collated(batches, trainer.plainly),
    "collated and pipelined": lambda trainer, batches: trainer.collated(batches, trainer.pipelined),
}


def in_every_way(folder: Path, *, world_size: int, device_type: str = "cpu") -> list[dict[str, Trained]]:
    """What each of so many ranks came to: way → model."""
    finished = on_ranks(folder, world_size, in_every_way_on_a_rank, device_type, world_size)
    for rank in finished:
        assert rank.code == 0, rank.stderr
    return [rank.value for rank in finished]


def assert_same(way: str, trained: Sequence[dict[str, Trained]], *, tolerance: float) -> None:
    """That a way came to what plain training came to; tolerance 0 is bit for bit, maps included."""
    for rank in trained:
        plain, found = rank["plain"], rank[way]
        assert found.maps == plain.maps or tolerance > 0
        assert max(found.outcome.deviation(plain.outcome).values()) <= tolerance
        assert found.evaluated == pytest.approx(plain.evaluated, rel=0, abs=tolerance)


def assert_all_ways_were_taken(trained: Sequence[dict[str, Trained]]) -> None:
    for rank in trained:
        # Two stretches, each of which ends with two batches in flight, or with none where its iterator ends.
        assert [rank[way].drained for way in WAYS] == [0, 0, 2 + 2, 0, 0]
        assert all(identity.startswith("not published, generation 2") for identity in rank["plain"].maps.values())


def in_every_way_on_a_rank(device_type: str, local_size: int) -> dict[str, Trained]:
    device = join(device_type, local_size)
    batches = rank_batches(CASE, STEPS)
    done = {}
    for name, train in WAYS.items():
        trainer = Trainer(device, local_size)
        train(trainer, batches[:CLUSTER_AFTER])
        recluster_sharded(trainer.model, trainer.optimizer, seed=1)
        train(trainer, batches[CLUSTER_AFTER:])
        done[name] = Trained(
            outcome=outcome_of(CASE, trainer.model, trainer.optimizer, trainer.losses),
            maps={table: trainer.collection.pointer_map(table).identity for table in trainer.collection.cce_tables()},
            evaluated=evaluated(trainer, batches[:EVALUATED]),
            drained=trainer.drained,
        )
    dist.destroy_process_group()
    return done


@torch.no_grad()
def evaluated(trainer: Trainer, batches: Sequence[Batch]) -> list[float]:
    """Losses of the model itself, which a pipeline must have let go of."""
    trainer.model.eval()
    return [mean_over_ranks(trainer.model(batch.to(trainer.device))[0]) for batch in batches]
