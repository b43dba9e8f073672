"""Parquet files, rewritten page by page, against the core on decoded rows: whatever wrote them."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.remap_cases import columns, known_ids, make_map, make_remapper, maps
from torchrec_cce.data.remapped_format import HELPER_POLICIES, LAYOUTS, HelperPolicy, Layout
from torchrec_cce.errors import InvalidIDError
from torchrec_cce.jobs.remap.parquet import file as module
from torchrec_cce.jobs.remap.parquet.file import remap_parquet
from torchrec_cce.jobs.remap.parquet.metadata import FileMetaData
from torchrec_cce.jobs.remap.parquet.thrift import read_struct, write_struct
from torchrec_cce.jobs.remap.remapper import Remapper, UnseenCounts
from torchrec_cce.maps.pointer_map import Unseen

ROWS = 5000


def write(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def remapped(raw: bytes, remapper: Remapper, *, compression: str | None = "zstd", num_threads: int = 1) -> bytes:
    out = io.BytesIO()
    file = pa.BufferReader(raw)
    counts = remap_parquet(file, "f", remapper, out.write, compression=compression, num_threads=num_threads)
    assert counts.num_rows == pq.ParquetFile(io.BytesIO(raw)).metadata.num_rows
    assert +counts.unseen == unseen_ids(raw, remapper)
    return out.getvalue()


def unseen_ids(raw: bytes, remapper: Remapper) -> UnseenCounts:
    """Of the decoded rows, one after the other."""
    found = UnseenCounts()
    table = pq.read_table(io.BytesIO(raw), columns=[one.column for one in remapper.format.features.values()])
    for key, one in remapper.format.features.items():
        known = set(known_ids(remapper.maps[one.table]))
        for cell in table.column(one.column).to_pylist():
            ids = cell if isinstance(cell, list) else [] if cell is None else [cell]
            found[key] += sum((each + 2**63) % 2**64 - 2**63 not in known for each in ids)
    return +found


def expected(raw: bytes, remapper: Remapper) -> pa.Table:
    table = pq.read_table(io.BytesIO(raw)).combine_chunks()
    schema = remapper.schema(table.schema, "f")
    return pa.Table.from_batches([remapper.batch(batch, "f") for batch in table.to_batches()], schema)


def decoded(table: pa.Table) -> pa.Table:
    """Equal values may be at different places of two dictionaries."""
    kinds = [field.type.value_type if pa.types.is_dictionary(field.type) else field.type for field in table.schema]
    return table.cast(pa.schema(zip(table.schema.names, kinds, strict=True)))


def assert_right(raw: bytes, remapper: Remapper, **options: Any) -> pq.FileMetaData:
    new = remapped(raw, remapper, **options)
    table = pq.read_table(io.BytesIO(new))
    table.validate(full=True)
    wanted = expected(raw, remapper)
    assert table.schema.equals(wanted.schema, check_metadata=True)
    assert decoded(table).equals(decoded(wanted))
    metadata, old = (pq.read_metadata(io.BytesIO(one)) for one in (new, raw))
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    filled = [old.row_group(number).num_rows for number in range(old.num_row_groups)]
    assert groups == [count for count in filled if count]
    return metadata


def log(seed: int = 0, *, num_ids: int = 50, rows: int = ROWS, lists: bool = True) -> pa.Table:
    """IDs of every kind, and other columns between them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_ids, rows)
    bags = [None if draw < 0.1 else ids[at : at + int(3 * draw)].tolist() for at, draw in enumerate(rng.random(rows))]
    columns = {
        "label": pa.array(rng.random(rows), mask=rng.random(rows) < 0.2),
        "plain": pa.array(ids),
        "nested": pa.array([[{"a": int(one)}] if one % 3 else None for one in ids]),
        "nulls": pa.array(ids, mask=rng.random(rows) < 0.3),
        "narrow": pa.array(ids.astype(np.int32)),
        "unsigned": pa.array(ids.astype(np.uint32), mask=rng.random(rows) < 0.1),
        "text": pa.array([f"x{one}" for one in ids]).dictionary_encode(),
        "wide": pa.array(rng.permutation(ids)).dictionary_encode(),
    }
    if lists:
        columns["bags"] = pa.array(bags, pa.list_(pa.int64()))
    return pa.table(columns)


