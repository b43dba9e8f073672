"""The footer of a remapped Parquet file: what each field of the raw file becomes, and what is true of the new one."""

import base64
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.data.arrow import id_type
from torchrec_cce.jobs.remap.parquet.chunks import elements_of
from torchrec_cce.jobs.remap.parquet.metadata import (
    CODECS,
    MAGIC,
    ColumnOrder,
    Encoding,
    FileMetaData,
    KeyValue,
    Repetition,
    RowGroup,
    SchemaElement,
    SortingColumn,
    Type,
)
from torchrec_cce.jobs.remap.parquet.thrift import LIST, STRUCT, Items, Raw, Struct, read_struct, write_struct
from torchrec_cce.jobs.remap.remapper import FeatureMap, Remapper

ARROW_SCHEMA = b"ARROW:schema"
_TAIL_BYTES = 8
"""After the footer: its length, and the magic bytes."""
_REWRITTEN = frozenset(Encoding)
"""Encodings that are rewritten page by page."""


@dataclass(frozen=True, kw_only=True)
class FieldPlan:
    """One field of the raw file, and what it becomes."""

    name: str
    leaves: range
    """Its leaf columns in the raw file."""
    types: tuple[int | None, ...]
    """Of the leaves, by the schema."""
    raw_field: pa.Field
    raw_elements: list[SchemaElement]
    """Its part of the raw file's schema."""
    elements: list[SchemaElement]
    """Its part of the new file's schema."""
    copied: bool
    """The raw leaves are in the new file."""
    features: tuple[FeatureMap, ...]
    """Those whose raw column it is."""
    rewrites: bool
    """Its pages can be rewritten."""
    optional: bool
    """It may hold nulls."""
    repeated: bool
    """A row may have several values, or an empty list."""
    unsigned: bool
    """Its values have no sign."""

    @cached_property
    def new_names(self) -> tuple[str, ...]:
        """Of the columns that are new in the file."""
        return tuple(name for feature in self.features for name in feature.columns)


def read_footer(file: pa.NativeFile) -> tuple[FileMetaData, int]:
    """The footer of a raw file, and the byte at which it begins.

    Raises:
        ValueError, IndexError: the file does not end with a footer that can be read.
    """
    size = file.size()
    tail = file.read_at(_TAIL_BYTES, max(0, size - _TAIL_BYTES))
    stop = size - _TAIL_BYTES - int.from_bytes(tail[:4], "little")
    if stop < len(MAGIC) or tail[4:] != MAGIC:
        raise ValueError("it does not end with a Parquet file's footer")
    data = file.read_at(size - _TAIL_BYTES - stop, stop)
    # Each of many new objects is looked at again and again while garbage is searched for, of which there is none.
    collects = gc.isenabled()
    gc.disable()
    try:
        footer, _ = read_struct(FileMetaData, data)
    finally:
        if collects:
            gc.enable()
    return footer, stop


def check_footer(footer: bytes, schema: pa.Schema, num_rows: int) -> None:
    """Raise ValueError if another reader does not find this schema and so many rows in the footer of a new file."""
    tail = footer + len(footer).to_bytes(4, "little") + MAGIC
    found = pq.ParquetFile(pa.BufferReader(MAGIC + tail))
    if found.metadata.num_rows != num_rows or not found.schema_arrow.equals(schema):
        raise ValueError(f"its schema cannot be written again: {found.schema_arrow.names} for {schema.names}")


def plan_fields(footer: FileMetaData, schema: pa.Schema, remapper: Remapper, new_schema: pa.Schema) -> list[FieldPlan]:
    """One plan a field of the raw file that has `footer` and `schema`, of which `remapper` makes `new_schema`."""
    new_trees = _trees(elements_of(new_schema))
    plans, leaf = [], 0
    for field, tree in zip(schema, _trees(footer.schema[1:]), strict=True):
        leaves = range(leaf, leaf := leaf + _num_leaves(tree))
        features = tuple(remapper.features_of(field.name))
        is_copied = not features or remapper.format.helper == "keep-raw"
        new = [next(new_trees) for _ in remapper.fields(field)]
        if is_copied:
            new[0] = tree
        is_plain = remapper.format.layout == "words" and _is_alike(tree, new[-1])
        plans.append(
            FieldPlan(
                name=field.name,
                leaves=leaves,
                types=tuple(element.type for element in tree if element.num_children is None),
                raw_field=field,
                raw_elements=tree,
                elements=[element for new_tree in new for element in new_tree],
                copied=is_copied,
                features=features,
                rewrites=bool(features) and is_plain and _can_rewrite(footer, leaves.start),
                optional=tree[0].repetition_type == Repetition.OPTIONAL,
                repeated=any(element.repetition_type == Repetition.REPEATED for element in tree),
                unsigned=pa.types.is_unsigned_integer(id_type(field.type)),
            )
        )
    return plans


