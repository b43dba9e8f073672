"""CCE tables read from checkpoints of any kind, and replaced in a copy of which the rest stays as it is."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save

from tests.support import nights, runs
from tests.support.nights import is_of_table, newest, tensors
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, CCEEmbeddingCollection, CCEEmbeddingConfig
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.errors import ConfigError, DataFileError, JobError, MapFileError, MapMismatchError, RegistryError
from torchrec_cce.jobs.checkpoint.copy import NewTable, copy_checkpoint, replace_tables, stamp_version
from torchrec_cce.jobs.checkpoint.reader import CCECheckpoint
from torchrec_cce.jobs.recluster.cluster import Clustered
from torchrec_cce.maps.registry import Registry
from torchrec_cce.modules.recluster import TableRows, recluster_rows
from torchrec_cce.sharding.checkpoint_index import METADATA
from torchrec_cce.sharding.tables import ShardedStore
from torchrec_cce.training import checkpoint, loop
from torchrec_cce.training.config_file import read_run_config
from torchrec_cce.training.parallel import Ranks, process_group

SETTINGS = ReclusterConfig(num_iterations=3)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry", cache=tmp_path / "cache")


def new_tables(one: CCECheckpoint, registry: Registry) -> list[NewTable]:
    """Of a clustering."""
    new = []
    for table in one.tables(registry):
        pointer_map, rows, report = recluster_rows(
            table.config,
            table.snapshot.pointer_map,
            one.read_rows(table),
            seed=1,
            frequencies=None,
            settings=SETTINGS,
        )
        sizes = np.zeros((pointer_map.num_columns, pointer_map.num_rows), np.int64)
        new.append(
            NewTable(
                table,
                Clustered(pointer_map=pointer_map, rows=rows, report=report, cluster_sizes=sizes, times={}),
            )
        )
    return new


@pytest.mark.parametrize(
    ("optimizer", "embedding", "bits"),
    [
        ("rowwise_adagrad", {}, 8),
        ("adamw", {}, 8),
        ("rowwise_adagrad", {"max_parameters": 512, "min_pointer_bits": 4, "full_up_to": 50}, 4),
    ],
)
def test_read_and_replaced_as_a_model_has_them(
    tmp_path: Path, registry: Registry, optimizer: str, embedding: dict[str, Any], bits: int
) -> None:
    """States of one value and of one vector a row; a model is loaded from the checkpoint before and after."""
    embedding = {"max_parameters": runs.MAX_PARAMETERS, **embedding}
    run = nights.train_a_run(tmp_path / "trained", optimizer={"embedding": optimizer}, embedding=embedding)
    source = CCECheckpoint.at(run)
    tables = source.tables(registry)
    alone = CCECheckpoint.at(newest(run)).tables(registry)
    assert {table.config.pointer_bits for table in [*tables, *alone]} == {bits}
    assert [table.name for table in tables] == ["C1", "C2"]
    with process_group() as ranks:
        for table, (rows, digest) in zip(tables, loaded(run, ranks), strict=True):
            assert table.snapshot.pointer_map.digest == digest
            assert_same_rows(source.read_rows(table), rows)
        copy = copy_checkpoint(source, run, tmp_path / "copy")
        new = new_tables(copy, registry)
        replace_tables(copy, new, version=7)
        for (_, done), (rows, digest) in zip(new, loaded(tmp_path / "copy", ranks), strict=True):
            assert digest == done.pointer_map.digest
            assert done.pointer_map.pointer_format.bits == bits
            assert_same_rows(done.rows, rows)


def loaded(run_dir: Path, ranks: Ranks) -> list[tuple[TableRows, str]]:
    """Of each CCE table, its rows and the digest of its map, as a model has them that was loaded from a checkpoint."""
    run = loop.Run(read_run_config(run_dir), run_dir, ranks)
    run.load()
    (collection,) = run.collections
    weights, states = run.model.state_dict(), run.optimizer.state_dict()["state"]
    found = []
    for table in collection.cce_tables():
        (key,) = [key for key in weights if key.endswith(collection.weight_name(table))]
        rows = ShardedStore(weights[key], states.get(key, {})).read()
        found.append((rows, collection.pointer_map(table).digest))
    return found


def assert_same_rows(one: TableRows, other: TableRows) -> None:
    np.testing.assert_array_equal(one.weights, other.weights)
    assert one.states.keys() == other.states.keys()
    assert one.states
    for name, state in one.states.items():
        np.testing.assert_array_equal(state, other.states[name])


def test_everything_else_stays_as_it_is(trained: Path, tmp_path: Path, registry: Registry) -> None:
    copy = copy_checkpoint(CCECheckpoint.at(trained), trained, tmp_path / "copy")
    before, position = tensors(newest(trained)), checkpoint.read_position(newest(trained))
    new = new_tables(copy, registry)
    after = replace_tables(copy, new, version=7)
    assert after.stamps == CCECheckpoint.at(tmp_path / "copy").stamps
    (stamps,) = after.stamps.values()
    assert [stamp.version for stamp in stamps] == [7, 7]
    changed = {key for key, value in tensors(after.folder).items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if is_of_table(key)}
    for path in newest(trained).glob("*.distcp"):
        assert (after.folder / path.name).read_bytes() == path.read_bytes()
    for name in ("config.json", "metrics.jsonl"):
        assert (tmp_path / "copy" / name).read_bytes() == (trained / name).read_bytes()
    counted, expected = nights.frequencies(after.folder), nights.frequencies(newest(trained))
    assert counted.keys() == {"C1", "C2"}
    for name, each in counted.items():
        assert each.any()
        np.testing.assert_array_equal(each, expected[name])
    position.entropies = {table.name: done.report.entropies for table, done in new}
    assert checkpoint.read_position(after.folder) == position

    # Once more, as on the next night; and of another version of the registry.
    again = new_tables(after, registry)
    once_more = replace_tables(after, again, version=8)
    for table, (_, done) in zip(once_more.tables(registry), again, strict=True):
        assert_same_rows(once_more.read_rows(table), done.rows)
    stamp_version(once_more, again, version=9)
    assert {stamp.version for stamps in CCECheckpoint(folder=after.folder).stamps.values() for stamp in stamps} == {9}
    assert_same_but(tensors(once_more.folder), before)


def assert_same_but(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for key in one.keys() - {key for key in one if is_of_table(key)}:
        assert torch.equal(one[key], other[key])


class Recommender(nn.Module):
    """Pooled and unpooled tables, in a script of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.users = CCEEmbeddingBagCollection(
            tables=[
                CCEEmbeddingBagConfig(name="t_user", num_embeddings=500, embedding_dim=16, num_rows=40),
                CCEEmbeddingBagConfig(name="t_page", num_embeddings=300, embedding_dim=16, num_rows=30, num_columns=2),
            ]
        )
        self.items = CCEEmbeddingCollection(
            tables=[CCEEmbeddingConfig(name="t_item", num_embeddings=400, embedding_dim=8, num_rows=20, num_columns=2)]
        )
        self.head = nn.Linear(4, 1)

    @property
    def collections(self) -> list[Any]:
        return [self.users, self.items]


