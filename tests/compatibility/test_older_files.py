"""What older code wrote still opens, and says what it said then.

`fixtures/` was written by the code before the packages were laid out anew, `fixtures/expected.json` is what that code
read from it. Only what users have is used here: the command line, and the names of the root package.

Digests, pointers and the bytes of files are compared exactly: they are integers, copies, or made by a clustering of
the weights in the fixtures, which promises the same bits for any threads and chunks (sums are integers, and distances
have a fixed order). Losses come from BLAS and FBGEMM kernels, which round in another way on another CPU: they are
compared to `CLOSE`. Where weights that were trained here are clustered, a rounding may move an ID to another word:
what comes after is compared to `NEAR`.
"""

import hashlib
import io
import json
import math
import sys
import tarfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchrec import KeyedJaggedTensor

from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, Registry, Vocabulary
from torchrec_cce.cli.main import main

FIXTURES = Path(__file__).parent / "fixtures"
CLOSE, NEAR = 1e-6, 1e-2
CLUSTERED = 16
"""The batch after which the run clusters weights that were trained here."""
CLOCKS = {"time", "seconds", "rows_per_second", "recluster_seconds", "checkpoint"}
LOOSE = ("--max-churn", "1", "--min-learned", "0", "--max-objective-ratio", "2")
"""Gates that a run of a few batches passes."""
REMAPPED = {
    "words-store": ("--version", "1", "--helper", "store"),
    "words-drop": ("--version", "3", "--helper", "drop", "--compression", "lz4"),
    "lists-keep-raw": ("--version", "1", "--layout", "lists", "--helper", "keep-raw", "--format", "arrow"),
    "vocabulary": ("--version", "2", "--features", "C1=wide", "--features", "C2", "--helper", "store"),
}
"""Folder → the options that it was remapped with, from registry and log of the fixtures."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums of a fixed order, and no threads that wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((FIXTURES / "expected.json").read_text())
    return read


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked fixtures, as the current folder: all paths in them are relative to it."""
    unpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def unpack(folder: Path) -> None:
    for archive in sorted(FIXTURES.glob("*.tar.gz")):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


def command(*arguments: str, code: int = 0) -> str:
    """What `torchrec-cce ARGUMENTS` prints, in this process: another would wait for its imports."""
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", ["torchrec-cce", *arguments]), redirect_stdout(printed):
        try:
            main()
            status: object = 0
        except SystemExit as end:
            status = end.code or 0
    assert status == code, (arguments, status, printed.getvalue())
    return printed.getvalue()


