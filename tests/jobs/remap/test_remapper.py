"""The pure core of the remap against a plain loop over IDs."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.kernel_references import reference_packed_hashes
from tests.support.remap_cases import columns, make_feature, make_map, make_remapper, maps, plain_columns
from torchrec_cce.data.remapped_format import HELPER_POLICIES, LAYOUTS, METADATA_KEY, HelperPolicy, Layout
from torchrec_cce.errors import DataFileError, InvalidIDError
from torchrec_cce.hashing import UniversalHash
from torchrec_cce.kernels.packed import packed_hashes


@given(data=st.data(), one=maps(), layout=st.sampled_from(LAYOUTS), helper=st.sampled_from(HELPER_POLICIES))
def test_every_id_gets_what_its_map_says(
    data: st.DataObject, one: object, layout: Layout, helper: HelperPolicy
) -> None:
    array = data.draw(columns(one))
    batch = pa.record_batch({"user": array})
    new = make_remapper({"user": one}, layout=layout, helper=helper).batch(batch, "f")
    new.validate(full=True)
    feature = make_feature(one, layout=layout, helper=helper)
    names = [*(["user"] if helper == "keep-raw" else []), *feature.pointers, *feature.helpers]
    assert new.schema.names == names
    if helper == "keep-raw":
        assert new.column(0).equals(array)
    expected = plain_columns(array.to_pylist(), one, feature, layout)
    assert [column.to_pylist() for column in new.columns[-len(expected) :]] == expected


@pytest.mark.parametrize("code_bits", [4, 8, 16, 32])
@pytest.mark.parametrize("num_columns", [1, 2, 3, 4, 5, 9, 32])
def test_packed_hashes(code_bits: int, num_columns: int) -> None:
    functions = UniversalHash.from_seed(3, num_columns=num_columns, num_rows=2**code_bits)
    ids = np.random.default_rng(0).integers(-(2**63), 2**63, 200)
    expected = reference_packed_hashes(ids, functions, code_bits)
    out = np.ones_like(expected)
    packed_hashes(ids, functions.multipliers, functions.offsets, functions.num_rows, code_bits, out)
    np.testing.assert_array_equal(out, expected)


def test_everything_else_stays() -> None:
    one = make_map()
    raw = pa.record_batch(
        [
            pa.array([1.5, None]),
            pa.array([3, 4]),
            pa.array([[{"a": [1, None]}], None]),
            pa.array(["x", "y"]).dictionary_encode(),
        ],
        schema=pa.schema(
            [
                pa.field("label", pa.float64(), metadata={"unit": "clicks"}),
                pa.field("user", pa.int64(), nullable=False, metadata={"PARQUET:field_id": "7"}),
                pa.field("nested", pa.list_(pa.struct([("a", pa.list_(pa.int64()))]))),
                pa.field("user.x", pa.dictionary(pa.int32(), pa.string())),
            ],
            {"pandas": "{}", "origin": "here"},
        ),
    )
    remapper = make_remapper({"user": one}, helper="drop")
    new = remapper.batch(raw, "f")
    assert new.schema.names == ["label", "user.pointers", "nested", "user.x"]
    for name in ("label", "nested", "user.x"):
        assert new.schema.field(name).equals(raw.schema.field(name), check_metadata=True)
        assert new.column(name).equals(raw.column(name))
    assert new.schema.field("user.pointers") == pa.field("user.pointers", pa.int64(), nullable=False)
    assert new.schema.metadata == {**raw.schema.metadata, METADATA_KEY: remapper.format.to_json()}


@pytest.mark.parametrize(
    ("values", "kind", "row", "shown"),
    [
        ([3, 50], pa.int64(), 1, "50"),
        ([None, 3, -1], pa.int64(), 2, "-1"),
        ([2**64 - 1], pa.uint64(), 0, str(2**64 - 1)),
        ([[], None, [3, 4], [5, 99, 98]], pa.list_(pa.int32()), 3, "99"),
    ],
)
def test_an_unknown_id_is_named(values: list[object], kind: pa.DataType, row: int, shown: str) -> None:
    remapper = make_remapper({"user": make_map()})
    batch = pa.record_batch({"user": pa.array(values, kind)})
    with pytest.raises(InvalidIDError) as error:
        remapper.batch(batch, "a/b.parquet", first_row=1000)
    assert str(error.value) == (
        f"a/b.parquet: column 'user', row {1000 + row} (the first is 0) holds raw ID {shown}, which the map of table "
        "'t_user' does not know (its IDs are 0..49); correct the data, or publish a map with unseen=\"hash\""
    )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (lambda: {"other": pa.array([1])}, "f: there is no column 'user'; the columns are ['other']"),
        (lambda: {"user": pa.array(["a"])}, "f: column 'user' is string, not integer; replace each by an integer"),
        (lambda: {"user": pa.array([1.0])}, "f: column 'user' is double; IDs are integers"),
        (
            lambda: {"user": pa.array([1]), "user.helpers": pa.array([1])},
            "f: the raw data have a column 'user.helpers' already; rename it",
        ),
        (
            lambda: {"user": pa.array([[1], [2, None]])},
            "f: column 'user', row 1 (the first is 0) holds a list with a null in it",
        ),
    ],
)
def test_what_is_no_raw_data(raw: Callable[[], dict[str, pa.Array]], message: str) -> None:
    with pytest.raises(DataFileError) as error:
        make_remapper({"user": make_map()}).batch(pa.record_batch(raw()), "f")
    assert str(error.value).startswith(message)


def test_remapped_data_is_not_remapped_again() -> None:
    remapper = make_remapper({"user": make_map()}, helper="keep-raw")
    new = remapper.batch(pa.record_batch({"user": pa.array([1])}), "f")
    with pytest.raises(DataFileError, match="f: is remapped already; remap the raw data"):
        remapper.batch(new, "f")
