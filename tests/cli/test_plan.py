"""`torchrec-cce plan`: no process group, no weights, no data."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs
from tests.support.launch import Finished, command
from torchrec_cce.training.config import RunConfig


def planned(folder: Path, *arguments: str, code: int = 0, **changes: Any) -> Finished:
    toml = runs.write_toml(folder / "run.toml", config(folder, **changes))
    finished = command(folder / "process", "plan", toml, *arguments).wait()
    assert finished.code == code, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished


def config(folder: Path, **changes: Any) -> RunConfig:
    """Tables of a billion IDs of a log that does not exist."""
    values = {
        "tables": {"C1": {"num_embeddings": 10**9, "features": ["C1", "C2"]}, "C3": 50},
        "embedding": {"max_parameters": 32_000, "dim": 64},
        "training": {"batch_size": 4096},
    }
    return runs.criteo_config(folder / "nothing.tsv", **{**values, **changes})


def test_three_methods_side_by_side(tmp_path: Path) -> None:
    found = json.loads(planned(tmp_path, "--world-size", "8", "--json").stdout)
    assert (found["world_size"], found["local_world_size"], found["batch_size"]) == (8, 8, 512)
    assert list(found["plans"]) == ["full", "hashing_trick", "cce"]
    tables = {m: {one["table"]: one for one in plan["tables"]} for m, plan in found["plans"].items()}
    for by_name in tables.values():
        assert set(by_name) == {"ebc.C1", "ebc.C3"}
    assert tables["full"]["ebc.C1"]["device_bytes"] > 10**9 * 64 * 4 / 8
    assert tables["full"]["ebc.C1"]["all_to_all_bytes"] > 0
    assert tables["hashing_trick"]["ebc.C1"]["host_bytes"] == 0
    cce = tables["cce"]["ebc.C1"]
    assert cce["sharding_type"] == "data_parallel"
    assert cce["all_to_all_bytes"] == 0
    assert cce["all_reduce_bytes"] == 2 * 32_000 * 4 * 7 // 8
    assert cce["host_bytes"] == 10**9 * 4
    full, cached = found["training_bytes"]["full"], found["cached_full"]
    assert full["total"] == full["tables"] + full["optimizer"] == cached["host_bytes"] == (10**9 + 50) * (64 + 1) * 4
    assert cached["device_bytes"] == pytest.approx(10**9 * (0.2 * (64 * 4 + 16) + 4), rel=1e-6)
    assert found["training_bytes"]["cce"]["pointers"] == 10**9 * 4
    for plan in found["plans"].values():
        assert plan["all_to_all_bytes"] == sum(one["all_to_all_bytes"] for one in plan["tables"])


def test_for_people(tmp_path: Path) -> None:
    lines = planned(tmp_path, "--world-size", "16", "--device", "cpu").stdout.splitlines()
    assert lines[0].split() == ["table", "method", "placement", "device", "host", "all-to-all", "all-reduce", "ms"]
    assert [line.split()[:2] for line in lines[1:10]] == [
        [table, method] for table in ("C1", "C3", "all") for method in ("full", "hashing_trick", "cce")
    ]
    assert lines[3].split()[2:6] == ["data_parallel,", "packed,", "on", "16"]
    assert max(map(len, lines[:10])) <= 120
    (held,) = (line for line in lines if line.startswith("full") and "GB" in line)
    assert held.split() == ["full", "260.0", "GB", "256.0", "GB", "4.0", "GB", "–", "–", "–"]
    assert "(UVM caching): 58.4 GB on devices, 260.0 GB on hosts" in lines[-1]


@pytest.mark.parametrize(("method", "is_planned"), [("ce_concat", True), ("count_sketch", True), ("robe", False)])
def test_the_method_of_the_run_comes_last(tmp_path: Path, method: str, is_planned: bool) -> None:
    embedding = {"method": method, "max_parameters": 32_000, "dim": 64}
    lines = planned(tmp_path, "--world-size", "8", embedding=embedding).stdout.splitlines()
    compressed, full = (next(line for line in lines if line.split()[:2] == [name, method]) for name in ("C1", "C3"))
    assert ("data_parallel" in compressed) == is_planned
    assert ("replicated, not planned" in compressed) != is_planned
    assert "data_parallel" in full
    assert any(line.split()[:2] == ["all", method] for line in lines) == is_planned
    found = json.loads(planned(tmp_path, "--world-size", "8", "--json", embedding=embedding).stdout)
    assert list(found["plans"]) == ["full", "hashing_trick", "cce", method]


def test_a_model_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    lines = planned(tmp_path, "--world-size", "8", "--hbm-gb", "1", "--ddr-gb", "8").stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        [table, method] for table in ("C1", "C3") for method in ("hashing_trick", "cce")
    ]
    (full,) = (line for line in lines if line.startswith("full: "))
    assert full.startswith("full: no plan: the tables need at least 2")
    assert "'C1'" in full
    found = json.loads(planned(tmp_path, "--world-size", "8", "--hbm-gb", "1", "--ddr-gb", "8", "--json").stdout)
    assert found["plans"]["full"] == {"error": full.removeprefix("full: ")}


def test_bags(tmp_path: Path) -> None:
    """Rows of 8 bytes, two a raw ID in each of 4 columns for CCE; of one feature, and of all."""
    sent = []
    for options in ([], ["--pooling-factor", "C2=11"], ["--pooling-factor", "11"]):
        arguments = ["--world-size", "8", "--batch-size", "64", "--json", *options]
        found = json.loads(planned(tmp_path, *arguments, optimizer={"embedding": "sgd"}).stdout)
        (full,) = (one for one in found["plans"]["full"]["tables"] if one["table"] == "ebc.C1")
        sent.append(full["all_to_all_bytes"])
    assert sent[1] - sent[0] == 10 * 64 * 8 * 7 // 8
    assert sent[2] - sent[0] == 2 * 10 * 64 * 8 * 7 // 8


def test_optimizers_that_fbgemm_lacks_replicate(tmp_path: Path) -> None:
    found = json.loads(planned(tmp_path, "--world-size", "8", "--json", optimizer={"embedding": "adamw"}).stdout)
    kinds = {one["sharding_type"] for method in ("hashing_trick", "cce") for one in found["plans"][method]["tables"]}
    assert kinds == {"data_parallel"}
    assert "(data_parallel)" in found["plans"]["full"]["error"]


def test_without_a_cap_there_is_only_the_full_model(tmp_path: Path) -> None:
    found = json.loads(
        planned(tmp_path, "--world-size", "8", "--json", embedding={"method": "full", "max_parameters": None}).stdout
    )
    assert list(found["plans"]) == ["full"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "12"], "error: world_size=12 is not a multiple of local_world_size=8"),
        (["--world-size", "8", "--pooling-factor", "C9=2"], "error: --pooling-factor C9=2: neither"),
        (["--world-size", "8", "--pooling-factor", "-1"], "error: --pooling-factor -1: neither"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (line,) = planned(tmp_path, *arguments, code=2).stderr.splitlines()
    assert line.startswith(message)
