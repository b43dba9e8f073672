"""Criteo's TSV: round trips, the compiled loop against the plain one, and every error with its exact line."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.criteo_lines import GOOD, ParsedLine, expected_rows, line_with, write
from tests.support.plain_rows import INT64, assert_same, joined
from torchrec_cce.data.criteo import KAGGLE_UNIVERSES, read_criteo
from torchrec_cce.data.tsv import (
    CATEGORICAL_FEATURES,
    DENSE_FEATURES,
    MAX_LINE_BYTES,
    format_lines,
    parse_line,
    parse_lines,
)
from torchrec_cce.errors import DataFileError

LINES = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.lists(st.integers(-(10**18) + 1, 10**18 - 1) | st.none(), min_size=13, max_size=13),
        st.lists(INT64 | st.none(), min_size=26, max_size=26),
    ),
    min_size=1,
    max_size=9,
)


@given(
    LINES,
    st.sampled_from(["log.tsv", "log.tsv.gz"]),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 10),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[ParsedLine],
    name: str,
    end: bytes,
    end_of_last: bool,
    upper: bool,
    chunk_rows: int,
) -> None:
    text = [
        "\t".join(
            [
                str(label),
                *("" if number is None else str(number) for number in integers),
                *("" if key is None else f"{key % 2**64:{'X' if upper else 'x'}}" for key in keys),
            ]
        ).encode()
        for label, integers, keys in lines
    ]
    path = tmp_path_factory.getbasetemp() / name
    write(path, end.join(text) + (end if end_of_last else b""))
    chunks = list(read_criteo(path, chunk_rows=chunk_rows))
    assert_same(joined(chunks), expected_rows(lines))
    assert [len(chunk) for chunk in chunks[:-1]] == [chunk_rows] * (len(chunks) - 1)


@given(
    st.one_of(
        st.binary(max_size=60),
        st.tuples(st.integers(0, 39), st.binary(max_size=22)).map(lambda edit: line_with(*edit)),
        st.lists(st.text("01-9afAFgx \t\r", max_size=3), min_size=37, max_size=42).map(lambda c: "\t".join(c).encode()),
    ).filter(lambda line: b"\n" not in line)
)
def test_compiled_loop_takes_what_the_plain_one_takes(line: bytes) -> None:
    labels, dense, ids = np.zeros(1, np.float32), np.zeros((1, 13), np.float32), np.zeros((26, 1), np.int64)
    buffer = np.frombuffer(line + b"\n", dtype=np.uint8)
    filled, at, wait, lines, good = parse_lines(buffer, 0, 0, 3, 0, labels, dense, ids)
    try:
        label, integers, keys = parse_line(line.removesuffix(b"\r"))
    except ValueError:
        assert (filled, at, wait, lines, good) == (0, 0, 0, 0, False)
        return
    assert (filled, at, wait, lines, good) == (1, len(buffer), 2, 1, True)
    assert labels[0] == label
    np.testing.assert_array_equal(dense[0], np.maximum(np.array(integers, dtype=np.float32), 0))
    assert ids[:, 0].tolist() == keys


@given(
    st.lists(
        st.tuples(
            st.integers(0, 1),
            st.lists(st.integers(-1, 10**18 - 1), min_size=13, max_size=13),
            st.lists(st.integers(-1, 2**32 - 1), min_size=26, max_size=26),
        ),
        max_size=4,
    )
)
def test_format_lines(lines: list[ParsedLine]) -> None:
    out = np.zeros(len(lines) * MAX_LINE_BYTES, dtype=np.uint8)
    size = format_lines(
        np.array([label for label, _, _ in lines], dtype=np.int64),
        np.array([integers for _, integers, _ in lines], dtype=np.int64).reshape(-1, 13),
        np.ascontiguousarray(np.array([keys for _, _, keys in lines], dtype=np.int64).reshape(-1, 26).T),
        out,
    )
    expected = "".join(
        "\t".join(
            [str(label), *("" if i < 0 else str(i) for i in integers), *("" if k < 0 else f"{k:08x}" for k in ids)]
        )
        + "\n"
        for label, integers, ids in lines
    )
    assert out[:size].tobytes().decode() == expected


def test_golden_line(tmp_path: Path) -> None:
    line = b"0\t1\t-2\t\t7" + b"\t" * 9 + b"\t68fd1e64\tFFFFFFFFFFFFFFFF\t\t0" + b"\t1f" * 22 + b"\n"
    (rows,) = read_criteo(write(tmp_path / "log.tsv", line))
    np.testing.assert_allclose(rows.dense, [[np.log(2), 0, 0, np.log(8)] + [0] * 9], rtol=1e-6)
    first = [int(rows.ids[f"C{i}"].values[0]) for i in range(1, 27)]
    assert first == [0x68FD1E64, -1, 0, 0] + [0x1F] * 22
    assert all(column.lengths is None for column in rows.ids.values())


BAD_LINES = [
    (b"", "found an empty line, expected 40 columns: label, I1..I13, C1..C26"),
    (b"1\t2", "found 2 tab-separated columns, expected 40 columns"),
    (GOOD.rsplit(b"\t", 1)[0], "found 39 tab-separated columns, expected 40"),
    (GOOD + b"\tff", "found 41 tab-separated columns, expected 40"),
    (GOOD + b"\t", "found 41 tab-separated columns, expected 40"),
    (line_with(0, b""), "the label is ''; it must be 0 or 1"),
    (line_with(0, b"2"), "the label is '2'; it must be 0 or 1"),
    (line_with(0, b"01"), "the label is '01'; it must be 0 or 1"),
    (line_with(3, b"1.5"), "column I3 is '1.5'; it must be an integer of at most 18 digits, or empty"),
    (line_with(1, b"-"), "column I1 is '-'; it must be an integer"),
    (line_with(13, b"1" * 19), f"column I13 is '{'1' * 19}'; it must be an integer"),
    (line_with(14, b"xyz"), "column C1 is 'xyz'; it must be at most 16 hexadecimal digits, or empty"),
    (line_with(39, b"0x1"), "column C26 is '0x1'; it must be at most 16 hexadecimal digits"),
    (line_with(39, b"\xff"), r"column C26 is '\\xff'; it must be at most 16 hexadecimal digits"),
    (line_with(20, b'"ab"'), "column C7 is '\"ab\"'; it must be"),
    (line_with(20, b"a" * 17), f"column C7 is '{'a' * 17}'; it must be"),
    (line_with(20, b"g" * 99), f"column C7 is '{'g' * 40}…'; it must be"),
]


@pytest.mark.parametrize("name", ["log.tsv", "log.tsv.gz"])
@pytest.mark.parametrize(("bad", "message"), BAD_LINES)
def test_bad_line(tmp_path: Path, name: str, bad: bytes, message: str) -> None:
    for line, total, chunk_rows in [(1, 1, 16384), (1, 5, 2), (4, 9, 2), (5, 9, 2), (9, 9, 100)]:
        lines = [GOOD] * total
        lines[line - 1] = bad
        for end in (b"\n", b"\r\n"):
            path = write(tmp_path / name, b"".join(text + end for text in lines))
            with pytest.raises(DataFileError) as raised:
                list(read_criteo(path, chunk_rows=chunk_rows))
            assert str(raised.value).startswith(f"{path}:{line}: {message}")
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["log.tsv", "log.tsv.gz"])
def test_bad_line_far_into_the_file(tmp_path: Path, name: str) -> None:
    """Beyond the first block of bytes and the first chunk, with and without skipped rows."""
    lines = [line_with(14, b"%x" % row) for row in range(30_000)]
    lines[29_876] = line_with(30, b"no")
    path = write(tmp_path / name, b"\n".join(lines))
    for skip in (0, 10, 20_001, 29_876):
        rows = 0
        with pytest.raises(DataFileError, match=rf"^{re.escape(str(path))}:29877: column C17 is 'no'"):  # noqa: PT012
            for chunk in read_criteo(path, skip_rows=skip, chunk_rows=1000):
                assert chunk.ids["C1"].values[0] == skip + rows
                rows += len(chunk)
        assert rows == (29_876 - skip) // 1000 * 1000
    assert sum(map(len, read_criteo(path, skip_rows=29_877))) == 123


def test_real_log(real_data: Path) -> None:
    rows = joined(list(read_criteo(real_data / "criteo_80k" / "criteo_80k.tsv.gz")))
    assert len(rows) == 80_000
    assert rows.labels.mean() == pytest.approx(0.2245, abs=5e-5)
    assert rows.dense.shape == (80_000, len(DENSE_FEATURES))
    sizes = {feature: len(np.unique(column.values)) for feature, column in rows.ids.items()}
    # A missing category counts as one more ID than in the description of the data.
    assert sizes["C3"] in (35_104, 35_105)
    assert sizes["C12"] in (33_153, 33_154)
    assert 199_000 < sum(sizes.values()) < 201_000


def test_real_lines_parse_as_the_plain_loop_says(real_data: Path) -> None:
    path = real_data / "criteo_80k" / "criteo_10k.tsv"
    rows = joined(list(read_criteo(path, chunk_rows=999)))
    assert_same(rows, expected_rows([parse_line(line) for line in path.read_bytes().splitlines()]))


def test_kaggle_universes(real_data: Path) -> None:
    """The whole log has 33,762,577 distinct values; the first rows of it have fewer, of small features half."""
    assert list(KAGGLE_UNIVERSES) == list(CATEGORICAL_FEATURES)
    assert sum(KAGGLE_UNIVERSES.values()) == 33_762_577
    rows = joined(list(read_criteo(real_data / "criteo_80k" / "criteo_80k.tsv.gz")))
    sizes = {feature: len(np.unique(column.values)) for feature, column in rows.ids.items()}
    for feature, most in KAGGLE_UNIVERSES.items():
        assert sizes[feature] <= most
        if most < 30:
            assert sizes[feature] >= 0.5 * most
