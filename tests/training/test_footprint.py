"""Training bytes by formula, against those of the weights, optimizer state, maps and counts that there are."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch.distributed._shard.sharded_tensor import ShardedTensor

from tests.support.runs import criteo_config
from torchrec_cce.methods.registry import METHODS
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.footprint import CachedTables, Footprint, cached_tables, footprints, peak_training_bytes
from torchrec_cce.training.loop import train
from torchrec_cce.training.parallel import process_group
from torchrec_cce.training.run import Run

CAP = 3200
CASES: dict[str, dict[str, Any]] = {
    **{method: {"embedding": {"method": method}} for method in METHODS},
    "residents, int8": {"embedding": {"method": "cce_residents"}, "residents": {"dtype": "int8"}},
    "residents, float16": {"embedding": {"method": "cce_residents"}, "residents": {"dtype": "float16"}},
    **{  # so few rows that two batches take all, and so many that the first does not
        f"residents, {dtype}, first come": {
            "embedding": {"method": "cce_residents"},
            "residents": {"dtype": dtype, "fraction": 0.12, "count_first": False},
        }
        for dtype in ("float32", "int8")
    },
    "cce, weighed by frequency": {"recluster": {"weigh_by_frequency": True}},
    "cce without helper": {"embedding": {"use_helper": False}},
    **{
        f"{method}, {optimizer}": {"embedding": {"method": method}, "optimizer": {"embedding": optimizer}}
        for method, optimizer in (
            ("full", "sgd"),
            ("full", "adam"),
            ("cce", "adagrad"),
            ("robe", "adamw"),
            ("cce_residents", "adam"),
        )
    },
}


def config(log: Path, changes: Mapping[str, Any]) -> RunConfig:
    method = changes.get("embedding", {}).get("method", "cce")
    clusters = method in ("cce", "cce_residents")
    values = {key: dict(section) for key, section in changes.items()}
    values["embedding"] = {
        "max_parameters": None if method == "full" else CAP,
        **values.get("embedding", {}),
    }
    values["recluster"] = {"ct": 2 if clusters else 0, "cf": 2, **values.get("recluster", {})}
    return criteo_config(log, **values)


@pytest.mark.parametrize("case", CASES)
def test_the_formula_says_what_is_held(case: str, log: Path, tmp_path: Path) -> None:
    chosen = config(log, CASES[case])
    with process_group() as ranks:
        run = Run(chosen, tmp_path, ranks)
        run.begin()
        held = []
        for number, batch in zip(range(4), run.batches(chosen.data.train), strict=False):
            if number > 1 and chosen.recluster.ct > 0:
                recluster_sharded(run.model, run.optimizer, seed=0, frequencies=run.frequencies.totals())
            if number == 2 and run.has_residents:
                run.admit()
            run.count(batch)
            run.top_up()
            run.descend(run.forward(batch), batch)
            held.append(measured(run))
    found = Footprint.sum_of(footprints(chosen).values())
    assert asdict(found) == {kind: max(asdict(each)[kind] for each in held) for kind in asdict(found)}
    assert found.total == peak_training_bytes(chosen)


def measured(run: Run) -> Footprint:
    (collection,) = run.collections
    tensors = [*collection.named_parameters(), *collection.named_buffers()]
    held = {name: value.nbytes for name, value in tensors if not name.endswith("_features_order_tensor")}  # TorchRec's
    states = {
        name: sum(bytes_of(value) for key, value in state.items() if key != "step")
        for name, state in run.optimizer.state_dict()["state"].items()
        if ".embedding_bag_collection." in name
    }
    residencies = [collection.remap.residency(table) for table in collection.remap.resident_tables()]
    rows = {key: size for kind in (held, states) for key, size in kind.items() if "residents." in key}
    return Footprint(
        tables=sum(size for name, size in held.items() if name not in rows),
        optimizer=sum(size for name, size in states.items() if name not in rows),
        residents=sum(rows.values()) + sum(residency.nbytes for residency in residencies),
        pointers=sum(collection.pointer_map(table).nbytes for table in collection.cce_tables()),
        frequencies=sum(counts.nbytes for counts in run.frequencies.totals().values()),
    )


def bytes_of(state: Any) -> int:
    """Of this process's part of a sharded tensor, or of a tensor."""
    if isinstance(state, ShardedTensor):
        return sum(shard.tensor.nbytes for shard in state.local_shards())
    return int(state.nbytes)


def test_what_derives_from_full_tables_was_trained_in_full(log: Path, tmp_path: Path) -> None:
    full = config(log, {"embedding": {"method": "full"}})
    train(full, tmp_path / "full", show_progress=False)
    derived = {"derive": {"run": str(tmp_path / "full")}, "training": {"epochs": 0}}
    pq = config(log, {"embedding": {"method": "pq"}, **derived})
    done = train(pq, tmp_path / "pq", show_progress=False)
    assert done.sizes.training_bytes == peak_training_bytes(full) == (1000 + 800 + 50) * (16 * 4 + 4)
    assert Footprint.sum_of(footprints(pq).values()).total < done.sizes.training_bytes


def test_full_tables_behind_a_cache(log: Path) -> None:
    """Worked out by hand: 1,850 rows of 16 floats with rowwise Adagrad, of which a fifth, 370, are cached."""
    cached = cached_tables(config(log, {"embedding": {"method": "full"}}))
    assert cached == CachedTables(device_bytes=370 * (64 + 16) + 1850 * 4, host_bytes=1850 * (64 + 4))
