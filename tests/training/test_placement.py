"""Where a run's tables go, and that it changes nothing of what they learn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.planner import ParameterConstraints

from tests.support import runs
from tests.support.launch import Job, command, on_ranks
from torchrec_cce.training import placement
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.loop import train
from torchrec_cce.training.model import build_model
from torchrec_cce.training.parallel import process_group, shard, table_optimizer
from torchrec_cce.training.placement import plan_run

_SCALES = (1e-6, 1e-6, 1.0, 1000.0)
"""Of the loss in each step: an epsilon of 1e-8 shows in tiny gradients, a rounding in large ones."""
FEATURES = ("C1", "C2", "C3")
CASES: list[tuple[str, float | None, int, bool]] = [
    ("sgd", None, 4, True),
    ("rowwise_adagrad", None, 4, True),
    ("adagrad", 0.0, 4, True),
    ("rowwise_adagrad", None, 8, False),
    ("sgd", 0.1, 4, False),
    ("rowwise_adagrad", 0.1, 4, False),
    ("adagrad", 0.1, 8, False),
    ("adam", None, 4, False),
    ("adamw", None, 4, False),
]
"""Optimizer, weight decay, columns of 16 floats, and whether a fused kernel trains a table with these columns."""


def batches() -> list[Batch]:
    """Of IDs that repeat within a batch and are missing in others."""
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            dense_features=torch.rand(8, 13, generator=generator),
            sparse_features=KeyedJaggedTensor(
                keys=list(FEATURES),
                values=torch.randint(0, 50, (24,), generator=generator),
                lengths=torch.ones(24, dtype=torch.int64),
            ),
            labels=torch.tensor([0.0, 1.0] * 4),
        )
        for _ in _SCALES
    ]


def plain_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """Those of the tables after a few steps of PyTorch's and TorchRec's own optimizers, without sharding."""
    model = build_model(config, num_dense=13, device=torch.device("cpu"))
    optimizer = table_optimizer(config.optimizer)
    tables = {name: p for name, p in model.named_parameters() if "embedding_bags" in name}
    rest = [p for name, p in model.named_parameters() if name not in tables]
    return steps(
        model,
        optimizer.kind(tables.values(), **optimizer.arguments),
        torch.optim.SGD(rest, lr=config.optimizer.dense_learning_rate),
    )


def sharded_weights(config: RunConfig, kind: str | None) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The same by a run's own sharding, and how CCE's tables were placed: as `kind`, or else as planned."""

    def constraints(**given: Any) -> ParameterConstraints:
        return ParameterConstraints(**given | ({"sharding_types": [kind]} if kind else {}))

    placement.ParameterConstraints = constraints  # type: ignore[assignment,misc]
    with process_group() as ranks:
        plan = plan_run(config, 1)
        (placed,) = plan.plan.values()
        model = build_model(config, num_dense=13, device=torch.device("cpu"))
        return steps(*shard(model, plan, config.optimizer, ranks)), {
            placed[name].sharding_type for name in ("C1", "C2")
        }


def steps(model: Any, *optimizers: Any) -> dict[str, torch.Tensor]:
    for batch, scale in zip(batches(), _SCALES, strict=True):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (scale * binary_cross_entropy_with_logits(model(batch), batch.labels)).backward()
        for optimizer in optimizers:
            optimizer.step()
    found = {name: value for name, value in model.state_dict().items() if "embedding_bags" in name}
    whole = {n: v.local_shards()[0].tensor if hasattr(v, "local_shards") else v for n, v in found.items()}
    return {name: value.detach().clone() for name, value in whole.items()}


def compare_placements(config: RunConfig, kinds: dict[str | None, str]) -> None:
    """How to place tables → how they are placed."""
    plain = plain_weights(config)
    for kind, expected in kinds.items():
        weights, found = sharded_weights(config, kind)
        assert found == {expected}
        assert weights.keys() == plain.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("optimizer", "decay", "num_columns", "fused"), CASES)
def test_no_placement_changes_the_mathematics(
    optimizer: str, decay: float | None, num_columns: int, fused: bool, tmp_path: Path
) -> None:
    """Also weight decay does what it says, of every row in every step, as PyTorch's optimizers have it."""
    config = runs.criteo_config(
        tmp_path / "nothing.tsv",
        embedding={"num_columns": num_columns},
        optimizer={
            "embedding": optimizer,
            "embedding_learning_rate": 0.01,
            "embedding_weight_decay": decay,
            "dense": "sgd",
            "dense_learning_rate": 1e-4,
        },
    )
    kinds: dict[str | None, str] = {None: "data_parallel"}
    if fused:
        kinds["table_wise"] = "table_wise"
    finished = Job(tmp_path / "job", compare_placements, config, kinds).wait()
    assert finished.code == 0, finished.stderr


def plans_here(config: RunConfig) -> list[dict[str, str]]:
    """Table → how it is placed, and where, each time it is planned."""
    with process_group() as ranks:
        plans = [plan_run(config, ranks.world_size) for _ in range(2)]
        return [{name: str(one) for tables in plan.plan.values() for name, one in tables.items()} for plan in plans]


@pytest.mark.parametrize("size", [10**8, 1000])
def test_the_plan_is_the_same_on_every_rank_and_every_time(size: int, tmp_path: Path) -> None:
    """Large tables are placed or split, small ones replicated; nothing is read or built."""
    config = runs.criteo_config(
        tmp_path / "nothing.tsv",
        tables={"C1": size, "C2": {"num_embeddings": size, "features": ["C2", "C4"]}, "C3": 50},
        embedding={"max_parameters": max(runs.MAX_PARAMETERS, size // 10)},
        training={"batch_size": 1001},
    )
    finished = on_ranks(tmp_path, 2, plans_here, config)
    assert [rank.code for rank in finished] == [0, 0], finished[0].stderr
    first, *others = (plan for rank in finished for plan in rank.value)
    assert others == [first] * 3
    for name in ("C1", "C2"):
        assert ("data_parallel" in first[name]) == (size == 1000)


def test_a_run_says_where_its_tables_are(tmp_path: Path) -> None:
    log = runs.write_criteo_log(tmp_path / "log.tsv", num_rows=200)
    config = runs.criteo_config(
        log,
        data={"train": {"path": str(log), "max_rows": 100}, "validation": None, "test": None},
        embedding={"num_columns": 8},
        recluster={"ct": 0},
    )
    for rank in on_ranks(tmp_path, 2, train, config, tmp_path / "run"):
        assert rank.code == 0, rank.stderr
    found = json.loads((tmp_path / "run" / "plan.json").read_text())
    replicated = {"sharding_type": "data_parallel", "compute_kernel": "packed", "ranks": [0, 1]}
    assert list(found) == ["C1", "C2", "C3"]
    assert (found["C1"], found["C2"]) == (replicated, replicated)


def test_tables_that_do_not_fit_are_one_line_before_they_are_made(tmp_path: Path) -> None:
    config = runs.criteo_config(
        tmp_path / "nothing.tsv",
        tables={"C1": 10**12},
        embedding={"method": "full", "max_parameters": None},
        recluster={"ct": 0},
    )
    toml = runs.write_toml(tmp_path / "run.toml", config)
    finished = command(tmp_path / "process", "train", toml, "--run-dir", tmp_path / "run").wait()
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: no plan: the tables need at least ")
