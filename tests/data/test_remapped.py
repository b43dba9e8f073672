"""Remapped files read back are, bit by bit, what the model's own remap makes of the raw log."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.remapped_files import write_remapped
from tests.support.remapped_inputs import COLUMNS, NUM_IDS, NUM_ROWS, collection, kjt, raw_log
from torchrec_cce import (
    CCEEmbeddingBagCollection,
    Vocabulary,
)
from torchrec_cce.data.remapped import RemappedLog, read_remapped, remapped_files
from torchrec_cce.data.remapped_format import HELPER_POLICIES, LAYOUTS, METADATA_KEY
from torchrec_cce.data.rows import Rows, concat, to_batch
from torchrec_cce.errors import CCEError, ConfigError, DataFileError, InvalidIDError, MapMismatchError
from torchrec_cce.maps.pointer_format import MinPointerBits


@functools.cache
def prepared(**arguments: Any) -> CCEEmbeddingBagCollection:
    """A collection that no test changes."""
    return collection(**arguments)


def read(paths: Path | list[Path], model: CCEEmbeddingBagCollection, **options: Any) -> Rows:
    options = {"label": "label", "columns": COLUMNS, "dense": ["price"], **options}
    return concat(list(read_remapped(paths, remap=model.remap, **options)))


def assert_is_the_remap(found: Rows, model: CCEEmbeddingBagCollection, raw: pa.Table) -> None:
    expected = model.remap(kjt(model, raw))
    batch = to_batch(found, model.remap.row_keys)
    features = batch.sparse_features
    assert features.keys() == expected.keys()
    assert torch.equal(features.values(), expected.values())
    assert torch.equal(features.lengths(), expected.lengths())
    assert model.remap(features) is features, "it passes through"
    assert batch.labels.tolist() == raw.column("label").to_pylist()
    np.testing.assert_array_equal(batch.dense_features[:, 0].numpy(), raw.column("price").to_numpy().astype(np.float32))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.sampled_from(LAYOUTS),
    helper=st.sampled_from(HELPER_POLICIES),
    suffix=st.sampled_from([".parquet", ".arrow"]),
    num_columns=st.sampled_from([1, 2, 4, 8, 16, 32]),
    num_rows=st.sampled_from([1, 10, 16, 256, 257, 70_000]),
    min_pointer_bits=st.sampled_from([4, 8]),
    clusterings=st.integers(0, 1),
    chunk_rows=st.sampled_from([1, 7, 1000]),
    skip_rows=st.integers(0, 2 * NUM_ROWS),
    max_rows=st.integers(1, 2 * NUM_ROWS),
    seed=st.integers(0, 100),
)
def test_every_layout_equals_the_remap(
    tmp_path: Path,
    layout: Any,
    helper: Any,
    suffix: str,
    num_columns: int,
    num_rows: int,
    min_pointer_bits: MinPointerBits,
    clusterings: int,
    chunk_rows: int,
    skip_rows: int,
    max_rows: int,
    seed: int,
) -> None:
    model = prepared(
        use_helper=helper != "drop",
        num_columns=num_columns,
        num_rows=num_rows,
        min_pointer_bits=min_pointer_bits,
        clusterings=clusterings,
    )
    raw = raw_log(seed)
    files = [
        write_remapped(
            tmp_path / f"{i}{suffix}", raw, model, layout=layout, helper=helper, columns=COLUMNS, row_group_size=5
        )
        for i in range(2)
    ]
    whole = pa.concat_tables([raw, raw]).slice(skip_rows, max_rows)
    options = {"chunk_rows": chunk_rows, "skip_rows": skip_rows, "max_rows": max_rows}
    if not len(whole):
        log = read_remapped(files, remap=model.remap, label="label", columns=COLUMNS, **options)
        assert list(log) == []
        return
    assert_is_the_remap(read(files, model, **options), model, whole)


@pytest.mark.parametrize("unseen", ["hash", "first_row"])
@pytest.mark.parametrize("helper", ["drop", "store", "keep-raw"])
@pytest.mark.parametrize("clusterings", [0, 1])
def test_raw_ids_of_64_bits(tmp_path: Path, unseen: Any, helper: Any, clusterings: int) -> None:
    """With a vocabulary that does not know them all, and IDs that are unsigned."""
    ids = np.random.default_rng(3).integers(-(2**63), 2**63 - 1, NUM_IDS)
    model = collection(use_helper=helper != "drop", clusterings=0)
    for table in model.cce_tables():
        known = Vocabulary.build(ids[: NUM_IDS // 2])
        model.attach_pointer_map(table, model.pointer_map(table).with_vocabulary(known, unseen=unseen))
    for seed in range(clusterings):
        model.recluster(seed=seed)
    raw = raw_log(ids=ids)
    unsigned = raw.column("user_id").combine_chunks().view(pa.uint64())
    raw = raw.set_column(raw.schema.get_field_index("user_id"), "user_id", unsigned)
    path = write_remapped(tmp_path / "log.parquet", raw, model, helper=helper, columns=COLUMNS)
    if (helper, unseen) == ("keep-raw", "first_row"):
        with pytest.raises(ConfigError, match=r"'keep-raw' cannot tell .* unseen='first_row' needs; .*'store'"):
            read(path, model)
        return
    assert_is_the_remap(read(path, model), model, raw)


def test_universes_bound_the_raw_ids_of_tables_without_a_map(tmp_path: Path) -> None:
    model, raw = collection(), raw_log()
    days = raw.column("day").to_numpy() + 70
    far = raw.set_column(raw.schema.get_field_index("day"), "day", pa.array(days))
    path = write_remapped(tmp_path / "log.parquet", far, model, columns=COLUMNS)
    assert_is_the_remap(read(path, model, universes={"day": 7, "user": 3, "friends": 3, "tag": 100}), model, raw)
    with pytest.raises(InvalidIDError, match=rf"'day': raw ID {days[0]} \(position 0"):
        read(path, model)


def test_dense_columns_are_transformed(tmp_path: Path) -> None:
    model, raw = collection(), raw_log()
    path = write_remapped(tmp_path / "log.parquet", raw, model, columns=COLUMNS)
    np.testing.assert_array_equal(read(path, model, dense_transform="log1p").dense, np.log1p(read(path, model).dense))


def test_a_tree_of_files(tmp_path: Path) -> None:
    model = collection()
    names = ["day=1/b.parquet", "day=1/c.arrow", "day=2/a.parquet"]
    logs = [raw_log(seed) for seed in range(3)]
    files = [
        write_remapped(tmp_path / name, raw, model, columns=COLUMNS) for name, raw in zip(names, logs, strict=True)
    ]
    for name in ("_remap/job.json", "_remap/_1.parquet", ".x.parquet", "day=1/_tmp.parquet", "day=1/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no log")
    assert remapped_files(tmp_path) == files
    assert_is_the_remap(read(tmp_path, model), model, pa.concat_tables(logs))
    with pytest.raises(DataFileError, match=r"no \*\.parquet and no \*\.arrow in this folder"):
        remapped_files(tmp_path / "_remap")
    with pytest.raises(DataFileError, match="gone: no such file or folder"):
        remapped_files(tmp_path / "gone")


def refused(
    tmp_path: Path, model: CCEEmbeddingBagCollection, error: type[CCEError], message: str, **read_as: Any
) -> None:
    """Both by a look at the schemas and by reading."""
    options: dict[str, Any] = {"label": "label", "columns": COLUMNS, "dense": ["price"], **read_as}
    with pytest.raises(error, match=message):
        RemappedLog(model.remap, **options).check(tmp_path)
    with pytest.raises(error, match=message):
        list(read_remapped(tmp_path, remap=model.remap, **options))


def test_pointers_of_another_version(tmp_path: Path) -> None:
    model, raw = collection(), raw_log()
    write_remapped(tmp_path / "1.parquet", raw, model, columns=COLUMNS, version=3)
    for table in model.cce_tables():
        model.attach_pointer_map(table, model.pointer_map(table).published_as(4))
    assert_is_the_remap(read(tmp_path, model), model, raw)
    old = model.pointer_map("t_user").digest[:12]
    model.recluster(seed=9)
    for table in model.cce_tables():
        model.attach_pointer_map(table, model.pointer_map(table).published_as(5))
    now = model.pointer_map("t_user").digest[:12]
    refused(
        tmp_path,
        model,
        MapMismatchError,
        rf"1\.parquet: feature 'user' was remapped with version 3 \(manifest 5{{12}}, map digest {old}\); the map of "
        rf"table 't_user' is version 5, generation 2 \(digest {now}\)",
    )


@pytest.mark.parametrize(("helper", "use_helper"), [("drop", True), ("store", False), ("keep-raw", False)])
def test_a_policy_that_does_not_fit_the_tables(tmp_path: Path, helper: Any, use_helper: bool) -> None:
    model = collection(use_helper=use_helper)
    write_remapped(tmp_path / "1.parquet", raw_log(), model, helper=helper, columns=COLUMNS)
    wanted = "true" if helper != "drop" else "false"
    refused(tmp_path, model, ConfigError, rf"policy '{helper}' needs use_helper={wanted}, table")


def test_files_that_keep_different_things(tmp_path: Path) -> None:
    model = collection()
    for name, helper in (("1", "store"), ("2", "keep-raw")):
        write_remapped(tmp_path / f"{name}.parquet", raw_log(), model, helper=helper, columns=COLUMNS)  # type: ignore[arg-type]
    refused(tmp_path, model, DataFileError, r"2\.parquet: its helper policy is 'keep-raw', that of .*1\.parquet is 'st")


def test_missing_features_and_columns(tmp_path: Path) -> None:
    model, raw = collection(), raw_log()
    path = write_remapped(tmp_path / "1.parquet", raw, model, columns=COLUMNS)
    refused(tmp_path, model, DataFileError, r"there is no column 'clicked'", label="clicked")
    refused(tmp_path, model, DataFileError, r"there is no column 'tag'; the columns are", columns={"user": "user_id"})
    refused(tmp_path, model, DataFileError, r"there is no column 'weight'", dense=["weight"])
    table = pq.read_table(path)
    document = json.loads(table.schema.metadata[METADATA_KEY])
    del document["features"]["user"]
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(document)}), path)
    refused(tmp_path, model, DataFileError, r"no pointers of feature 'user' of table 't_user'; there are those of fri")
    pq.write_table(table.replace_schema_metadata(None), path)
    refused(tmp_path, model, DataFileError, r"1\.parquet: holds no remapped data")
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path, model, DataFileError, r"1\.parquet: cannot be read as Parquet")
    path.write_bytes(b"ARROW1\0\0")
    refused(tmp_path, model, DataFileError, r"1\.parquet: cannot be read as Arrow IPC")


@pytest.mark.parametrize(
    ("layout", "min_pointer_bits", "pointers_of_row", "code"),
    [
        ("words", 8, 0x0101FF01, 255),
        ("lists", 8, [1, 255, 1, 1], 255),
        ("words", 4, 0x11C1, 12),
        ("lists", 4, [1, 255, 1, 1], 255),
    ],
)
def test_damaged_pointers_are_refused_before_they_are_looked_up(
    tmp_path: Path, layout: Any, min_pointer_bits: MinPointerBits, pointers_of_row: Any, code: int
) -> None:
    model, raw = collection(num_rows=10, min_pointer_bits=min_pointer_bits), raw_log()
    path = write_remapped(tmp_path / "1.parquet", raw, model, layout=layout, columns=COLUMNS)
    table = pq.read_table(path)
    pointers = table.column("user.pointers").to_pylist()
    row = next(i for i, each in enumerate(pointers) if i > 5 and each is not None)
    pointers[row] = pointers_of_row
    kind = table.schema.field("user.pointers").type
    at = table.schema.get_field_index("user.pointers")
    pq.write_table(table.set_column(at, "user.pointers", pa.array(pointers, kind)), path)
    for chunk_rows in (4, 100):
        where = rf"column 'user\.pointers', row {row} \(the first is 0\)"
        with pytest.raises(DataFileError, match=f"{where} points at row {code} of column 1, which has 10"):
            read(path, model, chunk_rows=chunk_rows)


def test_words_of_another_width_than_the_maps(tmp_path: Path) -> None:
    """Nobody writes them; they would be misread."""
    model = collection(min_pointer_bits=4)
    path = write_remapped(tmp_path / "1.parquet", raw_log(), model, columns=COLUMNS)
    table = pq.read_table(path)
    document = table.schema.metadata[METADATA_KEY].replace(b"uint4", b"uint8")
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: document}), path)
    refused(
        tmp_path, model, DataFileError, r"'user' has pointers of 8 bits, those of the map of table 't_user' have 4 in"
    )


def test_columns_of_a_feature_with_different_bags(tmp_path: Path) -> None:
    model, raw = collection(), raw_log()
    path = write_remapped(tmp_path / "1.parquet", raw, model, columns=COLUMNS)
    table = pq.read_table(path)
    other = write_remapped(tmp_path / "other" / "2.parquet", raw_log(7), model, columns=COLUMNS)
    at = table.schema.get_field_index("user.helpers")
    damaged = table.set_column(at, "user.helpers", pq.read_table(other).column("user.helpers"))
    pq.write_table(damaged, path)
    with pytest.raises(DataFileError, match=r"feature 'user' differ in the lengths of their bags, in rows 0 to 22"):
        read(path, model)
