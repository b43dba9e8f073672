"""The fields of a raw Parquet file, and what each becomes in the remapped one."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from torchrec_cce.jobs.remap.parquet.chunks import elements_of
from torchrec_cce.jobs.remap.parquet.pages import BIT_PACKED, CODECS, DICTIONARIES, INT32, INT64, PLAIN, RLE
from torchrec_cce.jobs.remap.parquet.thrift import Struct
from torchrec_cce.jobs.remap.remapper import FeatureMap, Remapper

_PAGES = frozenset({PLAIN, RLE, BIT_PACKED, *DICTIONARIES})
"""Encodings that are rewritten page by page."""


@dataclass(frozen=True, kw_only=True)
class FieldPlan:
    """One field of the raw file, and what it becomes."""

    name: str
    leaves: range
    """Its leaf columns in the raw file."""
    elements: list[Struct]
    """Its part of the new file's schema."""
    copied: bool
    """The raw leaves are in the new file."""
    features: tuple[FeatureMap, ...]
    rewrites: bool
    """Its pages can be rewritten."""
    optional: bool
    unsigned: bool

    @property
    def new_names(self) -> tuple[str, ...]:
        """Of the columns that are new in the file."""
        return tuple(name for one in self.features for name in one.columns)


def plan_fields(footer: Struct, schema: pa.Schema, remapper: Remapper, new_schema: pa.Schema) -> list[FieldPlan]:
    """One plan a field, in the order of the file.

    Args:
        footer: the raw file's `FileMetaData`.
        schema, new_schema: of the raw file, and what `remapper` makes of it.
    """
    elements: list[Struct] = footer[2].value.values
    new_trees = _trees(elements_of(new_schema))
    plans, leaf = [], 0
    for field, tree in zip(schema, _trees(elements[1:]), strict=True):
        leaves = range(leaf, leaf := leaf + num_leaves(tree))
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
                elements=[element for one in new for element in one],
                copied=is_copied,
                features=features,
                rewrites=bool(features) and is_plain and _can_rewrite(footer, leaves.start),
                optional=tree[0][3].value == 1,
                unsigned=pa.types.is_unsigned_integer(_value_type(field.type)),
            )
        )
    return plans


def num_leaves(elements: list[Struct]) -> int:
    """Columns that some elements of a schema have."""
    return sum(5 not in element for element in elements)


def _is_alike(tree: list[Struct], new: list[Struct]) -> bool:
    """Whether a raw field and a new one are plain columns of numbers with the same nulls."""
    return len(tree) == len(new) == 1 and tree[0][3] == new[0][3] and tree[0][1].value in (INT32, INT64)


def _can_rewrite(footer: Struct, leaf: int) -> bool:
    metas = [group[1].value.values[leaf][3].value for group in footer[4].value.values]
    return all(meta[4].value in CODECS and _PAGES.issuperset(meta[2].value.values) for meta in metas)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


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
