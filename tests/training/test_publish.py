"""A run publishes a version after every clustering, from one rank, and goes on whatever the registry does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import runs
from tests.support.launch import command
from tests.support.runs import train_on
from torchrec_cce.maps.bundle import read_folder
from torchrec_cce.maps.registry import Registry
from torchrec_cce.training.versions import snapshot_of_run


def published(records: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(record["step"], record["version"]) for record in records if record["kind"] == "publish"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_version_after_every_clustering(log: Path, tmp_path: Path, world_size: int) -> None:
    config = runs.criteo_config(
        log, registry={"url": str(tmp_path / "registry")}, recluster={**runs.CLUSTERINGS, "rest": 1}
    )
    records = train_on(world_size, tmp_path, config)
    assert published(records) == [(8, 1), (16, 2)]
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    assert [one.version for one in registry.state().versions] == [1, 2]
    opened = registry.open()
    reports = {r["table"]: r for r in records if r["kind"] == "recluster" and r["step"] == 16}
    for name, table in opened.tables.items():
        assert list(table.entropies) == reports[name]["entropies"]
        assert table.objective == reports[name]["objective"]
        assert table.pointer_map.generation == 2
        assert table.weights is not None
        # The helper half starts at zero after a clustering: these are the words of that very moment.
        words = table.weights.reshape(table.pointer_map.num_columns, 2, table.pointer_map.num_rows, -1)
        assert not words[:, 1].any()
        assert words[:, 0].any()

    # The checkpoint says which version its maps are.
    (folder,) = runs.checkpoints(tmp_path / "run")[-1].glob("maps/*")
    _, maps = read_folder(folder)
    for name, table in snapshot_of_run(tmp_path / "run").tables.items():
        assert maps[name].pointer_map.digest == table.pointer_map.digest == opened.tables[name].pointer_map.digest
        assert not np.array_equal(table.weights, opened.tables[name].weights), "one more batch was trained"


def test_training_survives_its_registry(log: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = runs.criteo_config(
        log, registry={"url": str(tmp_path / "file" / "registry")}, recluster={**runs.CLUSTERINGS, "rest": 1}
    )
    toml = runs.write_toml(tmp_path / "run.toml", config)
    finished = command(tmp_path / "process", "train", toml, "--run-dir", tmp_path / "run").wait()
    assert finished.code == 0, finished.stderr
    assert finished.stderr.count("not published after batch") == 2
    assert "Not a directory" in finished.stderr
    without = runs.criteo_config(log, recluster={**runs.CLUSTERINGS, "rest": 1})
    train_on(1, tmp_path / "without", without)
    failed = [r for r in runs.metrics(tmp_path / "run") if r["kind"] == "publish"]
    assert ["cannot write" in r["error"] for r in failed] == [True, True]
    assert runs.result(tmp_path / "run") == runs.result(tmp_path / "without" / "run")
