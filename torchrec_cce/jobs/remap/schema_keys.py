"""Entries of a schema's metadata that describe the schema once more, for readers that believe them, not the file.

pyarrow keeps a key `ARROW:schema` by itself. Spark, pandas and Hugging Face's datasets have keys of their own, which
are rewritten. Those of other readers are dropped: a reader without them takes what the file says.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

Replaced: TypeAlias = Mapping[str, Sequence[pa.Field]]
"""Raw column → the fields that take its place, itself among them if it stays."""

_DROPPED = (
    b"avro.schema",
    b"parquet.avro.schema",
    b"parquet.avro.read.schema",
    b"iceberg.schema",
    b"parquet.proto.class",
    b"parquet.proto.descriptor",
    b"thrift.class",
    b"thrift.descriptor",
    b"org.apache.spark.sql.parquet.row.attributes",
    b"r",
)
"""Schemas of Avro, Iceberg, Protocol Buffers, Thrift, the oldest Spark, and attributes of R's data frames."""


def rewritten(metadata: Mapping[bytes, bytes], names: Sequence[str], replaced: Replaced) -> dict[bytes, bytes]:
    """The metadata of the new schema.

    Args:
        metadata: of the raw schema.
        names: of all its columns.
        replaced: what becomes of the columns that are remapped.
    """
    found = {}
    for key, document in metadata.items():
        new: bytes | None = document
        if key in _REWRITERS:
            new = _rewrite(_REWRITERS[key], document, replaced)
        elif key in _DROPPED or _names_all(document, names):
            new = None
        if new is not None:
            found[key] = new
    return found


def _rewrite(rewrite: Callable[[Any, Replaced], None], document: bytes, replaced: Replaced) -> bytes | None:
    """None where it is not as it should be, and cannot be rewritten."""
    try:
        content = json.loads(document)
        rewrite(content, replaced)
        return json.dumps(content).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _names_all(document: bytes, names: Sequence[str]) -> bool:
    """Whether it is JSON of any kind that names all columns: a schema, then, of a reader that is not known here."""
    if document.lstrip()[:1] not in (b"{", b"["):
        return False
    try:
        content = json.loads(document)
    except (ValueError, RecursionError):
        return False
    return set(names) <= set(_texts(content))


def _texts(content: Any) -> Iterator[str]:
    """All strings in JSON, keys too."""
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value
            left += value.values()
        elif isinstance(value, list):
            left += value


def _in_place(columns: list[Any], replaced: Replaced, make: Callable[[pa.Field, Any], Any]) -> list[Any]:
    """Descriptions of columns, each with its name, where those of the new columns stand for that of a raw one."""
    return [
        column if field is None or field.name == column["name"] else make(field, column)
        for column in columns
        for field in replaced.get(column["name"], [None])
    ]


def _spark(content: Any, replaced: Replaced) -> None:
    def make(field: pa.Field, raw: Any) -> Any:
        return {"name": field.name, "type": _spark_type(field.type), "nullable": raw["nullable"], "metadata": {}}

    content["fields"] = _in_place(content["fields"], replaced, make)


_SPARK_TYPES = {pa.int64(): "long", pa.uint8(): "short", pa.uint16(): "integer", pa.uint32(): "long"}
"""Spark has no unsigned numbers: it reads them as the next wider ones."""


def _spark_type(kind: pa.DataType) -> Any:
    if kind in _SPARK_TYPES:
        return _SPARK_TYPES[kind]
    return {"type": "array", "elementType": _spark_type(kind.value_type), "containsNull": kind.value_field.nullable}


def _pandas(content: Any, replaced: Replaced) -> None:
    def make(field: pa.Field, raw: Any) -> Any:  # noqa: ARG001  as the others
        is_list = not pa.types.is_integer(field.type)
        types = ("list", "object") if is_list else (str(field.type), str(field.type))
        names = {"name": field.name, "field_name": field.name}
        return {**names, "pandas_type": types[0], "numpy_type": types[1], "metadata": None}

    if "columns" in content:
        content["columns"] = _in_place(content["columns"], replaced, make)
    kept = [
        index
        for index in content.get("index_columns", [])
        if isinstance(index, dict) or index not in replaced or any(field.name == index for field in replaced[index])
    ]
    if "index_columns" in content:
        content["index_columns"] = kept


def _hugging_face(content: Any, replaced: Replaced) -> None:
    features = content["info"]["features"]
    new = {}
    for name, feature in features.items():
        for field in replaced.get(name, [None]):
            kept = field is None or field.name == name
            new[name if field is None else field.name] = feature if kept else _feature(field.type)
    content["info"]["features"] = new
    content.pop("fingerprint", None)  # of the raw rows


def _feature(kind: pa.DataType) -> Any:
    if pa.types.is_integer(kind):
        return {"dtype": str(kind), "_type": "Value"}
    length = {"length": kind.list_size} if pa.types.is_fixed_size_list(kind) else {}
    return {"feature": _feature(kind.value_type), **length, "_type": "Sequence"}


_REWRITERS: dict[bytes, Callable[[Any, Replaced], None]] = {
    b"org.apache.spark.sql.parquet.row.metadata": _spark,
    b"pandas": _pandas,
    b"huggingface": _hugging_face,
}