IDS = ("plain", "nulls", "narrow", "unsigned", "wide")


def remapper(
    *, num_ids: int = 50, lists: bool = True, policies: tuple[Unseen, ...] = ("hash", "error"), **options: Any
) -> Remapper:
    names = [*IDS, *(["bags"] if lists else [])]
    sizes = [(4, 300), (4, 70000), (3, 20), (8, 256), (5, 65536), (6, 300)]
    maps = {
        name: make_map(seed, num_ids=num_ids, num_columns=c, num_rows=k, unseen=policies[seed % 2])
        for seed, (name, (c, k)) in enumerate(zip(names, sizes, strict=False))
    }
    return make_remapper(maps, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("helper", HELPER_POLICIES)
def test_equals_the_core(layout: Layout, helper: HelperPolicy) -> None:
    raw = write(log(), row_group_size=2000, compression="zstd")
    assert_right(raw, remapper(layout=layout, helper=helper))


@pytest.mark.parametrize("compression", [None, "snappy", "gzip", "zstd", "lz4_raw"])
@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"compression": "snappy", "data_page_version": "2.0"},
        {"compression": "none", "write_page_checksum": True},
        {"compression": "gzip", "use_dictionary": False},
        {"compression": "lz4", "dictionary_pagesize_limit": 1000},
        {"compression": "brotli", "write_page_index": True, "data_page_size": 1000},
        {"compression": "zstd", "use_dictionary": False, "column_encoding": {"plain": "DELTA_BINARY_PACKED"}},
        {"compression": "zstd", "use_dictionary": False, "use_byte_stream_split": ["narrow"]},
        {"compression": "zstd", "store_schema": False, "version": "1.0"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) if isinstance(options, dict) else str(options),
)
def test_whatever_wrote_it(options: dict[str, Any], compression: str | None) -> None:
    """Codecs, page versions, dictionaries that end in the middle of a chunk, encodings that are not rewritten."""
    raw = write(log(num_ids=3000, rows=6000), row_group_size=3000, **options)
    assert_right(raw, remapper(num_ids=3000), compression=compression)
    knows_some = remapper(num_ids=2000, policies=("hash", "first_row"))
    assert sum(unseen_ids(raw, knows_some).values()) > 5000
    assert_right(raw, knows_some, compression=compression)


@settings(max_examples=40)
@given(data=st.data(), one=maps(), dictionary=st.booleans(), version=st.sampled_from(["1.0", "2.0"]))
def test_any_column(data: st.DataObject, one: Any, dictionary: bool, version: Any) -> None:
    table = pa.table({"user": data.draw(columns(one))})
    raw = write(table, use_dictionary=dictionary, data_page_version=version, row_group_size=7)
    assert_right(raw, make_remapper({"user": one}, layout=data.draw(st.sampled_from(LAYOUTS))))


