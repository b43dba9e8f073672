"""A run on remapped data measures what the same run on the raw log does, to the last bit, and touches no map."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support import runs
from tests.support.launch import Job, on_ranks
from tests.support.remapped_files import (
    COLUMNS,
    KEYS,
    NUM_ROWS,
    TABLES,
    World,
    remapped_config,
    write_remapped,
)
from tests.support.runs import assert_same_run, train, train_on, train_until
from torchrec_cce import CCEEmbeddingBagCollection, Registry
from torchrec_cce.data.remapped import RemappedLog
from torchrec_cce.data.remapped_format import HelperPolicy
from torchrec_cce.errors import ConfigError, DataFileError, MapMismatchError, RegistryError
from torchrec_cce.training import loop
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.versions import snapshot_of_run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adamw"])
@pytest.mark.parametrize("helper", ["store", "keep-raw", "drop"])
def test_metrics_and_weights_are_those_of_the_raw_log(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helper: HelperPolicy, optimizer: str
) -> None:
    """Uninterrupted, and interrupted in the middle."""
    monkeypatch.setattr(loop, "_LOG_EVERY", 1)
    changes = {"embedding": {"use_helper": helper != "drop"}, "optimizer": {"embedding": optimizer}}
    train(remapped_config(world.raw, world.url, **changes), tmp_path / "raw")
    on_pointers = remapped_config(world.remapped(helper), world.url, format="remapped", **changes)
    with monkeypatch.context() as patch:
        patch.delattr(RemappedLog, "to_rows")  # small tables are replicas, which take words
        train(on_pointers, tmp_path / "whole")
    assert_same_run(tmp_path / "raw", tmp_path / "whole")
    steps = sum(record["kind"] == "train" for record in runs.metrics(tmp_path / "whole"))
    assert steps == 2 * 14

    monkeypatch.setattr(loop.StopRequest, "on_any_rank", lambda _: next(stops))
    stops = iter([False] * 8 + [True] + [False] * 10 + [True] + [False] * 100)
    assert train(on_pointers, tmp_path / "parts").interrupted
    assert train(on_pointers, tmp_path / "parts", resume=True).interrupted
    assert not train(on_pointers, tmp_path / "parts", resume=True).interrupted
    assert_same_run(tmp_path / "raw", tmp_path / "parts")


def test_two_ranks(world: World, tmp_path: Path) -> None:
    """Bit by bit what two ranks make of the raw log; interrupted and resumed, too."""
    once = {"training": {"epochs": 1}}
    raw = train_on(2, tmp_path / "raw", remapped_config(world.raw, world.url, **once))
    on_pointers = remapped_config(world.remapped("store"), world.url, format="remapped", **once)
    assert train_on(2, tmp_path / "whole", on_pointers) == raw
    folder = tmp_path / "parts"
    for rank in on_ranks(folder, 2, train_until, on_pointers, folder / "run", 11):
        assert rank.code == 0, rank.stderr
    assert train_on(2, folder, on_pointers, resume=True) == raw
    assert_same_run(tmp_path / "raw" / "run", folder / "run")


def test_a_run_starts_from_the_version(world: World, tmp_path: Path) -> None:
    """Its maps, words and entropies; the helper's words stay behind where they are not used."""
    opened = world.registry.open(2)
    for use_helper in (True, False):
        run = tmp_path / str(use_helper)
        frozen = {"embedding_learning_rate": 1e-30}
        train(remapped_config(world.raw, world.url, embedding={"use_helper": use_helper}, optimizer=frozen), run)
        tables = snapshot_of_run(run).tables
        assert tables.keys() == opened.tables.keys()
        for name, table in tables.items():
            assert table.pointer_map.digest == opened.tables[name].pointer_map.digest
            assert table.entropies == opened.tables[name].entropies != ()
            expected = np.array(opened.tables[name].weights).reshape(4, 2, -1)
            assert expected[:, 1].any()
            expected[:, 1] *= use_helper
            np.testing.assert_array_equal(table.weights.reshape(4, 2, -1), expected)  # type: ignore[union-attr]