def assert_alike(found: Any, expected: Any, tolerance: float = CLOSE, where: str = "") -> None:
    """Floats within `tolerance`, all else equal."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), where
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_alike(found[key], value, tolerance, f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list), where
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_alike(found[i], value, tolerance, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance), (where, found, expected)
    else:
        assert found == expected, where


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def without_clocks(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in CLOCKS}


def metrics(run_dir: str, after: int = 0) -> list[dict[str, Any]]:
    """The records of a run after so many batches, without what depends on the clock."""
    lines = Path(run_dir, "metrics.jsonl").read_text().splitlines()
    return [without_clocks(one) for one in map(json.loads, lines) if one["step"] > after]


def losses(run_dir: str, after: int = 0) -> list[dict[str, Any]]:
    """Of these the losses and evaluations."""
    return [one for one in metrics(run_dir, after) if one["kind"] in ("train", "validation", "test")]


# What is looked at. `expected.json` is what these functions returned under the older code.


def see_run() -> dict[str, Any]:
    """Checkpoint and configuration of a run, evaluated."""
    return {"evaluate": json.loads(command("evaluate", "run")), "records": metrics("run")}


def see_resumed() -> list[dict[str, Any]]:
    """The rest of the run, which clusters once more."""
    command("train", "run.toml", "--run-dir", "run", "--resume", "--quiet")
    return metrics("run", after=12)


def see_registry() -> dict[str, Any]:
    """What `maps` says of the registry."""
    return {
        "list": json.loads(command("maps", "list", "--registry", "maps", "--json")),
        "history": json.loads(command("maps", "history", "--registry", "maps", "--json")),
        "verify": json.loads(command("maps", "verify", "--registry", "maps", "--json")),
        "show": [
            json.loads(command("maps", "show", version, "--registry", "maps", "--json")) for version in ("1", "2", "3")
        ],
        "diff": json.loads(command("maps", "diff", "1", "3", "--registry", "maps", "--json")),
    }


def see_versions() -> dict[str, Any]:
    """Every version opened in Python, and what an embedding is under it."""
    seen: dict[str, Any] = {}
    for version in (1, 2, 3):
        opened = Registry("maps").open(version, verify="all")
        tables: dict[str, Any] = {}
        for name, table in opened.tables.items():
            pointers = table.pointer_map
            assert replace(pointers).digest == pointers.digest, "the digest of the file is that of what is read"
            tables[name] = {
                "digest": pointers.digest,
                "generation": pointers.generation,
                "version": pointers.version,
                "unseen": pointers.unseen,
                "num_ids": pointers.num_ids,
                "first_pointers": pointers.stored_view[:3].tolist(),
                "frequencies": None if table.frequencies is None else sha256(table.frequencies.tobytes()),
                "weights": None if table.weights is None else sha256(table.weights.tobytes()),
                "entropies": [round(value, 9) for value in table.entropies],
            }
            if isinstance(pointers.vocabulary, Vocabulary):
                tables[name]["vocabulary"] = pointers.vocabulary.digest
                tables[name]["keys"] = sha256(pointers.vocabulary.keys().tobytes())
        collection = CCEEmbeddingBagCollection(
            tables=[
                CCEEmbeddingBagConfig(
                    name=name, num_embeddings=n, embedding_dim=16, feature_names=[name], num_rows=100, num_columns=4
                )
                for name, n in (("C1", 1000), ("C2", 800))
            ]
        )
        opened.attach(collection)
        ids = torch.arange(0, 800, 7)
        features = KeyedJaggedTensor.from_lengths_sync(
            keys=["C1", "C2"], values=torch.cat([ids, ids]), lengths=torch.ones(2 * len(ids), dtype=torch.int64)
        )
        # A bag of one ID is the sum of two floats: the same bits on every machine.
        embeddings = collection(features).values().detach().numpy()
        seen[str(version)] = {"tables": tables, "embeddings": sha256(embeddings.tobytes())}
    return seen


def see_remapped_folders() -> dict[str, Any]:
    """The files of all remapped folders, decoded by any reader of Parquet and Arrow."""
    return {name: table_digests(read_table(Path("remapped", name))) for name in REMAPPED}


def see_remapping() -> dict[str, Any]:
    """The raw log, remapped anew. A file's SHA-256 is that of one version of pyarrow, which has the compressors."""
    seen = {}
    for name, options in REMAPPED.items():
        arguments = ("--registry", "maps", "--input", "raw", "--output", f"again/{name}", *options)
        said = json.loads(command("remap", *arguments, "--workers", "1", "--inverse-check", "--quiet", "--json"))
        said = {key: said[key] for key in ("version", "num_files", "num_rows", "checked_rows", "unseen")}
        path = file_of(Path("again", name))
        seen[name] = {
            "said": said,
            "tables": table_digests(read_table(Path("again", name))),
            "file": path.name,
            "sha256": sha256(path.read_bytes()),
        }
    return seen


def file_of(folder: Path) -> Path:
    (path,) = (path for path in folder.iterdir() if path.suffix in (".parquet", ".arrow"))
    return path


def read_table(folder: Path) -> pa.Table:
    path = file_of(folder)
    return pa.ipc.open_file(path).read_all() if path.suffix == ".arrow" else pq.ParquetFile(path).read()


def table_digests(table: pa.Table) -> dict[str, Any]:
    """Of the values of every column, and of the document in the schema."""
    document = json.loads(table.schema.metadata[b"torchrec_cce.remapped"])
    columns = {
        name: f"{table.schema.field(name).type} {sha256(json.dumps(table.column(name).to_pylist()).encode())}"
        for name in table.column_names
    }
    return {"document": document, "columns": columns}


def see_training_on_remapped() -> dict[str, Any]:
    """Runs that start from a published version, on remapped and on raw data."""
    seen = {}
    for toml in ("remapped-words.toml", "remapped-lists.toml", "vocabulary.toml", "vocabulary-raw.toml"):
        command("train", toml, "--run-dir", f"runs/{toml}", "--quiet")
        seen[toml] = losses(f"runs/{toml}")
    return seen