def test_pages_are_rewritten_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would only compare the decoder with itself."""
    decoded: list[str] = []
    columns_of = Remapper.columns

    def spy(self: Remapper, column: str, *arguments: Any, **named: Any) -> list[pa.Array]:
        decoded.append(column)
        return columns_of(self, column, *arguments, **named)

    monkeypatch.setattr(Remapper, "columns", spy)
    raw = write(log(num_ids=3000), dictionary_pagesize_limit=1000, compression="zstd")
    for compression in ("zstd", "lz4_raw"):
        remapped(raw, remapper(num_ids=3000), compression=compression)
        remapped(raw, remapper(num_ids=2000, policies=("hash", "first_row")), compression=compression)
    for compression in ("zstd", None):
        raw = write(log(num_ids=3000), data_page_version="2.0", compression=compression or "none")
        remapped(raw, remapper(num_ids=2000, policies=("hash", "first_row")), compression=compression)
    assert decoded == ["bags"] * 6


def test_other_columns_keep_every_byte() -> None:
    raw = write(log(), row_group_size=2000, compression="snappy")
    new = remapped(raw, remapper(helper="drop"))
    for group in range(3):
        kept = {}
        for file in (raw, new):
            one = pq.read_metadata(io.BytesIO(file)).row_group(group)
            for number in range(one.num_columns):
                chunk = one.column(number)
                if chunk.path_in_schema.split(".")[0] in ("label", "nested", "text"):
                    start = chunk.dictionary_page_offset or chunk.data_page_offset
                    content = file[start : start + chunk.total_compressed_size]
                    kept.setdefault(chunk.path_in_schema, []).append((content, chunk.statistics, chunk.compression))
        assert len(kept) == 3
        assert all(before == after for before, after in kept.values())


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_do_not_change_a_byte(num_threads: int) -> None:
    raw = write(log(), row_group_size=500)
    assert remapped(raw, remapper(), num_threads=num_threads) == remapped(raw, remapper())


def test_a_file_without_rows() -> None:
    assert assert_right(write(log(rows=0)), remapper()).num_rows == 0


def test_sorting_columns_follow_their_columns() -> None:
    table = pa.table({"user": [1, 2], "time": [3, 4], "place": [5, 6]})
    order = [pq.SortingColumn(1), pq.SortingColumn(2, descending=True), pq.SortingColumn(0)]
    raw = write(table, sorting_columns=order)
    wide = make_remapper({"user": make_map(num_columns=5)}, helper="store")
    (found, kept) = (
        assert_right(raw, one).row_group(0).sorting_columns for one in (wide, make_remapper({"place": make_map()}))
    )
    assert found == (pq.SortingColumn(4), pq.SortingColumn(5, descending=True))
    assert kept == (pq.SortingColumn(1),)


def test_no_statistics_of_raw_ids_are_left() -> None:
    metadata = assert_right(write(log()), remapper(helper="drop"))
    for number in range(metadata.num_columns):
        chunk = metadata.row_group(0).column(number)
        if chunk.path_in_schema.endswith("pointers"):
            assert not chunk.is_stats_set or not chunk.statistics.has_min_max


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_an_unknown_id_is_named_by_its_row(use_dictionary: bool) -> None:
    ids = np.full(5000, 3)
    ids[4321] = -7
    raw = write(pa.table({"user": ids}), row_group_size=1000, use_dictionary=use_dictionary)
    with pytest.raises(InvalidIDError, match=r"f: column 'user', row 4321 \(the first is 0\) holds raw ID -7"):
        remapped(raw, make_remapper({"user": make_map()}))


def test_an_unknown_id_in_a_dictionary_that_no_row_has() -> None:
    """It is no error: no row is affected."""
    used = pa.DictionaryArray.from_arrays(pa.array([0, 2, 0], pa.int32()), pa.array([1, 99, 2]))
    raw = write(pa.table({"user": used}))
    table = pq.read_table(io.BytesIO(remapped(raw, make_remapper({"user": make_map()}))))
    wanted = make_remapper({"user": make_map()}).batch(pa.record_batch({"user": pa.array([1, 2, 1])}), "f")
    assert table.equals(pa.Table.from_batches([wanted]))


def test_footers_are_understood_to_the_last_byte() -> None:
    """What is not changed is written back as it was."""
    raw = write(log(), row_group_size=100, sorting_columns=[pq.SortingColumn(1)], write_page_index=True)
    length = int.from_bytes(raw[-8:-4], "little")
    footer = raw[-8 - length : -8]
    content, end = read_struct(FileMetaData, footer)
    assert end == length
    assert write_struct(content) == footer


def test_memory_is_that_of_some_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slow writer, few chunks wait."""
    begun = 0
    rewrite = module.rewrite_chunk

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal begun
        begun += 1
        return rewrite(*arguments, **named)

    monkeypatch.setattr(module, "rewrite_chunk", counted)
    raw = write(pa.table({"user": np.arange(50).repeat(40)}), row_group_size=20)
    seen = []
    remap_parquet(
        pa.BufferReader(raw), "f", make_remapper({"user": make_map()}), lambda _: seen.append(begun),
        compression=None, num_threads=2,
    )  # fmt: skip
    assert begun == 100
    assert seen[1] <= 6
