"""Moving a sharded model to maps that are given: its own embeddings, averaged over the new clusters, on any ranks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from tests.support import runs
from tests.support.launch import on_ranks
from tests.support.sharded_models import TABLES, Table, assert_same_bits, split_by_rows, tables_of
from torchrec_cce import CCEEmbeddingBagCollection, PointerMap
from torchrec_cce.clustering.settings import HelperInit, ReclusterConfig
from torchrec_cce.errors import CCEError
from torchrec_cce.maps.pointer_map import Unseen
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.methods.cce import CCEScheme
from torchrec_cce.modules.recluster import TableReport, TableRows
from torchrec_cce.modules.snapshots import snapshot_of
from torchrec_cce.sharding.recluster import adopt_sharded, recluster_sharded
from torchrec_cce.sharding.tables import ShardedMaps, collections_of
from torchrec_cce.sharding.tables import tables_of as sharded_tables
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.input import num_dense, read_batches
from torchrec_cce.training.model import build_model
from torchrec_cce.training.parallel import Ranks, process_group, shard

Floats = npt.NDArray[np.floating]
SIZES = {"C1": 1000, "C2": 800}


class Moved(NamedTuple):
    """What a rank saw of a move."""

    before: dict[str, Table]
    after: dict[str, Table]
    reports: dict[str, TableReport]
    tables: dict[str, TableSnapshot]
    """What it moved to."""


Tables = dict[str, TableSnapshot]
Frequencies = dict[str, npt.NDArray[np.int64]]
Preparation = Callable[[Any, Any, Tables], Tables]
"""From model, optimizer and the tables that the test gives to those to move to."""


def as_they_are(_model: Any, _optimizer: Any, tables: Tables) -> Tables:
    return tables


def adopt_on_a_rank(
    config: RunConfig,
    old_maps: dict[str, PointerMap],
    old_rows: dict[str, TableRows],
    tables: Tables,
    frequencies: Frequencies,
    settings: ReclusterConfig,
    prepare: Preparation,
) -> Moved:
    """A move in the middle of training, of tables that were trained here or are given."""
    with process_group() as ranks:
        model, optimizer = trained(config, ranks)
        (collection,) = collections_of(model).values()
        for name, one in old_maps.items():
            collection.attach_pointer_map(name, one)
        for table in sharded_tables(model, optimizer):
            if table.config.name in old_rows:
                table.store.write(old_rows[table.config.name])
        tables = prepare(model, optimizer, tables)
        before = tables_of(model, optimizer)
        reports = adopt_sharded(model, optimizer, tables, frequencies=frequencies, settings=settings)
        return Moved(before, tables_of(model, optimizer), reports, tables)


def trained(config: RunConfig, ranks: Ranks) -> tuple[Any, Any]:
    model = build_model(config, num_dense=num_dense(config), device=ranks.device)
    plan = split_by_rows(model, config.optimizer, world_size=ranks.world_size)
    model, optimizer = shard(model, plan, config.optimizer, ranks)
    (remap,) = (collection.remap for collection in collections_of(model).values())
    for batch in read_batches(config, config.data.train, remap=remap, rank=ranks.rank, world_size=ranks.world_size):
        optimizer.zero_grad()
        model(batch.part)[: batch.rows].square().sum().backward()
        optimizer.step()
    return model, optimizer


def config_of(log: Path, **changes: Any) -> RunConfig:
    return runs.criteo_config(
        log, data={"train": {"path": str(log), "max_rows": 200}}, training={"batch_size": 50}, **changes
    )


def moved(
    folder: Path,
    config: RunConfig,
    *,
    old_maps: dict[str, PointerMap] | None = None,
    old_rows: dict[str, TableRows] | None = None,
    tables: Tables | None = None,
    frequencies: Frequencies | None = None,
    settings: ReclusterConfig | None = None,
    prepare: Preparation | None = None,
    world_size: int = 2,
) -> list[Moved]:
    arguments = (
        old_maps or {},
        old_rows or {},
        tables or {},
        frequencies or {},
        settings or ReclusterConfig(),
        prepare or as_they_are,
    )
    finished = on_ranks(folder, world_size, adopt_on_a_rank, config, *arguments)
    for rank in finished:
        assert rank.code == 0, rank.stderr
    return [rank.value for rank in finished]


def learned(one: PointerMap, *, seed: int, generation: int = 3) -> PointerMap:
    """A map of other pointers for the rows of `one`, none of them to the last three codewords."""
    rng = np.random.default_rng(seed)
    pointers = rng.integers(0, one.num_rows - 3, (one.num_ids, one.num_columns)).astype(np.uint8)
    return replace(one.clustered(pointers, one.next_helper_hash(seed)), generation=generation)


def keyed(one: PointerMap, keys: npt.NDArray[np.int64], unseen: Unseen = "hash") -> PointerMap:
    return one.with_vocabulary(Vocabulary.build(keys, num_threads=1), unseen=unseen)


def start_maps(config: RunConfig) -> dict[str, PointerMap]:
    """Those that the tables of a run begin with."""
    collection = CCEEmbeddingBagCollection(tables=config.table_configs())
    return {name: collection.pointer_map(name) for name in TABLES}


def snapshots(config: RunConfig, maps: dict[str, PointerMap]) -> Tables:
    """Versions of `maps` with words of their own, which are nothing like the model's."""
    tables = {table.name: table for table in config.table_configs()}
    found = {}
    for name, one in maps.items():
        table: Any = tables[name]
        shape = (2 * one.num_columns * one.num_rows, table.embedding_dim // one.num_columns)
        words = 100 + np.random.default_rng(0).random(shape, np.float32)
        found[name] = replace(snapshot_of(table, one, weights=words), entropies=(1.0, 2.0))
    return found


def embeddings(config: RunConfig, name: str, table: Table, ids: npt.NDArray[np.int64]) -> Floats:
    """[N, d] that the model gives raw IDs by itself: an unsharded collection looks them up, one a bag."""
    configs = [one for one in config.table_configs() if one.name == name]
    collection = CCEEmbeddingBagCollection(tables=configs)
    one = table.pointer_map
    # Where an ID that a map does not know has no embedding, it enters with hashed words.
    collection.attach_pointer_map(name, replace(one, unseen="hash") if one.unseen == "error" else one)
    collection.ebc.embedding_bags[name].weight.data.copy_(torch.from_numpy(table.weights))
    features = KeyedJaggedTensor(
        keys=[name], values=torch.from_numpy(ids), lengths=torch.ones(len(ids), dtype=torch.int32)
    )
    return collection(features).values().detach().numpy()  # type: ignore[no-any-return]


def assert_adopted(
    config: RunConfig, name: str, found: Moved, to: TableSnapshot, frequencies: Frequencies, helper_init: HelperInit
) -> None:
    """By definition, with numpy."""
    before, after, new = found.before[name], found.after[name], to.pointer_map
    assert after.pointer_map.digest == new.digest
    ids = new.raw_ids(np.arange(new.num_ids))
    c, k = new.num_columns, new.num_rows
    old = embeddings(config, name, before, ids).astype(np.float64).reshape(len(ids), c, -1)
    pointers, helpers = new.codes(np.arange(new.num_ids)).transpose(1, 2, 0)
    theirs = np.asarray(to.weights).reshape(c, 2, k, -1)
    words = after.weights.reshape(c, 2, k, -1)
    states = {state: value.reshape(c, 2, k, -1) for state, value in after.states.items()}
    old_states = {state: value.reshape(c, 2, k, -1) for state, value in before.states.items()}
    old_codes = before.pointer_map.codes_of_any(ids)
    scale = np.abs(old).max()
    squares = np.zeros(len(ids))
    for j in range(c):
        for row in range(k):
            members = pointers[:, j] == row
            expected = old[members, j].mean(axis=0) if members.any() else theirs[j, 0, row]
            np.testing.assert_allclose(words[j, 0, row], expected, rtol=1e-6, atol=1e-6 * scale)
            sharing = helpers[:, j] == row
            gaps = old[sharing, j] - words[j, 0, pointers[sharing, j]]
            residual = gaps.mean(axis=0) if helper_init == "residual" and sharing.any() else np.zeros(gaps.shape[1])
            np.testing.assert_allclose(words[j, 1, row], residual, rtol=1e-5, atol=1e-6 * scale)
            for state, value in states.items():
                two = old_states[state][j, [0, 1], old_codes[j][:, members].T]
                mean = two.astype(np.float64).mean(axis=(0, 1)) if members.any() else 0
                np.testing.assert_allclose(value[j, 0, row], mean, rtol=1e-5, atol=1e-30)
                assert not value[j, 1, row].any()
        squares += np.square(old[:, j] - words[j, 0, pointers[:, j]]).sum(axis=1)
    report = found.reports[name]
    assert report.objective == pytest.approx(np.average(squares, weights=frequencies.get(name)), rel=1e-5)
    assert report.share_changed == np.mean(old_codes[:, 0] != pointers.T)
    assert (report.generation, report.entropies) == (3, (1.0, 2.0))


DENSE = np.arange(1000)
FAR = np.concatenate([np.arange(100, 900), np.arange(-(2**63), -(2**63) + 50), 2**40 + np.arange(150)])


@pytest.mark.parametrize(
    (
        "world_size",
        "chunk_size",
        "optimizer",
        "num_columns",
        "helper_init",
        "weighed",
        "old_keys",
        "new_keys",
        "unseen",
    ),
    [
        (2, 97, "rowwise_adagrad", 4, "zero", False, None, None, "error"),
        (3, 400, "adagrad", 4, "residual", True, None, None, "error"),
        (2, 13, "sgd", 4, "zero", False, None, FAR, "error"),  # raw IDs beyond the old universe
        (2, 1000, "adamw", 4, "residual", False, DENSE[:700], FAR[:600], "hash"),
        (3, 97, "rowwise_adagrad", 8, "zero", True, FAR[400:], FAR[:700], "first_row"),
    ],
)
def test_any_ranks_and_chunks_give_the_bits_that_the_definition_gives(
    log: Path,
    tmp_path: Path,
    world_size: int,
    chunk_size: int,
    optimizer: str,
    num_columns: int,
    helper_init: HelperInit,
    weighed: bool,
    old_keys: npt.NDArray[np.int64] | None,
    new_keys: npt.NDArray[np.int64] | None,
    unseen: Unseen,
) -> None:
    embedding = {"num_columns": num_columns, "max_parameters": runs.MAX_PARAMETERS}
    config = config_of(log, optimizer={"embedding": optimizer}, embedding=embedding)
    # An unclustered map for the first table, a clustered one for the second.
    start = start_maps(config)
    if old_keys is not None:
        start = {name: keyed(one, old_keys[: SIZES[name]], unseen) for name, one in start.items()}
    old_maps = {"C1": start["C1"], "C2": learned(start["C2"], seed=1)}
    to = {name: one if new_keys is None else keyed(one, new_keys[: SIZES[name]]) for name, one in start.items()}
    tables = snapshots(config, {name: learned(one, seed=2) for name, one in to.items()})
    rng = np.random.default_rng(0)
    frequencies = {n: rng.integers(0, 9, one.num_ids) for n, one in to.items()} if weighed else {}
    ranks: list[Moved] = []
    for size, chunk in ((1, 65536), (world_size, chunk_size)):
        before = ranks[0].before if ranks else {}  # training rounds otherwise on every number of ranks
        ranks += moved(
            tmp_path / str(size),
            config,
            old_maps=old_maps,
            old_rows={name: TableRows(weights=table.weights, states=table.states) for name, table in before.items()},
            tables=tables,
            frequencies=frequencies,
            settings=ReclusterConfig(helper_init=helper_init, chunk_size=chunk),
            world_size=size,
        )
    for name in TABLES:
        assert all(state.any() for state in ranks[0].before[name].states.values()), "a state of zeros proves nothing"
        assert_adopted(config, name, ranks[0], tables[name], frequencies, helper_init)
        for found in ranks[1:]:
            assert_same_bits(found.before[name], ranks[0].before[name])
            assert_same_bits(found.after[name], ranks[0].after[name])
            assert found.reports[name].objective == ranks[0].reports[name].objective


def to_its_own(model: Any, optimizer: Any, _: Tables) -> Tables:
    """The helper is empty: what it holds would become part of the means."""
    recluster_sharded(model, optimizer, seed=1)
    return ShardedMaps(model).snapshot()


def test_the_map_one_has_changes_nothing_but_roundings(log: Path, tmp_path: Path) -> None:
    for found in moved(tmp_path, config_of(log), prepare=to_its_own):
        for name in TABLES:
            before, after, report = found.before[name], found.after[name], found.reports[name]
            np.testing.assert_allclose(after.weights, before.weights, rtol=2e-7, atol=0)
            assert after.pointer_map.digest == before.pointer_map.digest
            assert report.share_changed == 0
            assert report.objective <= 1e-12 * np.square(before.weights).max()


def to_a_clustering_of_these_weights(model: Any, optimizer: Any, _: Tables) -> Tables:
    """Clustered until nothing moves any more, published, and then taken back."""
    before = ShardedMaps(model).snapshot()
    settings = ReclusterConfig(points_per_centroid=1000, num_iterations=200)
    reports = recluster_sharded(model, optimizer, seed=1, settings=settings)
    tables = ShardedMaps(model).snapshot(reports)
    ShardedMaps(model).restore(before)
    return tables


def test_a_clustering_of_these_very_weights_comes_back_with_its_own_codebooks(log: Path, tmp_path: Path) -> None:
    for found in moved(tmp_path, config_of(log), prepare=to_a_clustering_of_these_weights):
        for name in TABLES:
            after, theirs = found.after[name], found.tables[name]
            assert theirs.weights is not None
            np.testing.assert_allclose(after.weights, theirs.weights, rtol=0, atol=1e-5 * np.abs(theirs.weights).max())
            assert found.reports[name].objective == pytest.approx(theirs.objective, rel=1e-6)
            assert found.reports[name].share_changed > 0.5


def one_is_missing(_model: Any, _optimizer: Any, tables: Tables) -> Tables:
    return {"C1": tables["C1"]}


def the_last_rank_has_another_map(_model: Any, _optimizer: Any, tables: Tables) -> Tables:
    if dist.get_rank() < dist.get_world_size() - 1:
        return tables
    return {**tables, "C2": replace(tables["C2"], pointer_map=learned(tables["C2"].pointer_map, seed=9))}


def the_last_rank_has_another_size(_model: Any, _optimizer: Any, tables: Tables) -> Tables:
    return tables if dist.get_rank() < dist.get_world_size() - 1 else {**tables, "C2": tables["C1"]}


def the_model_has_a_nan(model: Any, optimizer: Any, tables: Tables) -> Tables:
    last = sharded_tables(model, optimizer)[-1]
    rows = last.store.read()
    rows.weights[5, 0] = np.nan
    last.store.write(rows)
    return tables


def a_word_is_infinite(_model: Any, _optimizer: Any, tables: Tables) -> Tables:
    words = np.array(tables["C2"].weights)
    words[:] = np.inf
    return {**tables, "C2": replace(tables["C2"], weights=words)}


REFUSED: list[tuple[Preparation, Frequencies, str]] = [
    (one_is_missing, {}, "MapMismatchError: the maps are of tables ['C1'], the model has ['C1', 'C2']"),
    (the_last_rank_has_another_map, {}, "MapMismatchError: table 'C2': rank 0 was given the map "),
    (the_last_rank_has_another_size, {}, "MapMismatchError: table 'C2' has 800 IDs, "),
    (a_word_is_infinite, {}, "ClusteringError: table 'C2': a sum over IDs may reach "),
    (as_they_are, {"C3": np.ones(50, np.int64)}, "ConfigError: frequencies of ['C3'], which are not CCE tables"),
    (as_they_are, {"C2": np.ones(50, np.int64)}, "ConfigError: table 'C2': frequencies have shape [50]"),
    (the_model_has_a_nan, {}, "ClusteringError: table 'C2': 1 of 3200 values of weights are NaN or infinite"),
]
"""What is wrong, and the error; the last one spoils the model."""


def refused_on_a_rank(config: RunConfig, tables: Tables) -> list[str]:
    """The error of each case."""
    with process_group() as ranks:
        model, optimizer = trained(config, ranks)
        errors = []
        for prepare, frequencies, _ in REFUSED:
            to = prepare(model, optimizer, tables)
            before = tables_of(model, optimizer)
            try:
                adopt_sharded(model, optimizer, to, frequencies=frequencies)
            except CCEError as error:
                errors.append(f"{type(error).__name__}: {error}")
            after = tables_of(model, optimizer)
            for name in TABLES:
                assert_same_bits(after[name], before[name])
        return errors


def test_an_error_reaches_both_ranks_and_changes_nothing(log: Path, tmp_path: Path) -> None:
    config = config_of(log)
    tables = snapshots(config, {name: learned(one, seed=2) for name, one in start_maps(config).items()})
    for rank in on_ranks(tmp_path, 2, refused_on_a_rank, config, tables):
        assert rank.code == 0, rank.stderr
        for error, (_, _, expected) in zip(rank.value, REFUSED, strict=True):
            assert error.startswith(expected)


@given(
    keys=st.lists(st.integers(-20, 20), unique=True, min_size=1),
    ids=st.lists(st.integers(-30, 30)),
    unseen=st.sampled_from(["hash", "first_row"]),
    generation=st.integers(0, 1),
)
def test_codes_of_any_raw_id_are_those_that_the_remap_looks_up(
    keys: list[int], ids: list[int], unseen: Unseen, generation: int
) -> None:
    hashed = PointerMap.hashed(num_ids=1, num_columns=3, num_rows=11, seed=3)
    one = keyed(hashed, np.array(keys, np.int64), unseen)
    one = learned(one, seed=0) if generation else one
    rows = np.empty((3, len(ids), 2), np.int64)
    CCEScheme(pointer_map=one).rows_into(np.array(ids, np.int64), rows)
    first = 11 * np.arange(6).reshape(3, 2)[:, None]
    np.testing.assert_array_equal(one.codes_of_any(np.array(ids, np.int64)), (rows - first).transpose(0, 2, 1))
