"""Clustering by workers: the bits of one process, whatever the workers; and what is left when something fails."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.launch import Job, is_running
from torchrec_cce.clustering.settings import HelperInit, ReclusterConfig
from torchrec_cce.errors import ClusteringError, ConfigError, JobError, MapMismatchError
from torchrec_cce.jobs.recluster.cluster import Clustered, Progress, StageTime, TableSource, _time_of, cluster
from torchrec_cce.jobs.recluster.estimate import estimate
from torchrec_cce.jobs.recluster.work import BundleMap, RegistryMap, Span, StoredTable
from torchrec_cce.maps.bundle import write_folder
from torchrec_cce.maps.manifest import Provenance
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.methods.cce import CCEEmbeddingBagConfig
from torchrec_cce.modules.recluster import TableRows, recluster_rows
from torchrec_cce.workers import EngineName, engine_of
from torchrec_cce.workers.engine import Engine
from torchrec_cce.workers.local import LocalEngine

MEMORY = 4 << 30
SEED = 5
SETTINGS = ReclusterConfig(num_iterations=3, points_per_centroid=8)


def make_table(
    name: str, *, num_ids: int, num_rows: int, num_columns: int, clustered: bool, keys: bool
) -> TableSnapshot:
    """A map with random weights: [2·c·k, 3]."""
    rng = np.random.default_rng(len(name))
    found = PointerMap.hashed(num_ids=num_ids, num_columns=num_columns, num_rows=num_rows, seed=3)
    if keys:
        raw = rng.choice(10 * num_ids, num_ids, replace=False) - 5 * num_ids
        found = found.with_vocabulary(Vocabulary.build(raw))
    if clustered:
        dtype = np.min_scalar_type(num_rows - 1)
        found = found.clustered(
            rng.integers(0, num_rows, (num_ids, num_columns)).astype(dtype), found.next_helper_hash(1)
        )
    return TableSnapshot(
        pointer_map=found,
        num_embeddings=num_ids,
        embedding_dim=3 * num_columns,
        feature_names=[name],
        pooling="sum",
        weights=rng.normal(size=(2 * num_columns * num_rows, 3)).astype(np.float32),
        frequencies=rng.integers(0, 4, num_ids),
    )


@pytest.fixture(scope="module")
def tables() -> dict[str, TableSnapshot]:
    """More IDs than embeddings and fewer, with and without vocabulary, before and after a first clustering."""
    return {
        "pairs": make_table("pairs", num_ids=150_000, num_rows=64, num_columns=3, clustered=True, keys=False),
        "each": make_table("each", num_ids=90_000, num_rows=400, num_columns=2, clustered=True, keys=False),
        "keys": make_table("keys", num_ids=70_000, num_rows=40, num_columns=4, clustered=True, keys=True),
        # From pointers of 8 bits to those of 4, in more than one part.
        "nibbles": make_table("nibbles", num_ids=70_001, num_rows=16, num_columns=5, clustered=True, keys=False),
        "fresh": make_table("fresh", num_ids=500, num_rows=300, num_columns=2, clustered=False, keys=True),
    }


@pytest.fixture(scope="module")
def sources(tables: dict[str, TableSnapshot], tmp_path_factory: pytest.TempPathFactory) -> list[TableSource]:
    """Some in a bundle, one in a registry; frequencies in a file, beside the map, or none."""
    folder = tmp_path_factory.mktemp("maps")
    write_folder(folder / "bundle", tables, provenance=Provenance.of_this_code())
    version = Registry(folder / "registry").publish({"each": tables["each"]}).version
    np.save(folder / "counts.npy", tables["pairs"].frequencies)
    frequencies = {"pairs": folder / "counts.npy", "keys": "snapshot"}
    return [
        TableSource(
            config=CCEEmbeddingBagConfig(
                name=name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=[name],
                num_rows=table.pointer_map.num_rows,
                num_columns=table.pointer_map.num_columns,
                min_pointer_bits=4 if name == "nibbles" else 8,
            ),
            rows=rows_of(table),
            stored=StoredTable(
                maps=RegistryMap(url=str(folder / "registry"), version=version)
                if name == "each"
                else BundleMap(folder=folder / "bundle"),
                map_digest=table.pointer_map.digest,
                frequencies=frequencies.get(name),  # type: ignore[arg-type]
            ),
        )
        for name, table in tables.items()
    ]


def with_stored(source: TableSource, **changes: Any) -> TableSource:
    return replace(source, stored=replace(source.stored, **changes))


def rows_of(table: TableSnapshot) -> TableRows:
    assert table.weights is not None
    states = {"sum": np.abs(table.weights[:, 0]), "exp_avg": table.weights[::-1] * 1e-6}
    return TableRows(weights=table.weights, states=states)


def assert_same_as_one_process(
    found: dict[str, Clustered], tables: dict[str, TableSnapshot], sources: list[TableSource], settings: ReclusterConfig
) -> None:
    assert list(found) == list(tables)
    for source in sources:
        name = source.config.name
        table, one = tables[name], found[name]
        frequencies = None if source.stored.frequencies is None else table.frequencies
        new_map, rows, report = recluster_rows(
            source.config, table.pointer_map, rows_of(table), seed=SEED, frequencies=frequencies, settings=settings
        )
        assert one.pointer_map.digest == new_map.digest
        np.testing.assert_array_equal(one.pointer_map.stored_view, new_map.stored_view)
        np.testing.assert_array_equal(one.rows.weights, rows.weights)
        for state, values in rows.states.items():
            np.testing.assert_array_equal(one.rows.states[state], values)
        assert replace(one.report, seconds=0.0) == replace(report, seconds=0.0)
        assert new_map.pointer_format.bits == source.config.pointer_bits
        codes = new_map.learned_codes[:]
        for column, sizes in enumerate(one.cluster_sizes):
            np.testing.assert_array_equal(sizes, np.bincount(codes[:, column], minlength=source.config.num_rows))
        stages = {"sampling", "k-means", "assignment", "digest"} | (
            {"pairs"} if name in ("pairs", "keys", "nibbles") else set()
        )
        assert set(one.times) == stages
        assert all(time.wall > 0 and time.cpu >= 0 for time in one.times.values())


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where engines share values; nothing is to be left in it."""
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield tmp_path / "cache"
    assert not files_in(tmp_path / "cache" / "live")


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("name", "workers", "helper_init"), [("local", 1, "zero"), ("local", 3, "residual"), ("ray", 2, "residual")]
)
def test_any_engine_and_workers_give_the_bits_of_one_process(
    tables: dict[str, TableSnapshot],
    sources: list[TableSource],
    tmp_path: Path,
    name: EngineName,
    workers: int,
    helper_init: HelperInit,
) -> None:
    settings = replace(SETTINGS, helper_init=helper_init)
    told: list[tuple[str, float]] = []
    with engine_of(name, num_workers=workers) as engine:
        found = run(sources, engine, tmp_path, settings, progress=lambda *reached: told.append(reached))
    assert_same_as_one_process(found, tables, sources, settings)
    assert [stage for stage, share in told if share == 1] == ["k-means", "pairs", "assignment", "digest"]
    assert not files_in(tmp_path / "work")


