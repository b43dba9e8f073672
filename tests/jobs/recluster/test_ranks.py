"""Checkpoints of models on several ranks, in every placement: the job does to them what the ranks would have done."""

import os
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save

from tests.support import nights
from tests.support.distributed_cases import MIXED, Case, rank_batches
from tests.support.launch import on_ranks
from tests.support.nights import tensors
from tests.support.parity import join, mean_over_ranks, shard
from torchrec_cce.jobs.recluster import job as job_module
from torchrec_cce.jobs.recluster.job import recluster
from torchrec_cce.jobs.recluster.request import ReclusterJob
from torchrec_cce.jobs.recluster.thresholds import Thresholds
from torchrec_cce.maps.registry import Registry
from torchrec_cce.modules.map_stamp import MapStamp
from torchrec_cce.sharding.distributed_checkpoint import load_checkpoint
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.sharding.tables import ShardedMaps

SEED, BEFORE = 5, 6
PLACEMENTS = {
    "mixed": MIXED,
    "swapped": {
        "user": "table_row_wise",
        "item": "row_wise",
        "tag": "table_wise",
        "day": "row_wise",
        "narrow": "data_parallel",
    },
    "replicated": dict.fromkeys(MIXED, "data_parallel"),
}
EASY = Thresholds(min_h1=0, min_h2_gain=0, min_learned=0, max_churn=1, max_objective_ratio=100, max_error=1)


class Step(NamedTuple):
    """A model on ranks, from which checkpoint to which."""

    case: Case
    folder: Path


def train(step: Step) -> list[float]:
    """Train, publish, save; cluster, save; train on. The losses after the clustering."""
    model, optimizer = shard(step.case, torch.device("cpu"), 2)
    batches = list(rank_batches(step.case))
    for batch in batches[:BEFORE]:
        _step(model, optimizer, batch)
    tables = ShardedMaps(model).snapshot()
    registry = Registry(step.folder / "registry", cache=step.folder / "cache")
    if dist.get_rank() == 0:
        registry.publish(tables)
    dist.barrier()
    registry.open().attach(ShardedMaps(model))
    save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=step.folder / "before")
    recluster_sharded(model, optimizer, seed=SEED)
    save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=step.folder / "after")
    return [_step(model, optimizer, batch) for batch in batches[BEFORE:]]


def go_on(step: Step) -> list[float]:
    """From what the job has made, on the same batches."""
    model, optimizer = shard(step.case, torch.device("cpu"), 2)
    Registry(step.folder / "registry", cache=step.folder / "cache").open(2).attach(ShardedMaps(model))
    load_checkpoint(step.folder / "output", model, optimizer)
    return [_step(model, optimizer, batch) for batch in list(rank_batches(step.case))[BEFORE:]]


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: object) -> float:
    optimizer.zero_grad()
    loss, _ = model(batch)
    loss.backward()
    optimizer.step()
    return mean_over_ranks(loss)


def on_a_rank(function: str, steps: list[Step]) -> list[list[float]]:
    join("cpu", 2)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    done = [globals()[function](step) for step in steps]
    dist.destroy_process_group()
    return done


def test_what_the_ranks_would_have_done(tmp_path: Path) -> None:
    """Weights, states and maps bit for bit; and the losses after it, also from another placement."""
    steps = [Step(Case(placement=placement), tmp_path / name) for name, placement in PLACEMENTS.items()]
    trained = on_ranks(tmp_path / "train", 2, on_a_rank, "train", steps)
    assert [rank.code for rank in trained] == [0, 0], trained[0].stderr
    for step in steps:
        job = ReclusterJob(
            registry=str(step.folder / "registry"),
            checkpoint=step.folder / "before",
            output=step.folder / "output",
            seed=SEED,
            thresholds=EASY,
        )
        with mock.patch.object(job_module, "engine_of", return_value=nights.InlineEngine(1)):
            assert recluster(job).summary.version == 2
        expected, found = tensors(step.folder / "after"), tensors(step.folder / "output")
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if not name.endswith("remap._extra_state"):
                assert torch.equal(value, found[name]), name
                continue
            stamps = [stamp._replace(version=2) for stamp in MapStamp.from_tensor(value)]
            assert MapStamp.from_tensor(found[name]) == stamps

    swapped = Step(Case(placement=PLACEMENTS["swapped"]), steps[0].folder)
    resumed = on_ranks(tmp_path / "resume", 2, on_a_rank, "go_on", [*steps, swapped])
    assert [rank.code for rank in resumed] == [0, 0], resumed[0].stderr
    assert resumed[0].value[:3] == trained[0].value
    assert resumed[0].value[3] == pytest.approx(trained[0].value[0], abs=1e-5)
