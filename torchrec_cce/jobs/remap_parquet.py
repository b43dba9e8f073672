"""A Parquet file with pointers in place of raw IDs, column chunk by column chunk.

Columns that are no IDs are copied byte for byte, so that nothing about them changes, whatever wrote them. Of ID columns
the pages are rewritten (`remap_pages`); what that does not cover, as lists of IDs, is decoded and encoded by pyarrow.
"""

import base64
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.data.remapped_format import METADATA_KEY
from torchrec_cce.errors import DataFileError
from torchrec_cce.jobs.remap import FeatureMap, Found, Remapper
from torchrec_cce.jobs.remap_pages import (
    BIT_PACKED,
    CODECS,
    DICTIONARIES,
    INT32,
    INT64,
    PLAIN,
    RLE,
    CannotRewrite,
    Chunk,
    rewrite_chunk,
)
from torchrec_cce.jobs.remap_thrift import STRUCT, Struct, binary, i64, items, read_struct, write_struct

MAGIC = b"PAR1"
_ARROW_SCHEMA = b"ARROW:schema"
_DICTIONARY_BYTES = 4 << 20

Write = Callable[[Any], object]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One field of the raw file, and what it becomes."""

    name: str
    leaves: range
    """Its leaf columns in the raw file."""
    elements: list[Struct]
    """Its part of the new file's schema."""
    copied: bool
    """The raw leaves are in the new file."""
    features: tuple[FeatureMap, ...] = ()
    rewrites: bool = False
    """Its pages can be rewritten."""
    optional: bool = False
    unsigned: bool = False


def remap_parquet(
    file: pa.NativeFile, name: str, remapper: Remapper, write: Write, *, compression: str | None, num_threads: int
) -> int:
    """Write the remapped file, front to back; returns its number of rows.

    Row groups stay as they are. Memory holds a few column chunks. The bytes do not depend on `num_threads`.

    Args:
        file: open for reading at any place.
        name: of the file, for messages.
        write: takes bytes.
        compression: of new columns, as pyarrow names codecs, or None.

    Raises:
        DataFileError, InvalidIDError: see `Remapper`; or the file is no Parquet file.
    """
    return _File(file, name, remapper, compression).copy(write, num_threads)


