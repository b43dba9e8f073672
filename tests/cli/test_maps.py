"""`torchrec-cce maps …` as an operator runs it: from a training run to a registry and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import nights, runs
from tests.support.launch import Finished, command
from tests.support.snapshots import snapshot
from torchrec_cce.maps.registry import Registry
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection
from torchrec_cce.training.config_file import read_run_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two clusterings, frequencies counted."""
    folder = tmp_path_factory.mktemp("trained")
    config = runs.criteo_config(
        runs.write_criteo_log(folder / "log.tsv"), recluster={**runs.CLUSTERINGS, "weigh_by_frequency": True}
    )
    toml = runs.write_toml(folder / "run.toml", config)
    assert command(folder / "process", "train", toml, "--run-dir", folder / "run", "--quiet").wait().code == 0
    return folder / "run"


class Operator:
    """Runs commands on one registry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = Registry(folder / "registry", cache=folder / "cache")

    def run(self, *arguments: str | Path, code: int = 0) -> Finished:
        environment = {"TORCHREC_CCE_CACHE": str(self.folder / "cache")}
        finished = command(
            self.folder / "process", "maps", *arguments, "--registry", self.folder / "registry", **environment
        ).wait()
        assert finished.code == code, finished.stderr
        assert "Traceback" not in finished.stderr
        return finished

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code).stdout)


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    return Operator(tmp_path)


def test_a_run_is_published_with_all_it_knows(operator: Operator, trained: Path) -> None:
    said = operator.run("publish", "--run-dir", trained).stdout
    assert said.startswith("published version 1 (manifest ")
    opened = operator.registry.open()
    result = runs.result(trained)
    counted = nights.frequencies(runs.checkpoints(trained)[-1])
    for name in ("C1", "C2"):
        table = opened.tables[name]
        assert list(table.entropies) == result["entropies"][name]
        assert table.pointer_map.generation == 2
        np.testing.assert_array_equal(table.frequencies, counted[name])
        assert table.weights is not None
        assert np.isfinite(table.weights).all()
        assert table.weights.std() > 0
    assert opened.manifest.provenance.checkpoint == str(runs.checkpoints(trained)[-1])
    assert len(opened.manifest.provenance.config_digest or "") == 64

    config = read_run_config(trained)
    collection = CCEEmbeddingBagCollection(tables=config.table_configs())
    opened.attach(collection)
    np.testing.assert_array_equal(collection.ebc.embedding_bags["C1"].weight.detach(), opened.tables["C1"].weights)


def test_a_stale_parent_is_refused(operator: Operator, trained: Path) -> None:
    for _ in range(2):
        operator.run("publish", "--run-dir", trained)
    finished = operator.run("publish", "--run-dir", trained, "--parent", "1", code=2)
    (line,) = finished.stderr.splitlines()
    assert "made from version 1, but current is version 2" in line
    assert operator.json("publish", "--run-dir", trained, "--parent", "2")["version"] == 3


def test_nothing_to_publish(operator: Operator, tmp_path: Path) -> None:
    assert "no config.json" in operator.run("publish", "--run-dir", tmp_path / "none", code=2).stderr
    config = runs.criteo_config(runs.write_criteo_log(tmp_path / "log.tsv"), embedding={"method": "ce_concat"})
    toml = runs.write_toml(tmp_path / "run.toml", config)
    assert command(tmp_path / "process", "train", toml, "--run-dir", tmp_path / "run", "--quiet").wait().code == 0
    error = operator.run("publish", "--run-dir", tmp_path / "run", code=2).stderr
    assert "embedding.method='ce_concat' has no map to publish" in error
    assert not (operator.folder / "registry").exists()


def test_the_life_of_a_registry(operator: Operator) -> None:
    for seed in range(3):
        operator.registry.publish({"t_user": snapshot(seed)})
    listed = operator.json("list")
    assert listed["current"] == 3
    assert [one["version"] for one in listed["versions"]] == [1, 2, 3]
    lines = operator.run("list").stdout.splitlines()
    assert lines[0].split() == ["version", "parent", "created", "size", "manifest"]
    assert lines[3].startswith("3 ← current")

    shown = operator.json("show", "2")
    assert shown["version"] == 2
    assert shown["tables"]["t_user"]["entropies"] == [3.5, 6.25, 6.5, 6.75]
    text = operator.run("show").stdout
    assert text.startswith("version 3, parent 2, created ")
    assert "1,000" in text
    assert "4 × 50" in text
    (row,) = (line for line in text.splitlines() if line.startswith("t_user"))
    assert "3.50 6.25 6.50 6.75" in row
    assert row.endswith(operator.json("show")["tables"]["t_user"]["map_digest"][:12]), "not cut, though in a pipe"

    assert 0.9 < operator.json("diff", "1", "2")["t_user"]["share_changed"] < 1
    assert "t_user" in operator.run("diff", "1", "2").stdout
    assert operator.json("rollback", "1")["version"] == 1
    assert operator.run("pin", "2").stdout.endswith("is pinned\n")
    assert "2 (pinned)" in operator.run("list").stdout
    assert operator.run("unpin", "2").stdout.endswith("is not pinned\n")
    assert operator.run("gc", "--keep-last", "1", "--dry-run").stdout.startswith("would delete versions: 2;")
    assert operator.json("gc", "--keep-last", "1")["versions"] == [2]
    assert [one["version"] for one in operator.json("list")["versions"]] == [1, 3]
    assert [r["action"] for r in operator.json("history")][-4:] == ["rollback", "pin", "unpin", "collect"]
    assert "collect" in operator.run("history").stdout


def test_verify_tells_by_its_exit_status(operator: Operator) -> None:
    for seed in range(2):
        operator.registry.publish({"t_user": snapshot(seed)})
    assert operator.run("verify").stdout == "no damage\n"
    path = operator.registry.open(1).folder / "0000.weights.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    assert path.name in operator.run("verify", code=1).stdout
    assert operator.run("verify", "2").stdout == "no damage\n"
    (damage,) = operator.json("verify", "1", code=1)
    assert path.name in damage
    error = operator.run("rollback", "1", code=2).stderr
    assert path.name in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list"], "there is no such folder"),
        (["show"], "there is no such folder"),
        (["rollback", "1"], "there is no such folder"),
        (["gc", "--keep-last", "0"], "keep_last=0 is not at least 1"),
    ],
)
def test_mistakes_are_one_line(operator: Operator, arguments: list[str], message: str) -> None:
    (line,) = operator.run(*arguments, code=2).stderr.splitlines()
    assert message in line
    assert not (operator.folder / "registry").exists(), "a mistyped name makes no folder"


@pytest.mark.parametrize("arguments", [["show"], ["show", "3"], ["diff", "1", "2"], ["rollback", "1"]])
def test_an_empty_folder_is_an_empty_registry(operator: Operator, arguments: list[str]) -> None:
    (operator.folder / "registry").mkdir()
    assert operator.run("list").stdout.split() == ["version", "parent", "created", "size", "manifest"]
    (line,) = operator.run(*arguments, code=2).stderr.splitlines()
    assert "nothing has been published yet" in line


def test_small_ages_of_debris_want_force(operator: Operator) -> None:
    operator.registry.publish({"t_user": snapshot(0)})
    with operator.registry._store.writer("versions/00000002-0badcafe/0000.pointers.arrow") as sink:
        sink.write(memoryview(b"of a publisher at work"))
    gc = ["gc", "--keep-last", "1", "--debris-hours", "0"]
    (line,) = operator.run(*gc, code=2).stderr.splitlines()
    assert "--debris-hours=0 is less than 1: it takes files of publishers that are at work" in line
    assert "debris: 1 items" in operator.run(*gc, "--dry-run").stdout
    assert "debris: 1 items" in operator.run(*gc, "--force").stdout
    assert operator.json("gc", "--keep-last", "1", "--keep-records", "1")["versions"] == []
    assert [record["action"] for record in operator.json("history")] == ["collect"]


def test_names_are_printed_as_text(operator: Operator) -> None:
    name = "\x1b]0;title\x07[bold]t[/bold]\n\u202e"
    operator.registry.publish({name: snapshot(0)}, checkpoint=name)
    written_out = r"\x1b]0;title\x07[bold]t[/bold]\n\u202e"
    for line in operator.run("show").stdout.splitlines()[::2]:
        assert written_out in line
    assert json.loads(operator.run("show", "--json").stdout)["tables"].keys() == {name}
    other = Operator(operator.folder / name.replace("/", "-"))
    (line,) = other.run("list", code=2).stderr.splitlines()
    assert "there is no such folder" in line
    assert line.isprintable()


def test_a_registry_that_is_no_url(tmp_path: Path) -> None:
    finished = command(tmp_path / "process", "maps", "list", "--registry", "ftp://host/x").wait()
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ftp://host/x: cannot set up: ")
