"""The footer of a remapped Parquet file: the raw one's, with what is no longer true replaced."""

import base64
from collections.abc import Sequence

import pyarrow as pa

from torchrec_cce.data.remapped_format import METADATA_KEY
from torchrec_cce.jobs.remap.parquet.fields import FieldPlan, num_leaves
from torchrec_cce.jobs.remap.parquet.thrift import I32, STRUCT, Struct, binary, i64, items

_ARROW_SCHEMA = b"ARROW:schema"


def new_footer(raw: Struct, plans: Sequence[FieldPlan], schema: pa.Schema, groups: list[Struct]) -> Struct:
    """`FileMetaData` of the new file.

    Args:
        raw: that of the raw file.
        schema: the new one.
        groups: its row groups, see `new_group`.
    """
    elements = [element for plan in plans for element in plan.elements]
    root = {**raw[2].value.values[0], 5: raw[3]._replace(kind=I32, value=len(schema))}
    kept = [
        pair for pair in (raw[5].value.values if 5 in raw else []) if pair[1].value not in (_ARROW_SCHEMA, METADATA_KEY)
    ]
    added = {
        METADATA_KEY: schema.metadata[METADATA_KEY],
        _ARROW_SCHEMA: base64.b64encode(schema.serialize().to_pybytes()),
    }
    pairs = kept + [{1: binary(key), 2: binary(value)} for key, value in added.items()]
    new = {**raw, 2: items(STRUCT, [root, *elements]), 4: items(STRUCT, groups), 5: items(STRUCT, pairs)}
    if 7 in raw:
        type_order = {1: raw[2]._replace(kind=STRUCT, value={})}
        new[7] = items(STRUCT, [type_order] * num_leaves(elements))
    return new


def new_group(raw: Struct, plans: Sequence[FieldPlan], entries: list[Struct], start: int) -> Struct:
    """`RowGroup` of the new file.

    Args:
        raw: the group of the raw file.
        entries: its chunks, as `ColumnChunk`.
        start: its first byte in the file.
    """
    metas = [entry[3].value for entry in entries]
    new = {
        **raw,
        1: items(STRUCT, entries),
        2: i64(sum(meta[6].value for meta in metas)),
        5: i64(start),
        6: i64(sum(meta[7].value for meta in metas)),
    }
    if 4 in raw:
        new.pop(4)
        kept = _still_sorted(raw[4].value.values, plans)
        if kept:
            new[4] = items(STRUCT, kept)
    return new


def _still_sorted(columns: list[Struct], plans: Sequence[FieldPlan]) -> list[Struct]:
    """The sorting columns up to the first that is not in the new file, with their new numbers."""
    numbers, new = {}, 0
    for plan in plans:
        if plan.copied:
            numbers.update({leaf: new + place for place, leaf in enumerate(plan.leaves)})
        new += num_leaves(plan.elements)
    kept: list[Struct] = []
    for column in columns:
        if column[1].value not in numbers:
            break
        kept.append({**column, 1: column[1]._replace(value=numbers[column[1].value])})
    return kept