def new_footer(raw: FileMetaData, plans: Sequence[FieldPlan], schema: pa.Schema, groups: list[Raw]) -> FileMetaData:
    """The footer of the new file, which has this schema and these row groups (see `new_group`)."""
    elements = [element for plan in plans for element in plan.elements]
    root = SchemaElement(raw.schema[0])
    root.num_children = len(schema)
    new = FileMetaData(raw)
    new.schema = [root, *elements]
    new[FileMetaData.ROW_GROUPS] = LIST, Items(STRUCT, groups)
    new.key_value_metadata = [
        *(key_value(key, value) for key, value in schema.metadata.items()),
        key_value(ARROW_SCHEMA, base64.b64encode(schema.serialize().to_pybytes())),
    ]
    if raw.column_orders is not None:
        order = ColumnOrder()
        order.TYPE_ORDER = Struct()
        new.column_orders = [order] * _num_leaves(elements)
    return new


def new_group(
    raw: RowGroup, plans: Sequence[FieldPlan], entries: list[Raw], *, start: int, size: int, uncompressed: int
) -> Raw:
    """A row group of the new file, which has these chunks, of so many bytes together, from the byte `start` on.

    As bytes: of many groups they take a tenth of the memory.
    """
    new = RowGroup(raw)
    new[RowGroup.COLUMNS] = LIST, Items(STRUCT, entries)
    new.total_byte_size = uncompressed
    new.file_offset = start
    new.total_compressed_size = size
    new.sorting_columns = _still_sorted(raw.sorting_columns or [], plans) or None
    return Raw(write_struct(new))


def _still_sorted(columns: list[SortingColumn], plans: Sequence[FieldPlan]) -> list[SortingColumn]:
    """The sorting columns up to the first that is not in the new file, with their new numbers."""
    numbers, new = {}, 0
    for plan in plans:
        if plan.copied:
            numbers.update({leaf: new + place for place, leaf in enumerate(plan.leaves)})
        new += _num_leaves(plan.elements)
    kept: list[SortingColumn] = []
    for column in columns:
        if column.column_idx not in numbers:
            break
        kept.append(SortingColumn(column))
        kept[-1].column_idx = numbers[column.column_idx]
    return kept


def key_value(key: bytes, value: bytes) -> KeyValue:
    """An entry of a footer's metadata."""
    pair = KeyValue()
    pair.key, pair.value = key, value
    return pair


def _num_leaves(elements: list[SchemaElement]) -> int:
    """Columns that some elements of a schema have."""
    return sum(element.num_children is None for element in elements)


def _is_alike(tree: list[SchemaElement], new: list[SchemaElement]) -> bool:
    """Whether a raw field and a new one are plain columns of numbers with the same nulls."""
    return (
        len(tree) == len(new) == 1
        and tree[0].repetition_type == new[0].repetition_type
        and tree[0].type in (Type.INT32, Type.INT64)
    )


def _can_rewrite(footer: FileMetaData, leaf: int) -> bool:
    metas = [group.columns[leaf].meta_data for group in footer.row_groups]
    return all(meta.codec in CODECS and _REWRITTEN.issuperset(meta.encodings) for meta in metas)


def _trees(elements: list[SchemaElement]) -> Iterator[list[SchemaElement]]:
    """Cut the elements, in their depth-first order, into those of each field of the root."""
    position = 0
    while position < len(elements):
        start, open_children = position, 1
        while open_children:
            open_children += (elements[position].num_children or 0) - 1
            position += 1
        yield elements[start:position]
