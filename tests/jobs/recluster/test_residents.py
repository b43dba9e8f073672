"""The job folds the rows of residents: the bits of a fold in training, by any engine, and a run that goes on."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.support import nights, runs
from tests.support.launch import Job
from tests.support.nights import EASY, Night, assert_same_tensors, newest
from tests.support.snapshots import assert_same
from torchrec_cce.clustering.fold import ResidentRows, TableFold
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.errors import ConfigError, DataFileError, MapFileError
from torchrec_cce.jobs.checkpoint.reader import CCECheckpoint
from torchrec_cce.jobs.recluster.cluster import TableSource, cluster
from torchrec_cce.jobs.recluster.estimate import estimate
from torchrec_cce.jobs.recluster.request import foresee
from torchrec_cce.jobs.recluster.work import BundleMap, StoredResidents, StoredTable
from torchrec_cce.maps.bundle import write_folder
from torchrec_cce.maps.manifest import Provenance
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.residency import Residency
from torchrec_cce.maps.residency_files import read_residencies, write_residencies
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.methods.cce import CCEEmbeddingBagConfig
from torchrec_cce.methods.residents import ResidentConfig
from torchrec_cce.modules.recluster import TableRows, recluster_rows
from torchrec_cce.modules.snapshots import snapshot_of
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.sharding.tables import ShardedStore
from torchrec_cce.training import loop
from torchrec_cce.training.config_file import read_run_config
from torchrec_cce.training.parallel import process_group
from torchrec_cce.workers import EngineName, engine_of

DTYPES = ("float32", "int8")
METHOD = {"method": "cce_residents", "max_parameters": runs.MAX_PARAMETERS}


@pytest.fixture(scope="module")
def in_a_phase(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """dtype → a run that was stopped in its second phase; no test may change it."""
    made: dict[str, Path] = {}

    def trained(dtype: str) -> Path:
        if dtype not in made:
            residents = {"dtype": dtype, "learning_rate": 0.1}
            made[dtype] = nights.train_a_run(tmp_path_factory.mktemp(dtype), embedding=METHOD, residents=residents)
        return made[dtype]

    return trained


def residencies(run: Path) -> dict[str, Residency]:
    (folder,) = (newest(run) / "residents").iterdir()
    return read_residencies(folder)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_fold_in_training(in_a_phase: Callable[[str], Path], tmp_path: Path, dtype: str) -> None:
    night = Night(tmp_path, in_a_phase(dtype), thresholds=EASY)
    summary = night.recluster().summary
    assert (summary.status, summary.parent, summary.version) == ("published", 1, 2)
    with process_group() as ranks:
        config = read_run_config(night.run)
        run = loop.Run(config, night.run, ranks)
        run.load()
        assert run.remap.phase_is_open
        settings = config.recluster.settings()
        reports = recluster_sharded(run.model, run.optimizer, seed=config.seed, settings=settings)
        weights, states = run.model.state_dict(), run.optimizer.state_dict()["state"]
        made = CCECheckpoint.at(night.output)
        for table in made.tables(night.registry):
            rows, key = made.read_rows(table), table.weight.removeprefix("model.")
            expected = ShardedStore(weights[key], states[key]).read()
            assert expected.weights.any()
            np.testing.assert_array_equal(rows.weights, expected.weights)
            assert rows.states.keys() == expected.states.keys() != set()
            for name, state in rows.states.items():
                np.testing.assert_array_equal(state, expected.states[name])
            assert table.snapshot.pointer_map.digest == run.collections[0].pointer_map(table.name).digest
        for figures in summary.tables:
            report = reports[figures.table]
            assert (figures.entropies, figures.churn) == (report.entropies, report.share_changed)
    before, after = residencies(night.run), residencies(night.output)
    for name, residency in after.items():
        assert (residency.phases, residency.is_open, before[name].is_open) == (2, False, True)
        np.testing.assert_array_equal(residency.ages, before[name].ages)
    opened = night.registry.open()
    assert {table.pointer_map.generation for table in opened.tables.values()} == {2}
    files = {path.name for path in (tmp_path / "registry" / "versions").rglob("*") if path.is_file()}
    assert not [name for name in files if "ages" in name or "resident" in name]

    # The run goes on, in its next phase, to its own last fold.
    result = loop.train(config, night.output, start="resume", show_progress=False)
    assert result.steps == runs.BATCHES + 1
    assert [r["step"] for r in runs.metrics(night.output) if r["kind"] == "recluster"] == [8, 8, 16, 16]
    for residency in residencies(night.output).values():
        assert (residency.phases, residency.is_open) == (3, False)


def killed_in_the_fold(job: Any) -> None:
    """SIGKILL to itself when the second table is assigned."""
    assign, calls = TableFold.assign, iter(range(100))

    def dying(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return assign(*arguments, **options)

    with mock.patch.object(TableFold, "assign", dying):
        nights.killable(job)


def test_killed_in_the_fold_and_run_again(in_a_phase: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("killed", "undisturbed"):
        (tmp_path / name).mkdir()
        night = Night(tmp_path / name, in_a_phase("float32"), thresholds=EASY)
        if name == "killed":
            assert Job(tmp_path / "process", killed_in_the_fold, night.job).wait().code == -signal.SIGKILL
            assert night.versions == [1]
            assert not night.output.exists()
        assert night.recluster().summary.status == "published"
        assert not list(night.folder.glob(".*"))
    first, second = (tmp_path / name / "output" for name in ("killed", "undisturbed"))
    assert_same_tensors(newest(first), newest(second))
    for name, table in runs.maps_of(first).items():
        assert_same(table, runs.maps_of(second)[name])


def test_a_forecast_tells_whose_rows_are_folded(in_a_phase: Callable[[str], Path], tmp_path: Path) -> None:
    night = Night(tmp_path, in_a_phase("int8"), thresholds=EASY)
    forecast = foresee(night.job)
    assert forecast.residents == {"C1": 250, "C2": 200}
    assert forecast.use_helper == {"C1": False, "C2": False}
    assert all(stage.tasks > 0 for stage in forecast.clustering.stages.values())
    night.assert_untouched()


def test_without_an_open_phase_there_is_nothing_to_fold(in_a_phase: Callable[[str], Path], tmp_path: Path) -> None:
    night = Night(tmp_path, in_a_phase("int8"), thresholds=EASY)
    night.recluster()
    with pytest.raises(ConfigError, match="no phase of residents is open, so that there are no rows to fold"):
        night.recluster(checkpoint=night.output, output=tmp_path / "again")


def test_files_that_are_missing_or_damaged(in_a_phase: Callable[[str], Path], tmp_path: Path) -> None:
    night = Night(tmp_path, in_a_phase("float32"), thresholds=EASY)
    folder = newest(night.run)
    found = CCECheckpoint.at(night.run)
    (table, _) = found.tables(night.registry)
    assert table.residents is not None
    (stored,) = [each for index, each in found.metadata.storage_data.items() if index.fqn == table.residents.rows]
    path = folder / stored.relative_path
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[stored.offset + stored.length // 2] ^= 4
    next((folder / "residents").rglob("*.ages.arrow")).unlink()
    with pytest.raises(MapFileError, match=r"ages\.arrow: missing"):
        night.recluster()
    for number, bad in enumerate((bytes(flipped), content[: stored.offset + stored.length // 2])):
        path.write_bytes(bad)
        with pytest.raises(DataFileError, match=r"damaged.*copy the checkpoint again"):
            found.copy_rows(table.residents.rows, tmp_path / str(number))
    path.unlink()
    with pytest.raises(DataFileError, match=r"missing.*copy the checkpoint again"):
        found.copy_rows(table.residents.rows, tmp_path / "2")


def test_a_helper_cannot_be_claimed(in_a_phase: Callable[[str], Path], tmp_path: Path) -> None:
    night = Night(tmp_path, in_a_phase("int8"), thresholds=EASY)
    with pytest.raises(ConfigError, match="table 'C1': it has residents and no helper; leave the table out"):
        CCECheckpoint.at(newest(night.run), use_helper={"C1": True}).tables(night.registry)


# Engines

SETTINGS = ReclusterConfig(num_iterations=3, points_per_centroid=20)


def fold_of(folder: Path, *, name: str, num_ids: int, num_rows: int, dtype: str, keys: bool = False) -> TableSource:
    """A table in an open phase whose map, ages and rows are in files."""
    rng = np.random.default_rng(num_ids)
    config = CCEEmbeddingBagConfig(
        name=name,
        num_embeddings=num_ids,
        embedding_dim=8,
        num_columns=2,
        num_rows=num_rows,
        feature_names=[name],
        residents=ResidentConfig(fraction=0.3),
    )
    pointer_map = PointerMap.hashed(num_ids=num_ids, num_columns=2, num_rows=num_rows, seed=1)
    if keys:
        pointer_map = pointer_map.with_vocabulary(Vocabulary.build(rng.permutation(10 * num_ids)[:num_ids]))
    pointers = rng.integers(0, num_rows, (num_ids, 2)).astype(config.pointer_dtype)
    pointer_map = pointer_map.clustered(pointers, pointer_map.next_helper_hash(1))
    write_folder(folder / "maps", {name: snapshot_of(config, pointer_map)}, provenance=Provenance.of_this_code())
    ages = rng.choice(np.array([0, 1, 2, 255], np.uint8), num_ids, p=[0.25, 0.25, 0.25, 0.25])
    write_residencies(folder / "residents", {name: Residency(ages=ages, phases=3, is_open=True)})
    rows = rng.normal(size=(config.max_residents, 8)).astype(np.float32)
    is_int8 = dtype == "int8"
    numbers = np.clip(rows / 0.04, -127, 127).astype(np.int8) if is_int8 else rows
    numbers.tofile(folder / "rows")
    weights = rng.normal(size=(4 * num_rows, 4)).astype(np.float32)
    return TableSource(
        config=config,
        rows=TableRows(weights=weights, states={"sum": np.abs(weights[:, 0])}),
        stored=StoredTable(
            maps=BundleMap(folder=folder / "maps"),
            map_digest=pointer_map.digest,
            residents=StoredResidents(
                folder=folder / "residents",
                rows=folder / "rows",
                shape=rows.shape,
                dtype="int8" if is_int8 else "float32",
                step=0.04 if is_int8 else 1.0,
            ),
        ),
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[TableSource]:
    tables: dict[str, dict[str, Any]] = {
        "floats": {"num_ids": 150_000, "num_rows": 64, "dtype": "float32"},
        "integers": {"num_ids": 70_000, "num_rows": 300, "dtype": "int8", "keys": True},
    }
    return [fold_of(tmp_path_factory.mktemp(name), name=name, **options) for name, options in tables.items()]


def residents_of(source: TableSource) -> ResidentRows:
    found = source.stored.open_residents(source.config.name)
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "workers"), [("local", 1), ("local", 3), ("ray", 2)])
def test_any_engine_gives_the_bits_of_one_process(
    sources: list[TableSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: EngineName, workers: int
) -> None:
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with engine_of(name, num_workers=workers) as engine:
        arguments: dict[str, Any] = {"seed": 5, "settings": SETTINGS, "work_dir": tmp_path / "work"}
        with pytest.raises(ConfigError, match=r"memory_bytes=1000 is too little") as error:
            cluster(sources, engine, memory_bytes=1000, **arguments)
        least = int(str(error.value).split("at least ")[1].split()[0])
        found = cluster(sources, engine, memory_bytes=least + (8 << 20), **arguments)
    for source in sources:
        one, stored = found[source.config.name], source.stored
        pointer_map, _ = stored.find(source.config.name, stored.maps.open())
        new_map, rows, report = recluster_rows(
            source.config,
            pointer_map,
            source.rows,
            seed=5,
            frequencies=None,
            settings=SETTINGS,
            residents=residents_of(source),
        )
        assert report.share_changed > 0.1
        np.testing.assert_array_equal(one.pointer_map.stored_view, new_map.stored_view)
        assert one.pointer_map.digest == new_map.digest
        np.testing.assert_array_equal(one.rows.weights, rows.weights)
        assert not one.rows.states["sum"].any()
        assert replace(one.report, seconds=0.0) == replace(report, seconds=0.0)


def test_an_estimate_runs_a_little_of_a_fold(sources: list[TableSource]) -> None:
    found = estimate(sources, SETTINGS, num_workers=2, memory_bytes=4 << 30)
    assert all(stage.seconds > 0 for stage in found.stages.values())
