"""Parquet: round trips, every kind of column that may hold IDs, and every cell that may not be there."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.plain_rows import assert_same, bags_of, column, cut, joined, numbered, rows
from torchrec_cce.data.parquet import num_rows, read_parquet, write_parquet
from torchrec_cce.data.rows import Rows
from torchrec_cce.errors import ConfigError, DataFileError

DENSE = ["x", "y", "z"]


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    size = len(next(iter(columns.values())))
    pq.write_table(pa.table({"label": pa.array([0] * size, pa.int8()), **columns}), path, **options)
    return path


@given(rows(min_rows=1), st.lists(st.integers(0, 5), max_size=4), st.integers(1, 13))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, whole: Rows, sizes: list[int], chunk_rows: int) -> None:
    path = tmp_path_factory.getbasetemp() / "log.parquet"
    dense = DENSE[: whole.dense.shape[1]]
    assert write_parquet(path, cut(whole, sizes), dense=dense, multi_hot={"many"}) == len(whole)
    assert num_rows(path) == len(whole)
    chunks = list(read_parquet(path, label="label", dense=dense, ids={f: f for f in whole.ids}, chunk_rows=chunk_rows))
    assert max(map(len, chunks)) <= chunk_rows
    assert_same(joined(chunks), whole)


def test_written_schema(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    write_parquet(path, [numbered(9)], dense=["x", "y"], multi_hot=["b"], label="click")
    schema = pq.read_schema(path)
    assert schema.names == ["click", "x", "y", "a", "b"]
    assert [str(kind) for kind in schema.types] == ["float", "float", "float", "int64", "list<element: int64>"]
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


KINDS = [
    *((pa.array([3, None, 0, 7], getattr(pa, name)()), [[3], [], [0], [7]]) for name in
      ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")),
    (pa.array([2**64 - 1, None, 2**63, 2**53 + 1], pa.uint64()), [[-1], [], [-(2**63)], [2**53 + 1]]),
    (pa.array([2**62 + 1, None, -(2**63), -1], pa.int64()), [[2**62 + 1], [], [-(2**63)], [-1]]),
    (pa.array([9, None, 9, 5], pa.int64()).dictionary_encode(), [[9], [], [9], [5]]),
    (pa.array([[1, 2], None, [], [3]], pa.list_(pa.int32())), [[1, 2], [], [], [3]]),
    (pa.array([[1, 2**64 - 1], None, [], [3]], pa.large_list(pa.uint64())), [[1, -1], [], [], [3]]),
    (pa.array([[1, 2], None, [5, 6], [3, 4]], pa.list_(pa.int64(), 2)), [[1, 2], [], [5, 6], [3, 4]]),
    (
        pa.ListArray.from_arrays([0, 2, 2, 3, 3], pa.array([8, 9, 8], pa.int64()).dictionary_encode()),
        [[8, 9], [], [8], []],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("array", "bags"), KINDS, ids=lambda value: str(getattr(value, "type", "")))
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_id_columns(tmp_path: Path, array: pa.Array, bags: list[list[int]], chunk_rows: int) -> None:
    path = write(tmp_path / "log.parquet", {"c": array})
    whole = joined(list(read_parquet(path, label="label", ids={"f": "c"}, chunk_rows=chunk_rows)))
    assert bags_of(whole.ids["f"]) == bags
    for skip in range(5):
        part = list(read_parquet(path, label="label", ids={"f": "c"}, skip_rows=skip, max_rows=2))
        assert [bag for chunk in part for bag in bags_of(chunk.ids["f"])] == bags[skip : skip + 2]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([1, None, -3], pa.int64()), [1, 0, -3]),
        (pa.array([1, None, 3], pa.uint64()), [1, 0, 3]),
        (pa.array([0.5, None, -3.0], pa.float64()), [0.5, 0, -3]),
        (pa.array(np.array([0.5, 2, -3], np.float16)), [0.5, 2, -3]),
        (pa.array([True, None, False]), [1, 0, 0]),
    ],
)
def test_dense_columns(tmp_path: Path, array: pa.Array, expected: list[float]) -> None:
    path = write(tmp_path / "log.parquet", {"x": array})
    (plain,) = read_parquet(path, label="label", ids={}, dense=["x", "label", "x"])
    np.testing.assert_array_equal(plain.dense, np.array([expected, [0, 0, 0], expected], np.float32).T)
    (logs,) = read_parquet(path, label="label", ids={}, dense=["x"], dense_transform="log1p")
    np.testing.assert_allclose(logs.dense[:, 0], np.log1p(np.maximum(expected, 0)), rtol=1e-6)


@pytest.mark.parametrize(
    "array", [pa.array([1, 0, 1], pa.int8()), pa.array([1.0, 0.0, 1.0]), pa.array([True, False, True])]
)
def test_labels(tmp_path: Path, array: pa.Array) -> None:
    (part,) = read_parquet(write(tmp_path / "log.parquet", {"y": array}), label="y", ids={})
    assert part.labels.tolist() == [1, 0, 1]
    assert part.dense.shape == (3, 0)


@pytest.mark.parametrize("skip", [0, 1, 4, 5, 9, 13, 14, 19, 20, 99])
@pytest.mark.parametrize("most", [None, 0, 1, 4, 6, 100])
@pytest.mark.parametrize("chunk_rows", [2, 3, 100])
def test_skip_and_max_rows_over_files_and_row_groups(
    tmp_path: Path, skip: int, most: int | None, chunk_rows: int
) -> None:
    for number, (start, stop) in enumerate([(0, 9), (9, 9), (9, 20)]):
        write(tmp_path / f"part-{number}.parquet", {"c": pa.array(range(start, stop), pa.int64())}, row_group_size=4)
    (tmp_path / "notes.txt").write_text("not a log")
    chunks = list(
        read_parquet(tmp_path, label="label", ids={"f": "c"}, skip_rows=skip, max_rows=most, chunk_rows=chunk_rows)
    )
    assert [key for chunk in chunks for key in chunk.ids["f"].values] == list(range(20))[skip:][:most]
    assert num_rows(tmp_path) == 20


def test_paths_are_read_in_the_order_given(tmp_path: Path) -> None:
    for name, key in (("b", 1), ("a", 2), ("c.d", 3)):
        write(tmp_path / f"{name}.parquet", {"c": pa.array([key])})
    paths: list[Path | str] = [tmp_path / "b.parquet", str(tmp_path / "a.parquet")]
    assert [part.ids["f"].values[0] for part in read_parquet(paths, label="label", ids={"f": "c"})] == [1, 2]
    assert [part.ids["f"].values[0] for part in read_parquet(tmp_path, label="label", ids={"f": "c"})] == [2, 1, 3]


def test_column_names_with_dots(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", {"a.b": pa.array([5]), "a": pa.array([[6]])})
    (part,) = read_parquet(path, label="label", ids={"f": "a.b", "g": "a"})
    assert (part.ids["f"].values[0], part.ids["g"].values[0]) == (5, 6)


BAD_CELLS = [
    ({"y": pa.array([0, 1, 0, 2])}, "column 'y', row 3 (the first is 0) is 2; a label must be 0 or 1"),
    ({"y": pa.array([0, 1, None, 1])}, "column 'y', row 2 (the first is 0) is null; a label must be 0 or 1"),
    ({"y": pa.array([0, 1, 0.5, 1])}, "column 'y', row 2 (the first is 0) is 0.5; a label must be 0 or 1"),
    ({"y": pa.array([0, 1, np.nan, 1], from_pandas=False)}, "column 'y', row 2 (the first is 0) is nan; a label"),
    ({"x": pa.array([0, 1, 2, np.nan], from_pandas=False)}, "column 'x', row 3 (the first is 0) is nan; it must be"),
    ({"x": pa.array([0, 1, np.inf, 3])}, "column 'x', row 2 (the first is 0) is inf; it must be finite in float32"),
    ({"x": pa.array([0, 1, 1e300, 3])}, "column 'x', row 2 (the first is 0) is 1e+300; it must be finite in float32"),
    (
        {"c": pa.array([[1], [], [2, 3], [4, None]])},
        "column 'c', row 3 (the first is 0) holds a list with a null in it",
    ),
    ({"c": pa.array([[1], [], None, [None]])}, "column 'c', row 3 (the first is 0) holds a list with a null in it"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_CELLS)
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("skip", [0, 2])
def test_bad_cells(tmp_path: Path, bad: dict[str, pa.Array], message: str, chunk_rows: int, skip: int) -> None:
    good = {"y": pa.array([0, 1, 0, 1]), "x": pa.array([0.0] * 4), "c": pa.array([1, 2, 3, 4])}
    path = write(tmp_path / "log.parquet", {**good, **bad}, row_group_size=2)
    with pytest.raises(DataFileError) as raised:
        list(read_parquet(path, label="y", dense=["x"], ids={"f": "c"}, chunk_rows=chunk_rows, skip_rows=skip))
    assert str(raised.value).startswith(f"{path}: {message}")


BAD_COLUMNS = [
    ({"label": "nope"}, "there is no column 'nope'; the columns are ['label', 'x', 's', 'c', 'd', 't']"),
    ({"dense": ["nope"]}, "there is no column 'nope'; the columns are"),
    ({"ids": {"f": "nope"}}, "there is no column 'nope'; the columns are"),
    ({"label": "s"}, "column 's' is string; it must be an integer, a float or a boolean"),
    ({"dense": ["c"]}, "column 'c' is list<element: int64>; it must be an integer"),
    ({"ids": {"f": "s"}}, "column 's' is string, not integer; replace each by an integer first, e.g. a 64-bit hash"),
    ({"ids": {"f": "d"}}, "column 'd' is string, not integer; replace each by an integer first"),
    ({"ids": {"f": "x"}}, "column 'x' is double; IDs are integers, dictionary-encoded integers, or lists of them"),
    ({"ids": {"f": "t"}}, "column 't' is timestamp[us]; IDs are integers"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_COLUMNS)
def test_bad_columns(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    columns = {
        "x": pa.array([0.5]),
        "s": pa.array(["a"]),
        "c": pa.array([[1]]),
        "d": pa.array(["a"]).dictionary_encode(),
        "t": pa.array([0], pa.timestamp("us")),
    }
    path = write(tmp_path / "log.parquet", columns)
    with pytest.raises(DataFileError) as raised:
        list(read_parquet(path, **{"label": "label", "ids": {}, **changed}))
    assert str(raised.value).startswith(f"{path}: {message}")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table([pa.array([0]), pa.array([1]), pa.array([2])], names=["label", "c", "c"]), path)
    with pytest.raises(DataFileError, match="2 columns have the name 'c'"):
        list(read_parquet(path, label="label", ids={"f": "c"}))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=rf"{re.escape(str(tmp_path))}: no \*\.parquet in this folder"):
        list(read_parquet(tmp_path, label="label", ids={}))
    with pytest.raises(DataFileError, match=r"gone\.parquet: no such file or folder"):
        list(read_parquet(tmp_path / "gone.parquet", label="label", ids={}))
    whole = write(tmp_path / "whole.parquet", {"c": pa.array(range(1000))}).read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "cut.parquet"
        path.write_bytes(whole[:size])
        with pytest.raises(DataFileError, match=r"^[^\n]*cut\.parquet: cannot be read as Parquet \([^\n]*$"):
            list(read_parquet(path, label="label", ids={}))
        with pytest.raises(DataFileError, match="cannot be read as Parquet"):
            num_rows(path)


@pytest.mark.parametrize(
    "arguments", [{"skip_rows": -1}, {"max_rows": -1}, {"chunk_rows": 0}, {"dense_transform": "sqrt"}]
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any]) -> None:
    path = write(tmp_path / "log.parquet", {"c": pa.array([1])})
    name, value = next(iter(arguments.items()))
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        list(read_parquet(path, label="label", ids={}, **arguments))


def test_rows_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    path.write_bytes(b"an older file")
    with pytest.raises(ConfigError, match="no rows to write"):
        write_parquet(path, [])
    with pytest.raises(ConfigError, match=r"dense=\['x'\] names 1 columns, the rows have 2"):
        write_parquet(path, [numbered(3)], dense=["x"])
    with pytest.raises(ConfigError, match="two columns have one name"):
        write_parquet(path, [numbered(3)], dense=["x", "a"], multi_hot=["b"])
    with pytest.raises(ConfigError, match=r"multi_hot names \['z'\]"):
        write_parquet(path, [numbered(3)], dense=["x", "y"], multi_hot=["z"])
    with pytest.raises(ConfigError, match="feature 'b' is a bag of 2 IDs; name the feature in multi_hot"):
        write_parquet(path, [numbered(3)], dense=["x", "y"])
    assert [item.name for item in tmp_path.iterdir()] == ["log.parquet"]
    assert path.read_bytes() == b"an older file"


def test_a_late_bag_of_several_ids_is_still_refused_whole(tmp_path: Path) -> None:
    first = Rows(labels=np.zeros(1 << 17, np.float32), dense=np.zeros((1 << 17, 0), np.float32),
                 ids={"f": column([[1]] * (1 << 17))})  # fmt: skip
    second = Rows(labels=np.zeros(1, np.float32), dense=np.zeros((1, 0), np.float32), ids={"f": column([[1, 2]])})
    with pytest.raises(ConfigError, match="is a bag of 2 IDs"):
        write_parquet(tmp_path / "log.parquet", [first, second])
    assert not list(tmp_path.iterdir())


def test_real_logs(real_data: Path) -> None:
    path = real_data / "globo" / "globo_ctr.parquet"
    assert num_rows(path) == 4_000_000
    users, clicks = set(), 0.0
    for part in read_parquet(path, label="label", ids={"user": "user", "article": "article"}, max_rows=500_000):
        users |= set(part.ids["user"].values.tolist())
        clicks += part.labels.sum()
    assert clicks == 250_000
    assert len(users) > 50_000
    folder = real_data / "gowalla"
    assert num_rows(folder / "train.parquet") == 1_620_256
    assert num_rows(folder) == 1_620_256 + 434_484