def test_little_memory_is_kept_to_and_gives_the_same_bits(
    tables: dict[str, TableSnapshot], sources: list[TableSource], tmp_path: Path
) -> None:
    used: list[int] = []
    with engine_of("local", num_workers=2) as engine:
        assert isinstance(engine, LocalEngine)
        workers = engine._started

        def weigh(_stage: str, _share: float) -> None:
            used.append(private_bytes(os.getpid()) + sum(private_bytes(each.process.pid or 0) for each in workers))

        with pytest.raises(ConfigError, match=r"memory_bytes=1000 .* 2 workers; at least (\d+) is needed") as error:
            run(sources, engine, tmp_path, memory_bytes=1000)
        least = int(re.search(r"least (\d+)", str(error.value))[1])  # type: ignore[index]
        memory_bytes = least + (8 << 20)
        found = run(sources, engine, tmp_path, memory_bytes=memory_bytes, progress=weigh)
    assert max(used) <= memory_bytes
    assert_same_as_one_process(found, tables, sources, SETTINGS)


def private_bytes(pid: int) -> int:
    """Memory of a process that no file backs."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


def run(
    sources: list[TableSource],
    engine: Engine,
    tmp_path: Path,
    settings: ReclusterConfig = SETTINGS,
    memory_bytes: int = MEMORY,
    progress: Progress | None = None,
) -> dict[str, Clustered]:
    return cluster(
        sources,
        engine,
        seed=SEED,
        settings=settings,
        memory_bytes=memory_bytes,
        work_dir=tmp_path / "work",
        progress=progress,
    )


def test_what_cannot_be_clustered_is_refused_before_a_worker_is_bothered(
    sources: list[TableSource], tmp_path: Path
) -> None:
    pairs = sources[0]
    weights = pairs.rows.weights.copy()
    weights[7, 1] = np.nan
    nan = replace(pairs, rows=replace(pairs.rows, weights=weights))
    no_counts = with_stored(sources[1], frequencies=tmp_path / "none.npy")
    no_numbers = tmp_path / "text.npy"
    no_numbers.write_text("text")
    few = tmp_path / "few.npy"
    np.save(few, np.ones(3, np.int64))
    cases: list[tuple[TableSource, type[Exception], str]] = [
        (nan, ClusteringError, "table 'pairs': 1 of 1152 values of weights are NaN"),
        (with_stored(pairs, map_digest="0" * 64), MapMismatchError, "table 'pairs' was trained with .* 000000000000; "),
        (
            replace(pairs, config=replace(pairs.config, name="other")),
            MapMismatchError,
            r"no map of table 'other', only of",
        ),
        (no_counts, FileNotFoundError, "none.npy"),
        (with_stored(pairs, frequencies=no_numbers), ConfigError, "text.npy: not a .npy file of numbers"),
        (
            with_stored(pairs, frequencies=few),
            ConfigError,
            r"table 'pairs': frequencies have shape \[3\], not \[150000\]",
        ),
    ]
    with engine_of("local", num_workers=1) as engine:
        for source, kind, message in cases:
            with pytest.raises(kind, match=message):
                run([source], engine, tmp_path)
        with pytest.raises(ConfigError, match="not all of different names"):
            run([pairs, pairs], engine, tmp_path)
        assert not engine._started  # type: ignore[attr-defined]


def test_a_full_disk_is_an_error_before_the_job_begins(sources: list[TableSource], tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))  # of each file
    try:
        with (
            engine_of("local", num_workers=1) as engine,
            pytest.raises(OSError, match=r"File too large; 450000 bytes are needed there: .*work"),
        ):
            run(sources, engine, tmp_path)
        assert not engine._started  # type: ignore[attr-defined]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not files_in(tmp_path / "work")


def test_workers_need_not_import_torch() -> None:
    check = "import sys, torchrec_cce.jobs.recluster.work, torchrec_cce.workers.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0


def test_time_is_counted_once_where_tasks_overlap() -> None:
    spans = [Span(start=5, stop=6, cpu=1), Span(start=1, stop=3, cpu=2), Span(start=2, stop=2.5), Span(start=2, stop=4)]
    assert _time_of(spans) == StageTime(wall=4, cpu=3)


@pytest.mark.parametrize("stage", ["k-means", "assignment"])
def test_a_killed_worker_ends_the_job_with_an_error(sources: list[TableSource], tmp_path: Path, stage: str) -> None:
    with engine_of("local", num_workers=2) as engine:
        assert isinstance(engine, LocalEngine)

        def kill(reached: str, _share: float) -> None:
            if reached == stage:
                for worker in engine._started:
                    worker.process.kill()

        with pytest.raises(
            JobError, match=rf"vanished .* {'column' if stage == 'k-means' else 'positions'} .*run the job again"
        ):
            run(sources, engine, tmp_path, progress=kill)
        workers = [worker.process.pid or 0 for worker in engine._started]
    assert not any(map(is_running, workers))
    assert not files_in(tmp_path / "work")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_clustering_that_is_stopped(
    sources: list[TableSource], tmp_path: Path, number: signal.Signals
) -> None:
    job = Job(tmp_path / "job", cluster_until_stopped, sources, tmp_path)
    notes = tmp_path / "workers"
    job.wait_for(notes.exists)
    workers = [int(pid) for pid in notes.read_text().split()]
    os.kill(job.pid, number)
    assert job.wait(60).code != 0
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not files_in(tmp_path / "work")


def cluster_until_stopped(sources: list[TableSource], tmp_path: Path) -> None:
    """Once a column is trained, writes the workers' process IDs to a file; the others are in work or in the queue."""
    with engine_of("local", num_workers=2) as engine:
        assert isinstance(engine, LocalEngine)

        def note(_stage: str, _share: float) -> None:
            (tmp_path / "note").write_text(" ".join(str(worker.process.pid) for worker in engine._started))
            (tmp_path / "note").rename(tmp_path / "workers")
            time.sleep(60)

        run(sources, engine, tmp_path, progress=note)