class _File:
    def __init__(self, file: pa.NativeFile, name: str, remapper: Remapper, compression: str | None) -> None:
        self._file = file
        self._name = name
        self._remapper = remapper
        self._compression = compression
        self._metadata = pq.ParquetFile(file).metadata
        self._schema = pq.ParquetFile(file, metadata=self._metadata).schema_arrow
        self._new_schema = remapper.schema(self._schema, name)
        size = file.size()
        length = int.from_bytes(file.read_at(4, size - 8), "little")
        self._footer, _ = read_struct(file.read_at(length, size - 8 - length))
        self._groups: list[Struct] = self._footer[4].value.values
        self._plans = self._plan()

    def copy(self, write: Write, num_threads: int) -> int:
        position = 0

        def put(data: Any) -> None:
            nonlocal position
            write(data)
            position += len(data)

        put(MAGIC)
        groups = []
        counts = [group[3].value for group in self._groups]
        tasks = [
            partial(self._chunks, plan, number, sum(counts[:number]))
            for number, count in enumerate(counts)
            if count
            for plan in self._plans
        ]
        results = in_order(tasks, num_threads)
        for group in self._groups:
            if not group[3].value:
                continue
            start, entries = position, []
            for _ in self._plans:
                for chunk in next(results):
                    entries.append(_moved(chunk.entry, position))
                    for part in chunk.parts:
                        put(part)
            groups.append(self._group(group, entries, start))
        footer = write_struct({**self._footer, **self._head(), 4: items(STRUCT, groups)})
        for part in (footer, len(footer).to_bytes(4, "little"), MAGIC):
            put(part)
        return sum(counts)

    def _plan(self) -> list[_Plan]:
        elements: list[Struct] = self._footer[2].value.values
        trees = list(_trees(elements[1:]))
        new_fields = iter(_trees(_elements_of(self._new_schema)))
        plans, leaf = [], 0
        for field, tree in zip(self._schema, trees, strict=True):
            leaves = range(leaf, leaf := leaf + sum(5 not in element for element in tree))
            features = tuple(self._remapper.features_of(field.name))
            copied = not features or self._remapper.format.helper == "keep-raw"
            new = [next(new_fields) for _ in self._remapper.fields(field)]
            if copied:
                new[0] = tree
            plans.append(
                _Plan(
                    name=field.name,
                    leaves=leaves,
                    elements=[element for one in new for element in one],
                    copied=copied,
                    features=features,
                    rewrites=bool(features) and self._can_rewrite(tree, leaves.start, new[-1]),
                    optional=tree[0][3].value == 1,
                    unsigned=pa.types.is_unsigned_integer(_value_type(field.type)),
                )
            )
        return plans

    def _can_rewrite(self, tree: list[Struct], leaf: int, new: list[Struct]) -> bool:
        if len(tree) > 1 or len(new) > 1 or self._remapper.format.layout != "words":
            return False
        if tree[0][3] != new[0][3] or tree[0][1].value not in (INT32, INT64):
            return False
        allowed = {PLAIN, RLE, BIT_PACKED, *DICTIONARIES}
        metas = [group[1].value.values[leaf][3].value for group in self._groups]
        return all(meta[4].value in CODECS and allowed.issuperset(meta[2].value.values) for meta in metas)

    def _chunks(self, plan: _Plan, group: int, first_row: int) -> list[Chunk]:
        """The new file's chunks of one field in one row group."""
        entries: list[Struct] = self._groups[group][1].value.values
        raw = [self._read(entries[leaf]) for leaf in plan.leaves] if plan.copied or plan.rewrites else []
        copied = [_copied(entries[leaf], data) for leaf, data in zip(plan.leaves, raw, strict=False)]
        return (copied if plan.copied else []) + self._new_chunks(plan, group, first_row, raw)

    def _new_chunks(self, plan: _Plan, group: int, first_row: int, raw: list[bytes]) -> list[Chunk]:
        if not plan.features:
            return []
        names = tuple(name for one in plan.features for name in one.columns)
        if plan.rewrites:
            meta = self._groups[group][1].value.values[plan.leaves.start][3].value
            finds = [one.find for one in plan.features]
            try:
                return rewrite_chunk(
                    raw[0],
                    meta,
                    lambda ids: _all_found([find(ids) for find in finds]),
                    names,
                    unsigned=plan.unsigned,
                    optional=plan.optional,
                    compression=self._compression,
                )
            except CannotRewrite:
                pass  # also the place of a wrong ID is found by its row
        table = pq.ParquetFile(self._file, metadata=self._metadata).read_row_group(
            group, columns=[plan.name], use_threads=False
        )
        array = table.column(0).combine_chunks()
        arrays = self._remapper.columns(plan.name, array, self._name, first_row=first_row)
        fields = [self._new_schema.field(name) for name in names]
        return _encoded(pa.table(arrays[-len(names) :], schema=pa.schema(fields)), self._compression)

    def _read(self, entry: Struct) -> bytes:
        if 8 in entry or 9 in entry or 1 in entry:
            raise DataFileError(f"{self._name}: has encrypted columns, or columns in other files; write it anew")
        meta: Struct = entry[3].value
        data: bytes = self._file.read_at(meta[7].value, _start(meta))
        if len(data) != meta[7].value:
            raise DataFileError(f"{self._name}: is cut short")
        return data

    def _head(self) -> Struct:
        """Fields of the footer that differ from the raw file's."""
        elements = [element for plan in self._plans for element in plan.elements]
        root = {**self._footer[2].value.values[0], 5: self._footer[3]._replace(kind=5, value=len(self._new_schema))}
        kept = [
            pair
            for pair in (self._footer[5].value.values if 5 in self._footer else [])
            if pair[1].value not in (_ARROW_SCHEMA, METADATA_KEY)
        ]
        added = {
            METADATA_KEY: self._remapper.format.to_json(),
            _ARROW_SCHEMA: base64.b64encode(self._new_schema.serialize().to_pybytes()),
        }
        pairs = kept + [{1: binary(key), 2: binary(value)} for key, value in added.items()]
        leaves = sum(5 not in element for element in elements)
        type_order = {1: self._footer[2]._replace(kind=STRUCT, value={})}
        head = {
            2: items(STRUCT, [root, *elements]),
            5: items(STRUCT, pairs),
        }
        if 7 in self._footer:
            head[7] = items(STRUCT, [type_order] * leaves)
        return head

    def _group(self, group: Struct, entries: list[Struct], start: int) -> Struct:
        metas = [entry[3].value for entry in entries]
        new = {
            **group,
            1: items(STRUCT, entries),
            2: i64(sum(meta[6].value for meta in metas)),
            5: i64(start),
            6: i64(sum(meta[7].value for meta in metas)),
        }
        if 4 in group:
            new.pop(4)
            kept = self._still_sorted(group[4].value.values)
            if kept:
                new[4] = items(STRUCT, kept)
        return new

    def _still_sorted(self, columns: list[Struct]) -> list[Struct]:
        """The sorting columns up to the first that is not in the new file, with their new numbers."""
        numbers, new = {}, 0
        for plan in self._plans:
            if plan.copied:
                numbers.update({leaf: new + place for place, leaf in enumerate(plan.leaves)})
            new += sum(5 not in element for element in plan.elements)
        kept: list[Struct] = []
        for column in columns:
            if column[1].value not in numbers:
                break
            kept.append({**column, 1: column[1]._replace(value=numbers[column[1].value])})
        return kept