def see_reclustering() -> dict[str, Any]:
    """The nightly job on the run, then the rest of the run from its output."""
    options = ("--registry", "maps", "--output-checkpoint", "night", "--workers", "1", *LOOSE, "--json")
    dry = json.loads(command("recluster", "--checkpoint", "run/checkpoints/" + newest("run"), *options, "--dry-run"))
    said = json.loads(command("recluster", "--checkpoint", "run", *options))
    shown = json.loads(command("maps", "show", "--registry", "maps", "--json"))
    return {
        "dry": {name: dry[name] for name in ("parent", "num_ids", "use_helper")},
        "said": {name: said[name] for name in ("status", "parent", "version", "forced")},
        "gates": said["gates"],
        "tables": shown["tables"],
        "checkpoint": newest("night"),
        "tensors": checkpoint_digests(Path("night/checkpoints", newest("night"))),
    }


def see_trained_on() -> list[dict[str, Any]]:
    command("train", "run.toml", "--run-dir", "night", "--resume", "--quiet")
    return losses("night", after=12)


def newest(run_dir: str) -> str:
    return max(path.name for path in Path(run_dir, "checkpoints").iterdir())


def checkpoint_digests(folder: Path) -> dict[str, str]:
    """Name → type, shape and SHA-256 of every tensor of a distributed checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    whole = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(whole, checkpoint_id=str(folder), no_dist=True)
    return {
        name: f"{each.dtype} {list(each.shape)} {sha256(each.reshape(-1).view(torch.uint8).numpy().tobytes())}"
        for name, each in sorted(whole.items())
    }


def see_experiment() -> dict[str, Any]:
    """An experiment that has ended: the same command runs nothing, and the report reads it."""
    before = {path: path.stat().st_mtime_ns for path in Path("bench/runs").rglob("metrics.jsonl")}
    command("bench", "plan.toml", "--out", "bench", "--workers", "1", "--quiet")
    assert {path: path.stat().st_mtime_ns for path in Path("bench/runs").rglob("metrics.jsonl")} == before
    command("report", "bench/results.parquet", "--out", "report", "--max-bytes", "100000000")
    report = json.loads(Path("report/report.json").read_text())
    return {
        "results": as_json(pq.read_table("bench/results.parquet").drop_columns(["versions"]).to_pylist()),
        "report": sorted(report),
    }


# The same, under the code at hand.


@pytest.mark.usefixtures("workplace")
def test_a_run_opens_and_goes_on(expected: dict[str, Any]) -> None:
    assert_alike(see_run(), expected["run"])
    assert_resumed_alike(see_resumed(), expected["resumed"])


def assert_resumed_alike(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    before = sum(record["step"] < CLUSTERED for record in expected)
    assert 0 < before < len(expected)
    assert_alike(found[:before], expected[:before])
    assert_alike(found[before:], expected[before:], NEAR)


@pytest.mark.usefixtures("workplace")
def test_a_registry_opens(expected: dict[str, Any]) -> None:
    assert see_registry() == expected["registry"]
    assert see_versions() == expected["versions"]


@pytest.mark.usefixtures("workplace")
def test_remapped_data_opens_and_is_made_again(expected: dict[str, Any]) -> None:
    assert see_remapped_folders() == expected["remapped_folders"]
    found, wanted = see_remapping(), expected["remapping"]
    if pa.__version__ != expected["pyarrow"]:
        for one in (*found.values(), *wanted.values()):
            del one["sha256"]
    assert found == wanted


@pytest.mark.usefixtures("workplace")
def test_runs_start_from_published_versions(expected: dict[str, Any]) -> None:
    found = see_training_on_remapped()
    assert_alike(found, expected["training_on_remapped"])
    assert found["vocabulary.toml"] == found["vocabulary-raw.toml"]


@pytest.mark.usefixtures("workplace")
def test_a_checkpoint_is_clustered_offline(expected: dict[str, Any]) -> None:
    assert_alike(see_reclustering(), expected["reclustering"])
    assert_resumed_alike(see_trained_on(), expected["trained_on"])


@pytest.mark.usefixtures("workplace")
def test_an_experiment_opens(expected: dict[str, Any]) -> None:
    found = see_experiment()
    for row in found["results"]:
        for later in ("resident_bytes", "training_bytes"):  # which older code does not know
            assert row.pop(later) == 0
    assert found == expected["experiment"]
