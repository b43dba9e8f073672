"""Damaged and lying Parquet files: an error, or what an independent reader makes of them; never something else."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.damaged_parquet import damages, remappers, violation, whole_files
from tests.support.remap_cases import make_map, make_remapper
from torchrec_cce.errors import DataFileError
from torchrec_cce.jobs.remap.file import remap_to_arrow
from torchrec_cce.jobs.remap.input import reading
from torchrec_cce.jobs.remap.parquet.file import remap_parquet
from torchrec_cce.jobs.remap.parquet.footer import read_footer
from torchrec_cce.jobs.remap.parquet.metadata import FileMetaData, SchemaElement
from torchrec_cce.jobs.remap.parquet.page import read_chunk, signed_crc
from torchrec_cce.jobs.remap.parquet.thrift import read_struct, write_struct


def remapped(raw: bytes, **options: Any) -> bytes:
    out = io.BytesIO()
    remapper = make_remapper({"user": make_map(**options)}, helper="drop")
    with reading("f"):
        remap_parquet(pa.BufferReader(raw), "f", remapper, out.write, compression="zstd", num_threads=1)
    return out.getvalue()


def written(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def refused(raw: bytes) -> str:
    with pytest.raises(DataFileError) as error:
        remapped(raw)
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(raw: bytes, change: Any) -> bytes:
    """The file with a footer to which something was done."""
    footer, stop = read_footer(pa.BufferReader(raw))
    change(footer)
    new = write_struct(footer)
    return raw[:stop] + new + len(new).to_bytes(4, "little") + b"PAR1"


def test_any_damage() -> None:
    """Some; `make bench-trust` has thousands."""
    ways = remappers()
    for file in whole_files():
        assert [violation(file, file, way) for way in ways] == [None, None]
    found = [
        f"{name}: {wrong}"
        for number, (name, data, whole) in enumerate(damages(0, 200))
        if (wrong := violation(data, whole, ways[number % 2])) is not None
    ]
    assert found == []


@pytest.mark.parametrize("writer", [b"parquet-mr version 1.2.8 (build 0)", b"some other writer"])
@pytest.mark.parametrize("rows", [1, 64, 3000])
def test_a_size_without_the_header_of_the_dictionary(writer: bytes, rows: int) -> None:
    """As parquet-mr wrote it up to 1.2.8, and others (apache/arrow#42298); also where the last page is shorter than
    what is left out, and in the column of IDs.
    """
    table = pa.table(
        {"name": [f"shop {number % 32}" for number in range(rows)], "user": [7 + number % 3 for number in range(rows)]}
    )
    raw = written(table, compression="none", store_schema=False, write_statistics=False)

    def shorten(footer: FileMetaData) -> None:
        for entry in footer.row_groups[0].columns:
            meta = entry.meta_data
            chunk = read_chunk(lambda size, start: raw[start : start + size], meta)
            meta.total_compressed_size -= chunk.pages[0].body
            meta.data_page_offset, meta.dictionary_page_offset = meta.dictionary_page_offset or 0, None
        footer[6] = 8, writer

    found, wanted = (pq.ParquetFile(io.BytesIO(remapped(one))).read() for one in (changed(raw, shorten), raw))
    assert found["name"].to_pylist() == table["name"].to_pylist()
    assert found.equals(wanted)


@pytest.mark.parametrize("lie", [-1, -(2**40), 2**40, 0, 10])
@pytest.mark.parametrize("name", ["total_compressed_size", "data_page_offset", "num_values"])
def test_sizes_places_and_counts_that_cannot_be(name: str, lie: int) -> None:
    raw = written(pa.table({"user": list(range(50)), "x": [f"{number}" for number in range(50)]}))

    def set_it(footer: FileMetaData) -> None:
        meta = footer.row_groups[0].columns[1].meta_data
        meta.dictionary_page_offset = None
        setattr(meta, name, lie)

    refused(changed(raw, set_it))


def test_rows_that_are_not_there() -> None:
    raw = written(pa.table({"user": list(range(50))}))

    def more_rows(footer: FileMetaData) -> None:
        footer.row_groups[0].num_rows += 1
        footer.num_rows += 1

    def more_in_all(footer: FileMetaData) -> None:
        footer.num_rows += 1

    assert "has 50 values for 51 rows" in refused(changed(raw, more_rows))
    assert "do not have its 51 rows" in refused(changed(raw, more_in_all))


@pytest.mark.parametrize("column", ["user", "x"])
@pytest.mark.parametrize("to_arrow", [False, True])
def test_a_page_that_is_not_what_its_crc_says(column: str, to_arrow: bool) -> None:
    """A value that was changed can be read well: only the CRC knows."""
    table = pa.table({"user": list(range(50)), "x": [number / 7 for number in range(50)]})
    raw = written(table, compression="none", use_dictionary=False, write_page_checksum=True)
    footer, _ = read_footer(pa.BufferReader(raw))
    meta = footer.row_groups[0].columns[("user", "x").index(column)].meta_data
    at = meta.data_page_offset + meta.total_compressed_size - 3
    damaged = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
    assert remapped(raw)
    if to_arrow:
        remapper = make_remapper({"user": make_map()})
        with pytest.raises(DataFileError, match="checksum"), reading("f"):
            remap_to_arrow(pa.BufferReader(damaged), "f", remapper, len, compression=None, num_threads=1)
    else:
        assert "CRC" in refused(damaged)


@pytest.mark.parametrize("kind", ["scalar", "list"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_pages_that_are_written_have_a_crc(kind: str, dictionary: bool) -> None:
    users = [number % 7 for number in range(500)] if kind == "scalar" else [[number % 7] for number in range(500)]
    new = remapped(written(pa.table({"user": users}), use_dictionary=dictionary))
    footer, _ = read_footer(pa.BufferReader(new))
    chunk = read_chunk(lambda size, start: new[start : start + size], footer.row_groups[0].columns[0].meta_data)
    assert len(chunk.pages) >= 1
    assert all(page.has_crc and page.crc == signed_crc(chunk.data[page.body : page.stop]) for page in chunk.pages)
    assert len(pq.ParquetFile(io.BytesIO(new), page_checksum_verification=True).read()) == 500


@pytest.mark.parametrize("bomb", [b"\xfc", b"\x1c", b"\x19\x19", b"\xf9\xff", b"\x80"])
def test_headers_without_end(bomb: bytes) -> None:
    raw = written(pa.table({"user": list(range(50)), "x": list(range(50))}), write_page_checksum=True)
    footer = bomb * 100_000
    refused(raw[:4] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    start = read_footer(pa.BufferReader(raw))[0].row_groups[0].columns[0].meta_data.dictionary_page_offset
    assert start is not None
    refused(raw[:start] + bomb * 50 + raw[start + 50 * len(bomb) :])
    for number in (99, 10, 4):  # two fields that have no name here, and one that has
        with pytest.raises((ValueError, IndexError)):
            read_struct(SchemaElement, bytes([0x0C, 2 * number]) + bomb * 1000)


def test_a_copied_column_that_no_reader_can_decode() -> None:
    """There is no CRC, and every header is true: it is seen because it is decoded."""
    raw = written(pa.table({"user": list(range(50)), "x": ["abc"] * 50}), use_dictionary=False, compression="none")
    at = raw.index(b"\x03\x00\x00\x00abc")
    assert "column 'x'" in refused(raw[:at] + b"\xff\xff\xff\x7f" + raw[at + 4 :])
    dictionary = written(pa.table({"user": [1, 2, 3], "x": ["abc", "d", "e"]}), compression="none")
    chunk = read_footer(pa.BufferReader(dictionary))[0].row_groups[0].columns[1].meta_data
    end = (chunk.dictionary_page_offset or 0) + chunk.total_compressed_size
    assert "column 'x'" in refused(dictionary[: end - 2] + b"\xff\xff" + dictionary[end:])


@pytest.mark.parametrize("known", [True, False])
def test_an_index_that_no_dictionary_has(known: bool) -> None:
    """The pages of indices of an ID column are copied, once all of them are seen to be there."""
    raw = written(pa.table({"user": [1, 2, 3] if known else [1, 2, 99]}), compression="none")
    chunk = read_footer(pa.BufferReader(raw))[0].row_groups[0].columns[0].meta_data
    end = (chunk.dictionary_page_offset or 0) + chunk.total_compressed_size
    damaged = raw[: end - 2] + b"\xff\xff" + raw[end:]
    with pytest.raises(DataFileError):
        remapped(damaged, unseen="hash")