def in_order(tasks: Sequence[Callable[[], Any]], num_threads: int) -> Iterator[Any]:
    """The results of `tasks` in their order, few of them ahead."""
    if num_threads == 1:
        yield from (task() for task in tasks)
        return
    left = iter(tasks)
    with ThreadPoolExecutor(num_threads) as threads:
        ahead: list[Future[Any]] = [threads.submit(task) for task in islice(left, 2 * num_threads)]
        try:
            while ahead:
                result = ahead.pop(0).result()
                ahead += [threads.submit(task) for task in islice(left, 1)]
                yield result
        finally:
            for future in ahead:
                future.cancel()


def _all_found(found: list[Found]) -> Found:
    bad = next((one.bad for one in found if one.bad >= 0), -1)
    return Found([word for one in found for word in one.words], bad)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _start(meta: Struct) -> int:
    offsets = [meta[number].value for number in (9, 10, 11) if number in meta]
    return min(int(offset) for offset in offsets if offset > 0)


def _copied(entry: Struct, data: bytes) -> Chunk:
    """A raw chunk; indexes and Bloom filters, which lie elsewhere in the file, are left out."""
    meta: Struct = entry[3].value
    start = _start(meta)
    moved = {number: value for number, value in meta.items() if number not in (14, 15)}
    for number in (9, 10, 11):
        if number in moved and moved[number].value > 0:
            moved[number] = i64(moved[number].value - start)
        else:
            moved.pop(number, None)
    return Chunk(parts=[data], entry={2: i64(0), 3: entry[3]._replace(value=moved)})


def _moved(entry: Struct, position: int) -> Struct:
    """The entry of a chunk that begins at `position`."""
    meta = dict(entry[3].value)
    for number in (9, 10, 11):
        if number in meta:
            meta[number] = i64(meta[number].value + position)
    return {**entry, 3: entry[3]._replace(value=meta)}


def _encoded(table: pa.Table, compression: str | None) -> list[Chunk]:
    """The chunks of a table, encoded by pyarrow as one row group."""
    data, footer = _written(table, compression)
    (group,) = footer[4].value.values
    chunks = []
    for entry in group[1].value.values:
        meta = entry[3].value
        start = _start(meta)
        chunks.append(_copied(entry, data[start : start + meta[7].value]))
    return chunks


def _elements_of(schema: pa.Schema) -> list[Struct]:
    """The elements of a Parquet schema, without its root."""
    _, footer = _written(schema.empty_table(), None)
    elements: list[Struct] = footer[2].value.values
    return elements[1:]


def _written(table: pa.Table, compression: str | None) -> tuple[bytes, Struct]:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="lz4" if compression == "lz4_raw" else compression or "none",
        write_statistics=False,
        dictionary_pagesize_limit=_DICTIONARY_BYTES,
        store_schema=False,
    ) as writer:
        if len(table):
            writer.write_table(table, row_group_size=len(table))
    data = sink.getvalue().to_pybytes()
    length = int.from_bytes(data[-8:-4], "little")
    return data, read_struct(data, len(data) - 8 - length)[0]


def _trees(elements: list[Struct]) -> Iterator[list[Struct]]:
    """Cut the elements, in their depth-first order, into those of each field of the root."""
    position = 0
    while position < len(elements):
        start, open_children = position, 1
        while open_children:
            element = elements[position]
            open_children += (element[5].value if 5 in element else 0) - 1
            position += 1
        yield elements[start:position]