def write_script_checkpoint(folder: Path, model: Recommender) -> None:
    """Weights, states of which some are one value a row, and progress."""
    states = {}
    for collection in model.collections:
        for name, weight in collection.named_parameters():
            path = "users" if collection is model.users else "items"
            states[f"{path}.{name}"] = {
                "sum": torch.rand(len(weight)),
                "exp_avg": torch.rand_like(weight),
                "step": torch.ones(()),
            }
    states["head.weight"] = {"exp_avg": torch.rand(1, 4)}
    state = {"model": model.state_dict(), "optimizer": {"state": states}, "progress": torch.tensor([3, 1])}
    save(state, checkpoint_id=folder, no_dist=True)


def test_a_script_of_ones_own(tmp_path: Path, registry: Registry) -> None:
    """Without maps beside the weights: they are those of the version that the weights name."""
    torch.manual_seed(0)
    model = Recommender()
    snapshots = {name: one for each in model.collections for name, one in each.snapshot().items()}
    counts = {name: np.ones(one.pointer_map.num_ids, np.int64) for name, one in snapshots.items()}
    published = registry.publish({name: replace(one, frequencies=counts[name]) for name, one in snapshots.items()})
    for collection in model.collections:
        for name in collection.cce_tables():
            collection.attach_pointer_map(name, registry.open().tables[name].pointer_map)
    registry.publish({name: snapshots[name] for name in reversed(snapshots)})  # the same maps in another order
    write_script_checkpoint(tmp_path / "checkpoint", model)

    source = CCECheckpoint.at(tmp_path / "checkpoint")
    tables = {table.name: table for table in source.tables(registry)}
    assert list(tables) == ["t_user", "t_page", "t_item"]
    assert {table.snapshot.pointer_map.version for table in tables.values()} == {published.version}
    assert {table.snapshot.frequencies for table in tables.values()} == {None}, "the version's are not these weights'"
    assert set(tables["t_item"].states) == {"sum", "exp_avg"}
    np.testing.assert_array_equal(source.read_rows(tables["t_item"]).weights, model.items.snapshot()["t_item"].weights)

    copy = copy_checkpoint(source, tmp_path / "checkpoint", tmp_path / "copy")
    new = new_tables(copy, registry)
    replace_tables(copy, new, version=3)
    registry.publish(
        {
            table.name: replace(table.snapshot, pointer_map=done.pointer_map, weights=done.rows.weights)
            for table, done in new
        }
    )
    assert not (copy.folder / "maps").exists()
    fresh = Recommender()
    for collection in fresh.collections:
        collection.restore({name: registry.open(3).tables[name] for name in collection.cce_tables()})
    loaded = {
        key.removeprefix("model."): value for key, value in tensors(copy.folder).items() if key.startswith("model.")
    }
    fresh.load_state_dict(loaded)
    for table, done in new:
        collection = fresh.items if table.name == "t_item" else fresh.users
        np.testing.assert_array_equal(collection.snapshot()[table.name].weights, done.rows.weights)
    with pytest.raises(MapMismatchError, match="trained with the map version 3, generation 1"):
        model.load_state_dict(loaded)


