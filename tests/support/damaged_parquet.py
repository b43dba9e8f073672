"""Parquet files that are damaged in many ways, and what a remap may make of them: the right thing, or an error."""

import io
import random
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.remap_cases import make_map, make_remapper
from torchrec_cce.errors import CCEError
from torchrec_cce.jobs.remap.input import reading
from torchrec_cce.jobs.remap.parquet.file import remap_parquet
from torchrec_cce.jobs.remap.parquet.footer import read_footer
from torchrec_cce.jobs.remap.parquet.metadata import ColumnChunk, FileMetaData
from torchrec_cce.jobs.remap.parquet.page import read_chunk
from torchrec_cce.jobs.remap.parquet.thrift import Typed, write_struct
from torchrec_cce.jobs.remap.remapper import Remapper

NUM_IDS = 40


def remappers() -> list[Remapper]:
    """Of the columns `user`, `item` and `bag`: one hashes unknown IDs and keeps raw ones, one refuses them."""
    found = []
    for unseen, helper in (("hash", "keep-raw"), ("error", "drop")):
        maps = {
            name: make_map(seed, num_ids=NUM_IDS, num_columns=2 + 3 * seed, unseen=unseen)  # type: ignore[arg-type]
            for seed, name in enumerate(("user", "item", "bag"))
        }
        found.append(make_remapper(maps, helper=helper))  # type: ignore[arg-type]
    return found


def whole_files() -> list[bytes]:
    """Small files of many kinds of pages, with IDs and with columns that are copied."""
    rng = np.random.default_rng(0)
    rows = 300
    ids = rng.integers(0, NUM_IDS, rows)
    table = pa.table(
        {
            "user": pa.array(ids, mask=rng.random(rows) < 0.2),
            "price": pa.array(rng.random(rows), mask=rng.random(rows) < 0.1),
            "shop": [f"shop {number % 17}" for number in range(rows)],
            "item": pa.array(rng.permutation(ids).astype(np.int32)),
            "nested": [{"a": int(number), "b": [1.5] * int(number % 3)} for number in ids],
            "bag": [[int(number)] * int(number % 3) for number in ids],
        }
    )
    options = [
        {"compression": "none"},
        {"compression": "zstd", "write_page_checksum": True},
        {"compression": "snappy", "data_page_version": "2.0"},
        {"compression": "gzip", "use_dictionary": False},
        {"compression": "lz4", "data_page_size": 100, "dictionary_pagesize_limit": 200, "write_batch_size": 64},
        {"compression": "zstd", "store_schema": False, "use_dictionary": ["shop"], "write_page_index": True},
    ]
    files = []
    for each in options:
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=170, **each)
        files.append(sink.getvalue())
    return files


Damage = Callable[[random.Random, bytes], bytes]


def damages(seed: int, count: int) -> Iterator[tuple[str, bytes, bytes]]:
    """So many damaged files: what was done to each, the file, and as it was before."""
    rng, files = random.Random(seed), whole_files()
    kinds = list(_KINDS.items())
    for number in range(count):
        name, damage = kinds[number % len(kinds)]
        file = rng.randrange(len(files))
        yield f"{name} of file {file} (damage {number} of seed {seed})", damage(rng, files[file]), files[file]


def violation(data: bytes, whole: bytes, remapper: Remapper) -> str | None:
    """What is wrong with the remap of a damaged file; None if it gave an error of one line, or what it should.

    That is the remap of what pyarrow reads. Of a file that pyarrow does not read, it is that of the whole file: where a
    size alone is wrong, the data may all be found.
    """
    out = io.BytesIO()
    try:
        with reading("f"):
            remap_parquet(pa.BufferReader(data), "f", remapper, out.write, compression="zstd", num_threads=1)
    except CCEError as error:
        return "an error of several lines" if "\n" in str(error) else None
    try:
        raw = _read(data)
    except Exception:  # noqa: BLE001  whatever it is
        raw = _read(whole)
    raw = raw.combine_chunks()
    schema = remapper.schema(raw.schema, "f")
    wanted = pa.Table.from_batches([remapper.batch(batch, "f") for batch in raw.to_batches()], schema)
    try:
        found = _read(out.getvalue())
    except Exception as error:  # noqa: BLE001
        return f"the output cannot be read: {error}"
    if _plain(found) != _plain(wanted):
        return "the output is not what the input was"
    return None


def _read(data: bytes) -> pa.Table:
    table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
    table.validate(full=True)
    return table


def _plain(table: pa.Table) -> list[tuple[str, str, str]]:
    """Names, types and values; a text, as NaN does not equal itself."""
    columns = zip(table.schema, table.columns, strict=True)
    return [(field.name, str(field.type), repr(column.to_pylist())) for field, column in columns]


def _flip(rng: random.Random, data: bytes, start: int = 0, stop: int | None = None) -> bytes:
    at = rng.randrange(start, len(data) if stop is None else stop)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _flip_in_the_footer(rng: random.Random, data: bytes) -> bytes:
    return _flip(rng, data, start=_stop(data))


