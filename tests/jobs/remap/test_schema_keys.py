"""Keys of a file's metadata that hold a schema: they follow the new columns, or go."""

import io
import json
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.remap_cases import make_map, make_remapper
from torchrec_cce.data.remapped_format import HelperPolicy, Layout
from torchrec_cce.jobs.remap.parquet.file import remap_parquet

SPARK = b"org.apache.spark.sql.parquet.row.metadata"


def new_metadata(metadata: dict[bytes, bytes], *, layout: Layout = "words", helper: HelperPolicy = "drop") -> pa.Schema:
    """The schema of a remapped file that had this metadata, and the columns `user`, `bag` and `day`."""
    table = pa.table({"user": [1, 2, 3], "bag": [[1], [], None], "day": [0, 1, 2]}).replace_schema_metadata(metadata)
    return remapped(table, layout=layout, helper=helper).schema_arrow


def remapped(table: pa.Table, **options: Any) -> pq.ParquetFile:
    raw, out = io.BytesIO(), io.BytesIO()
    pq.write_table(table, raw)
    remapper = make_remapper({"user": make_map(), "bag": make_map(1, num_columns=5)}, **options)
    remap_parquet(pa.BufferReader(raw.getvalue()), "f", remapper, out.write, compression=None, num_threads=1)
    return pq.ParquetFile(io.BytesIO(out.getvalue()))


def spark_schema() -> dict[bytes, bytes]:
    array = {"type": "array", "elementType": "long", "containsNull": True}
    kinds = {"user": "long", "bag": array, "day": "long"}
    fields = [{"name": name, "type": kind, "nullable": True, "metadata": {}} for name, kind in kinds.items()]
    return {SPARK: json.dumps({"type": "struct", "fields": fields}).encode()}


@pytest.mark.parametrize("helper", ["drop", "store", "keep-raw"])
def test_spark_is_told_of_the_new_columns(helper: HelperPolicy) -> None:
    """Spark takes its schema from this key: columns that are not in it are not there, the others are null."""
    schema = new_metadata(spark_schema() | {b"org.apache.spark.version": b"4.0.0"}, helper=helper)
    fields = json.loads(schema.metadata[SPARK])["fields"]
    assert [field["name"] for field in fields] == schema.names
    words = {"type": "array", "elementType": "long", "containsNull": False}
    kinds = {field["name"]: field["type"] for field in fields}
    assert (kinds["user.pointers"], kinds["bag.pointers.0"], kinds["day"]) == ("long", words, "long")
    assert schema.metadata[b"org.apache.spark.version"] == b"4.0.0"


def test_spark_is_told_of_lists() -> None:
    schema = new_metadata(spark_schema(), layout="lists")
    kinds = {field["name"]: field["type"] for field in json.loads(schema.metadata[SPARK])["fields"]}
    codes = {"type": "array", "elementType": "integer", "containsNull": True}
    assert kinds["user.pointers"] == codes
    assert kinds["bag.pointers"] == {"type": "array", "elementType": codes, "containsNull": False}


@pytest.mark.parametrize("index", ["user", "day"])
@pytest.mark.parametrize("helper", ["drop", "keep-raw"])
def test_pandas_reads_the_new_columns(index: str, helper: HelperPolicy) -> None:
    frame = pd.DataFrame({"user": [1, 5, 3], "bag": [[1], [], [2, 3]], "day": [5, 9, 7]}).set_index(index)
    file = remapped(pa.Table.from_pandas(frame), helper=helper)
    content = json.loads(file.schema_arrow.metadata[b"pandas"])
    assert {column["name"] for column in content["columns"]} == set(file.schema_arrow.names)
    read = file.read().to_pandas()
    assert len(read) == 3
    assert read.index.name == (index if index == "day" or helper == "keep-raw" else None)
    assert {*read.columns, *filter(None, [read.index.name])} == set(file.schema_arrow.names)


def test_hugging_face_is_told_of_the_new_columns() -> None:
    value = {"dtype": "int64", "_type": "Value"}
    features = {"user": value, "bag": {"feature": value, "_type": "List"}, "day": value}
    info = json.dumps({"info": {"features": features}, "fingerprint": "0123"}).encode()
    schema = new_metadata({b"huggingface": info}, layout="lists")
    content = json.loads(schema.metadata[b"huggingface"])
    assert "fingerprint" not in content
    new = content["info"]["features"]
    assert list(new) == schema.names
    codes = {"feature": {"dtype": "uint16", "_type": "Value"}, "length": 4, "_type": "Sequence"}
    assert (new["user.pointers"], new["day"]) == (codes, value)


def test_what_is_no_schema_stays() -> None:
    kept = {b"origin": b"a log", b"note": b'{"of": ["user"]}', b"bytes": b"\xff{", b"list": b"[1, 2]"}
    assert kept.items() <= dict(new_metadata(kept).metadata).items()


@pytest.mark.parametrize(
    "key",
    [
        {b"parquet.avro.schema": b"{}"},
        {b"iceberg.schema": b"{}"},
        {b"a.reader": json.dumps({"columns": {"user": 1, "bag": 2, "day": 3}}).encode()},
        {b"another": json.dumps([["day", "int"], ["bag", "ints"], ["user", "int"]]).encode()},
        {SPARK: b"not JSON"},
        {b"huggingface": b"[]"},
    ],
)
def test_other_schemas_go(key: dict[bytes, bytes]) -> None:
    assert not key.keys() & new_metadata(key).metadata.keys()