def test_maps_that_the_weights_were_not_trained_with(trained: Path, tmp_path: Path, registry: Registry) -> None:
    copy = copy_checkpoint(CCECheckpoint.at(trained), trained, tmp_path / "copy")
    old = shutil.copytree(copy.folder / "maps", tmp_path / "maps")
    replace_tables(copy, new_tables(copy, registry), version=7)
    shutil.rmtree(copy.folder / "maps")
    shutil.copytree(old, copy.folder / "maps")
    with pytest.raises(
        MapMismatchError, match=r"version 7, generation 2 .* there is 'C1': not published, generation 1"
    ):
        CCECheckpoint.at(tmp_path / "copy").tables(registry)
    shutil.rmtree(copy.folder / "maps")
    with pytest.raises(RegistryError, match="there is no such folder"):
        CCECheckpoint.at(tmp_path / "copy").tables(registry)


def test_maps_of_other_sizes(tmp_path: Path, registry: Registry) -> None:
    model = Recommender()
    snapshots = {name: one for each in model.collections for name, one in each.snapshot().items()}
    one = snapshots["t_user"]
    registry.publish(snapshots | {"t_user": replace(one, embedding_dim=32, weights=None)})
    write_script_checkpoint(tmp_path / "checkpoint", model)
    with pytest.raises(
        MapMismatchError, match=r"'t_user' has weights \[320, 4\]; its map, .* is of codewords \[320, 8\]"
    ):
        CCECheckpoint.at(tmp_path / "checkpoint").tables(registry)


def test_what_is_no_checkpoint(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"neither the folder of a run \(config.json\) nor"):
        CCECheckpoint.at(tmp_path)
    save({"model": {"weight": torch.ones(2)}}, checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(ConfigError, match="no CCE table in this checkpoint"):
        CCECheckpoint.at(tmp_path / "other").tables(registry)
    for content in (b"", b"not a pickle", pickle.dumps({"a": 1})):
        (tmp_path / "other" / METADATA).write_bytes(content)
        with pytest.raises(DataFileError, match=r"\.metadata: (damaged|holds a dict)"):
            CCECheckpoint.at(tmp_path / "other").tables(registry)


def test_damaged_files(trained: Path, tmp_path: Path, registry: Registry) -> None:
    copy = copy_checkpoint(CCECheckpoint.at(trained), trained, tmp_path / "copy")
    tables = copy.tables(registry)
    (file,) = copy.folder.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataFileError, match="a file is missing or damaged"):
        [copy.read_rows(table) for table in tables]
    file.unlink()
    with pytest.raises((DataFileError, FileNotFoundError)):
        [copy.read_rows(table) for table in tables]
    file.write_bytes(content)
    pointers = next(copy.folder.rglob("0000.pointers.arrow"))
    pointers.write_bytes(pointers.read_bytes()[:-1] + b"\x01")
    with pytest.raises(MapFileError, match="the file is damaged"):
        CCECheckpoint.at(tmp_path / "copy").tables(registry)


def test_a_checkpoint_that_training_replaces(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    found = CCECheckpoint.at(run)
    found.folder.rename(found.folder.with_name("step-0000000099"))
    with pytest.raises(JobError, match="a newer checkpoint took its place while it was copied"):
        copy_checkpoint(found, run, tmp_path / "copy")