def _flip_in_a_header(rng: random.Random, data: bytes) -> bytes:
    """Or a byte of one is any other."""
    start, stop = rng.choice(_headers(data))
    if rng.random() < 0.5:
        return _flip(rng, data, start, stop)
    at = rng.randrange(start, stop)
    return data[:at] + rng.randbytes(1) + data[at + 1 :]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _cut_inside(rng: random.Random, data: bytes) -> bytes:
    """The end stays where it was, from the end."""
    stop = _stop(data)
    at = rng.randrange(4, stop)
    return data[:at] + data[at + rng.randint(1, 50) :]


def _other_bytes(rng: random.Random, data: bytes) -> bytes:
    size = rng.randint(1, 40)
    at = rng.randrange(len(data) - size)
    return data[:at] + (bytes(size) if rng.random() < 0.5 else rng.randbytes(size)) + data[at + size :]


def _swapped(rng: random.Random, data: bytes) -> bytes:
    """Two column chunks are in each other's place."""
    footer = _footer(data)
    first, second = rng.sample([entry for group in footer.row_groups for entry in group.columns], 2)
    first.meta_data, second.meta_data = second.meta_data, first.meta_data
    return _with_footer(data, footer)


def _lie_in_the_footer(rng: random.Random, data: bytes) -> bytes:
    footer = _footer(data)
    group = rng.choice(footer.row_groups)
    meta = rng.choice(group.columns).meta_data
    owner = rng.choice([meta, meta, meta, group, footer, rng.choice(footer.schema)])
    numbers = [number for number, (_, value) in owner.items() if isinstance(value, int) and not isinstance(value, bool)]
    number = rng.choice(numbers)
    kind, value = owner[number]
    lies = [value + rng.randint(-30, 30), -value, 0, 1, value * 2, rng.randrange(-(2**31), 2**31)]
    changed: Typed = kind, rng.choice(lies)
    owner[number] = changed
    return _with_footer(data, footer)


def _short_size(rng: random.Random, data: bytes) -> bytes:
    """As parquet-mr 1.2.8 leaves out the header of a dictionary, and other sizes that are too small."""
    footer = _footer(data)
    entry: ColumnChunk = rng.choice([entry for group in footer.row_groups for entry in group.columns])
    meta = entry.meta_data
    chunk = read_chunk(lambda size, start: data[start : start + size], meta)
    left_out = rng.choice([len(chunk.data) - sum(page.stop - page.body for page in chunk.pages), rng.randint(1, 30)])
    if meta.dictionary_page_offset is not None and rng.random() < 0.7:
        left_out = chunk.pages[0].body
        meta.data_page_offset, meta.dictionary_page_offset = meta.dictionary_page_offset, None
        footer[6] = 8, b"parquet-mr version 1.2.8 (build 0)"
    meta.total_compressed_size -= left_out
    return _with_footer(data, footer)


def _nested_without_end(rng: random.Random, data: bytes) -> bytes:
    """Structs in structs, or lists in lists, in the footer or in the header of a page."""
    bomb = rng.choice([b"\xfc", b"\x1c", b"\xf9\x19", b"\x19\x19", b"\xff"]) * rng.choice([10, 1000, 200_000])
    if rng.random() < 0.5:
        return data[: _stop(data)] + bomb + len(bomb).to_bytes(4, "little") + b"PAR1"
    start, _ = rng.choice(_headers(data))
    stop = _stop(data)
    return data[:start] + bomb[: stop - start] + data[start + len(bomb[: stop - start]) :]


_KINDS: dict[str, Damage] = {
    "a bit flipped": _flip,
    "a bit of the footer flipped": _flip_in_the_footer,
    "a header of a page changed": _flip_in_a_header,
    "a lie in the footer": _lie_in_the_footer,
    "cut short": _cut,
    "a piece cut out": _cut_inside,
    "other bytes": _other_bytes,
    "chunks swapped": _swapped,
    "a size too small": _short_size,
    "nested without end": _nested_without_end,
}


def _stop(data: bytes) -> int:
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def _footer(data: bytes) -> FileMetaData:
    return read_footer(pa.BufferReader(data))[0]


def _with_footer(data: bytes, footer: FileMetaData) -> bytes:
    new = write_struct(footer)
    return data[: _stop(data)] + new + len(new).to_bytes(4, "little") + b"PAR1"


def _headers(data: bytes) -> list[tuple[int, int]]:
    """Where the headers of all pages are."""
    found = []
    for group in _footer(data).row_groups:
        for entry in group.columns:
            meta = entry.meta_data
            first = meta.data_page_offset if meta.dictionary_page_offset is None else meta.dictionary_page_offset
            chunk = read_chunk(lambda size, start: data[start : start + size], meta)
            found += [(first + page.start, first + page.body) for page in chunk.pages]
    return found