def test_an_estimate_counts_tasks_and_bytes_and_is_quick(
    sources: list[TableSource],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path))
    few = estimate(sources[:1], SETTINGS, num_workers=2, memory_bytes=MEMORY)
    found = estimate(sources, SETTINGS, num_workers=2, memory_bytes=MEMORY)
    assert {stage: one.tasks for stage, one in found.stages.items()} == {
        "k-means": 3 + 2 + 4 + 5 + 2,
        "pairs": 1 + 1 + 1,
        "assignment": 3 + 2 + 2 + 2 + 1,
        "digest": 5,
    }
    assert all(one.seconds > 0 for one in found.stages.values())
    assert few.stages["assignment"].seconds < found.stages["assignment"].seconds
    pointers = 150_000 * 3 + 90_000 * 2 * 2 + 70_000 * 4 + 70_001 * 3 + 500 * 2 * 2
    assert found.disk_bytes == pointers + 16 * (3 * 64**2 + 4 * 40**2 + 5 * 16**2) + 16 * 70_500
    assert few.memory_bytes < found.memory_bytes <= MEMORY
    with pytest.raises(ConfigError, match="memory_bytes=1 is too little"):
        estimate(sources, SETTINGS, num_workers=2, memory_bytes=1)
    assert estimate([], SETTINGS, num_workers=2, memory_bytes=MEMORY).stages["k-means"].tasks == 0
