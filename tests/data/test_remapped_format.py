"""The remapped data format: packing against plain arithmetic, and what a schema must say."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_cce.data.remapped_format import (
    LAYOUTS,
    METADATA_KEY,
    HelperPolicy,
    Layout,
    RemappedFeature,
    RemappedFormat,
    codes_of,
    format_of,
    pack,
    pointer_arrays,
    remapped_feature,
    unpack,
)
from torchrec_cce.errors import DataFileError


def feature(
    num_columns: int = 4, num_rows: int = 300, *, layout: Layout = "words", helper: HelperPolicy = "store"
) -> RemappedFeature:
    return remapped_feature(
        "user",
        table="t_user",
        column="user_id",
        map_digest="a" * 64,
        num_columns=num_columns,
        num_rows=num_rows,
        layout=layout,
        helper=helper,
    )


def remapped(one: RemappedFeature, *, layout: Layout = "words", helper: HelperPolicy = "store") -> RemappedFormat:
    return RemappedFormat(
        version=7, manifest_sha256="b" * 64, layout=layout, helper=helper, features={one.feature: one}
    )


@given(
    num_columns=st.integers(1, 32),
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    count=st.integers(0, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_words_are_codes_side_by_side(num_columns: int, dtype: type[np.unsignedinteger], count: int, seed: int) -> None:
    """Against Python's integers: column 0 in the lowest bits, the next above it, zeros at the end."""
    bits = 8 * np.dtype(dtype).itemsize
    codes = np.random.default_rng(seed).integers(0, 2**bits, (count, num_columns)).astype(dtype)
    words = pack(codes)
    num_words = -(-num_columns * bits // 64)
    assert [(word.dtype, word.shape) for word in words] == [(np.uint64, (count,))] * num_words
    for row in range(count):
        whole = sum(int(code) << (bits * j) for j, code in enumerate(codes[row]))
        assert whole == sum(int(word[row]) << (64 * j) for j, word in enumerate(words))
    np.testing.assert_array_equal(unpack(words, num_columns=num_columns, dtype=dtype), codes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_columns", "num_rows"), [(4, 256), (4, 257), (5, 65536), (3, 65537), (1, 1)])
def test_columns_of_a_layout_give_the_codes_back(layout: Layout, num_columns: int, num_rows: int) -> None:
    one = feature(num_columns, num_rows, layout=layout)
    codes = np.random.default_rng(1).integers(0, num_rows, (50, num_columns)).astype(one.dtype)
    arrays = pointer_arrays(codes, layout)
    assert [array.type for array in arrays] == [one.item_type(layout)] * len(one.pointers)
    assert len(one.helpers) == len(one.pointers)
    np.testing.assert_array_equal(codes_of(arrays, one, layout), codes)
    np.testing.assert_array_equal(codes_of([array.slice(7) for array in arrays], one, layout), codes[7:])


def test_names_of_columns() -> None:
    assert feature().pointers == ("user.pointers",)
    assert feature().helpers == ("user.helpers",)
    assert feature(helper="drop").helpers == ()
    assert feature(5).pointers == ("user.pointers.0", "user.pointers.1")
    assert feature(5, layout="lists").pointers == ("user.pointers",)
    shared = remapped_feature(
        "user", table="t", column="c", map_digest="a" * 64, num_columns=4, num_rows=9, layout="words", helper="drop",
        shared=True,
    )  # fmt: skip
    assert shared.pointers == ("user@t.pointers",)
    assert shared.pointer_dtype == "uint8"


def test_words_of_4_bits_are_of_a_format_of_their_own() -> None:
    """So that an older reader, which knows format 1 alone, says so; all else is still of format 1."""

    def of(layout: Layout, num_columns: int = 20, num_rows: int = 16) -> RemappedFeature:
        sizes = {"map_digest": "a" * 64, "num_columns": num_columns, "num_rows": num_rows}
        return remapped_feature(
            "user", table="t", column="c", layout=layout, helper="store", min_pointer_bits=4, **sizes
        )

    assert of("words").pointer_dtype == "uint4"
    assert of("words").pointers == ("user.pointers.0", "user.pointers.1")
    for plain in (of("lists"), of("words", num_columns=1), of("words", num_rows=17)):
        assert plain.pointer_dtype == "uint8"
        assert remapped(plain).format == format_of({"user": plain}) == 1
    assert of("lists").item_type("lists") == pa.list_(pa.field("element", pa.uint8()), 20)
    assert format_of({"user": feature(), "other": of("words")}) == 2
    good = json.loads(replace(remapped(feature()), format=2, features={"user": of("words")}).to_json())
    assert RemappedFormat.from_json(json.dumps(good).encode(), "f").features["user"] == of("words")
    for wrong, message in (
        ({"format": 1}, "format=1 has no pointers of 4"),
        ({"layout": "lists"}, "layout='lists' ha"),
    ):
        with pytest.raises(DataFileError, match=message):
            RemappedFormat.from_json(json.dumps(good | wrong).encode(), "f")


def test_the_document_is_read_back() -> None:
    one = remapped(feature(5))
    assert RemappedFormat.from_json(one.to_json(), "f") == one
    assert one.find("user", "t_user") == feature(5)
    assert one.find("user", "other") is None
    assert json.loads(one.to_json())["features"]["user"]["pointers"] == ["user.pointers.0", "user.pointers.1"]


def test_other_documents_are_refused() -> None:
    good = json.loads(remapped(feature()).to_json())

    def message(document: bytes) -> str:
        with pytest.raises(DataFileError) as error:
            RemappedFormat.from_json(document, "f.parquet")
        return str(error.value)

    assert message(b"{").startswith("f.parquet: its metadata 'torchrec_cce.remapped' is not JSON")
    assert "format 3; this torchrec_cce reads formats up to 2" in message(json.dumps(good | {"format": 3}).encode())
    assert "version: Input should be a valid integer" in message(json.dumps(good | {"version": "7"}).encode())
    assert "layout: " in message(json.dumps(good | {"layout": "bits"}).encode())
    assert "more: Unexpected keyword" in message(json.dumps(good | {"more": 1}).encode())
    assert "manifest_sha256" in message(json.dumps(good | {"manifest_sha256": "x"}).encode())


def test_a_schema_must_have_what_it_says() -> None:
    one = remapped(feature())

    def schema(**types: pa.DataType) -> pa.Schema:
        return pa.schema(list(types.items()), {METADATA_KEY: one.to_json()})

    whole = {"user.pointers": pa.int64(), "user.helpers": pa.list_(pa.int64())}
    assert RemappedFormat.of_schema(schema(**whole), "f") == one
    with pytest.raises(DataFileError, match=r"f: there is not one column 'user\.helpers'"):
        RemappedFormat.of_schema(schema(**{"user.pointers": pa.int64()}), "f")
    with pytest.raises(DataFileError, match=r"f: column 'user\.pointers' is uint64, not int64"):
        RemappedFormat.of_schema(schema(**whole | {"user.pointers": pa.uint64()}), "f")
    with pytest.raises(DataFileError, match="f: holds no remapped data; make it with torchrec-cce remap"):
        RemappedFormat.of_schema(pa.schema([("user", pa.int64())]), "f")