def test_what_was_current_at_the_start_is_kept(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that is repeated before the first checkpoint, as after a kill, starts from the same version."""
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    opened = world.registry.open(2).tables
    registry.publish(opened)
    one = remapped_config(world.raw, tmp_path / "registry")
    monkeypatch.setattr(loop._Training, "to_the_end", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        loop.train(one, tmp_path / "run", start="either", show_progress=False)
    monkeypatch.undo()
    registry.publish(world.registry.open(1).tables)
    loop.train(one, tmp_path / "run", start="either", show_progress=False)
    found = runs.result(tmp_path / "run")
    train(remapped_config(world.raw, world.url), tmp_path / "expected")
    assert found == runs.result(tmp_path / "expected")
    train(one, tmp_path / "another")
    assert runs.result(tmp_path / "another") != found, "a new run starts from what is current now"


def test_clustering_on_with_a_vocabulary(world: World, tmp_path: Path) -> None:
    """Frequencies are of the map's rows, and unknown IDs are in no row."""
    one = remapped_config(
        world.raw,
        tmp_path / "registry",
        registry={"start": 1},
        recluster={"ct": 1, "cf": 5, "rest": 0, "weigh_by_frequency": True},
    )
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    registry.publish(world.registry.open(2).tables)
    train(one, tmp_path / "run")
    published = registry.open().tables["t_user"]
    assert published.pointer_map.generation == 3
    users = world.log.column("user").combine_chunks().slice(0, 5 * 65).drop_null().to_numpy()
    np.testing.assert_array_equal(published.frequencies, [(users == key).sum() for key in KEYS[:800]])


def rss_of_maps(config: RunConfig, run_dir: Path) -> list[tuple[int, int]]:
    """Train; KiB of all mapped pointer files, resident and whole, batch by batch."""
    found = []
    descend = loop.Run.descend

    def measured(run: Any, loss: torch.Tensor, batch: Any) -> None:
        descend(run, loss, batch)
        found.append((mapped("Rss"), mapped("Size")))

    loop.Run.descend = measured  # type: ignore[method-assign]
    loop.train(config, run_dir, show_progress=False)
    return found


def mapped(field: str) -> int:
    """KiB of the memory-mapped files `….pointers.arrow`, from `/proc/self/smaps`."""
    blocks = re.findall(r"(?m)^.*\.pointers\.arrow\n(?:\w+: .*\n)+", Path("/proc/self/smaps").read_text())
    return sum(int(kib) for block in blocks for kib in re.findall(rf"(?m)^{field}: +(\d+) kB", block))


def test_no_page_of_a_map_is_read(world: World, tmp_path: Path) -> None:
    """While batches of remapped data are trained; the raw log of the same rows needs its map."""
    num_ids = 6_000_000  # 48 MB of pointers
    tables = {"t_user": {"num_embeddings": num_ids, "features": ["user"]}, "day": 7}
    raw = world.log.drop_columns(["items", "seen_items"])
    users = np.random.default_rng(0).integers(0, num_ids, NUM_ROWS)
    raw = raw.set_column(raw.schema.get_field_index("user"), "user", pa.array(users))
    pq.write_table(raw, tmp_path / "raw.parquet")
    changes = {"tables": tables, "data": {"columns": {}}, "training": {"batch_size": 65, "evaluate_every": 4}}
    one = remapped_config(tmp_path / "raw.parquet", tmp_path / "registry", **changes)
    one = runs.changed(one.as_dict(), {"embedding": {"max_parameters": 2**15}})
    collection = CCEEmbeddingBagCollection(tables=one.table_configs())
    start = collection.pointer_map("t_user")
    pointers = np.random.default_rng(1).integers(0, start.num_rows, (num_ids, 4), dtype=np.uint16)
    collection.attach_pointer_map("t_user", start.clustered(pointers, start.next_helper_hash(0)))
    Registry(tmp_path / "registry", cache=tmp_path / "cache").publish(collection.snapshot())
    del pointers
    write_remapped(tmp_path / "remapped" / "log.parquet", raw, collection)
    on_pointers = runs.changed(
        remapped_config(tmp_path / "remapped", tmp_path / "registry", format="remapped", **changes).as_dict(),
        {"embedding": {"max_parameters": 2**15}},
    )
    found = Job(tmp_path / "remapped-job", rss_of_maps, on_pointers, tmp_path / "run").wait().value
    assert len(found) == 2 * 14
    assert all(size > 40_000 for _, size in found), "it is mapped"
    assert max(resident for resident, _ in found) < 200
    raw_found = Job(tmp_path / "raw-job", rss_of_maps, one, tmp_path / "raw-run").wait().value
    assert raw_found[-1][0] > 10_000, "the measure sees maps that are used"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recluster": {"ct": 1, "cf": 4}}, r"ct=1: remapped data has the pointers of one version of the maps, and a"),
        ({"recluster": {"weigh_by_frequency": True}}, r"weigh_by_frequency=true counts raw IDs"),
        ({"registry": {"watch_every": 5}}, r"watch_every=5: remapped data has the pointers of one version"),
        ({"registry": {"start": "newest"}}, r"start='newest' is neither 'current' nor the number of a version"),
        ({"registry": {"url": None}}, r"start='current' needs url, the registry that has the version"),
        (
            {"embedding": {"method": "ce_concat"}},
            r"start='current' is for method='cce' or 'cce_residents'; it is 'ce_concat'",
        ),
        (
            {"registry": {"start": None}, "embedding": {"method": "ce_concat", "use_helper": False}},
            r"use_helper=false is for method='cce'; it is 'ce_concat'",
        ),
        (
            {"embedding": {"use_helper": False}, "recluster": {"helper_init": "residual"}},
            r"helper_init='residual' needs embedding.use_helper=true",
        ),
    ],
)
def test_configurations_that_cannot_work(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remapped_config(tmp_path, tmp_path, format="remapped", **changes)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_split_is_looked_at_before_the_first_batch(world: World, tmp_path: Path, split: str) -> None:
    good = world.remapped("store")
    other = CCEEmbeddingBagCollection(tables=remapped_config(world.raw, world.url).table_configs())
    for name, table in world.registry.open(1).tables.items():
        other.attach_pointer_map(name, table.pointer_map)
    stale = write_remapped(tmp_path / "stale" / "1.parquet", world.log, other, columns=COLUMNS, version=1)
    cases: list[tuple[Path, type[Exception], str]] = [
        (
            stale,
            MapMismatchError,
            r"1\.parquet: feature 'item' was remapped with version 1 .* is version 2, gen",
        ),
        (world.raw, DataFileError, r"raw\.parquet: holds no remapped data"),
        (world.remapped("drop"), ConfigError, r"part-0\.parquet: its helper policy 'drop' needs use_helper=false"),
        (tmp_path / "gone", DataFileError, r"gone: no such file or folder"),
    ]
    for number, (path, error, message) in enumerate(cases):
        run_dir = tmp_path / str(number)
        with pytest.raises(error, match=message):
            train(remapped_config(good, world.url, format="remapped", data={split: {"path": str(path)}}), run_dir)
        assert not (run_dir / "metrics.jsonl").exists() or not runs.metrics(run_dir)


def test_a_version_that_cannot_be_the_start(world: World, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"there is no version 7; there are 1, 2"):
        train(remapped_config(world.raw, world.url, registry={"start": 7}), tmp_path / "7")
    with pytest.raises(RegistryError, match=r"there is no such folder"):
        train(remapped_config(world.raw, tmp_path / "empty"), tmp_path / "empty-run")
    with pytest.raises(MapMismatchError, match=r"maps are of tables \['t_item', 't_user'\], the model has \['t_item'"):
        train(
            remapped_config(world.raw, world.url, tables={"t_item": TABLES["t_item"], "user": 900}), tmp_path / "other"
        )
