"""`torchrec-cce remap` as an operator runs it."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.launch import Finished, command
from tests.support.remap_folders import NAMES, Place, contents
from torchrec_cce.maps.registry import Registry


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path)


def run(place: Place, *arguments: str, code: int = 0) -> Finished:
    environment = {"TORCHREC_CCE_CACHE": str(place.folder / "cache"), "TORCHREC_CCE_REGISTRY": str(place.registry)}
    folder = place.folder / "process"
    finished = command(folder, "remap", "--workers", "1", "--input", place.raw, *arguments, **environment).wait()
    assert finished.code == code, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished


def test_a_job_and_the_same_again(place: Place) -> None:
    out = place.folder / "out"
    options = ["--output", str(out), "--helper", "store", "--layout", "lists", "--compression", "lz4"]
    said = run(place, *options, "--features", "item", "--features", "user=user", "--inverse-check").stdout
    assert said.startswith("remapped to version 1: 3 files, 3,000 rows, ")
    assert " rows read back and proved; IDs that the map does not know: item " in said
    names = pq.read_schema(out / NAMES[0]).names
    assert [name for name in names if "item" in name][-2:] == ["item.pointers", "item.helpers"]
    before = contents(out)
    again = json.loads(run(place, *options, "--features", "item", "--features", "user=user", "--json").stdout)
    assert (again["version"], again["num_files"], again["skipped_files"]) == (1, 3, 3)
    assert contents(out) == before


def test_mistakes_are_one_line(place: Place) -> None:
    def message(*arguments: str) -> str:
        (line,) = run(place, *arguments, "--output", str(place.folder / "out"), code=2).stderr.splitlines()
        return line

    assert "features ['nobody'] are not among those of version 1" in message("--features", "nobody")
    assert "or leave the feature out of --features" in message("--features", "user=day")
    assert "there is no version 7" in message("--version", "7")
    assert "compression='snappy' is not one of" in message("--format", "arrow", "--compression", "snappy")
    run(place, "--output", str(place.folder / "out"))
    Registry(place.registry).publish(Registry(place.registry).open().tables)
    assert "is the output of another job: version 2, not 1" in message("--helper", "drop")
    assert "is not one of" in run(place, "--output", "x", "--layout", "bits", code=2).stderr


def test_verify_needs_the_folder_alone_and_finds_a_byte_that_changed(place: Place) -> None:
    out = place.folder / "out"

    def verify(*arguments: str, code: int = 0) -> Finished:
        finished = command(place.folder / "process", "remap", "--verify", "--output", str(out), *arguments).wait()
        assert finished.code == code, finished.stderr
        return finished

    out.mkdir()
    (line,) = verify(code=2).stderr.splitlines()
    assert "the job has not finished" in line
    run(place, "--output", str(out))
    said = verify().stdout
    assert said.startswith("3 files, ")
    assert said.endswith(", are as they were written\n")
    found = json.loads(verify("--json").stdout)
    assert (found["num_files"], found["without_digest"]) == (3, 0)
    path = out / NAMES[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (line,) = verify(code=2).stderr.splitlines()
    assert f"{NAMES[1]}: was finished with SHA-256" in line
