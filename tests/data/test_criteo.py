"""Criteo's TSV: round trips, the compiled loop against the plain one, and every error with its exact line."""

import gzip
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.plain_rows import INT64, assert_same, joined
from torchrec_cce.data.criteo import KAGGLE_UNIVERSES, read_criteo
from torchrec_cce.data.rows import Column, Rows, log_transform
from torchrec_cce.data.tsv import (
    CATEGORICAL_FEATURES,
    DENSE_FEATURES,
    MAX_LINE_BYTES,
    format_lines,
    parse_line,
    parse_lines,
)
from torchrec_cce.errors import ConfigError, DataFileError

GOOD = b"\t".join([b"1", *[b"%d" % i for i in range(13)], *[b"%x" % (1000 * i) for i in range(26)]])

ParsedLine = tuple[int, list[int], list[int]]
LINES = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.lists(st.integers(-(10**18) + 1, 10**18 - 1) | st.none(), min_size=13, max_size=13),
        st.lists(INT64 | st.none(), min_size=26, max_size=26),
    ),
    min_size=1,
    max_size=9,
)


def line_with(position: int, cell: bytes) -> bytes:
    cells = GOOD.split(b"\t")
    cells[position] = cell
    return b"\t".join(cells)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def expected_rows(lines: list[ParsedLine]) -> Rows:
    dense = np.array([[number or 0 for number in integers] for _, integers, _ in lines], dtype=np.float32)
    log_transform(dense)
    ids = np.array([[key or 0 for key in keys] for _, _, keys in lines], dtype=np.int64)
    return Rows(
        labels=np.array([label for label, _, _ in lines], dtype=np.float32),
        dense=dense,
        ids={name: Column(values=ids[:, i].copy()) for i, name in enumerate(CATEGORICAL_FEATURES)},
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


@pytest.mark.parametrize("name", ["log.tsv", "log.tsv.gz"])
@pytest.mark.parametrize(("skip", "most"), [(0, None), (0, 0), (0, 3), (3, 3), (7, 3), (9, None), (10, 5), (50, None)])
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_skip_and_max_rows(tmp_path: Path, name: str, skip: int, most: int | None, chunk_rows: int) -> None:
    path = write(tmp_path / name, b"\n".join(line_with(14, b"%x" % row) for row in range(10)))
    chunks = list(read_criteo(path, skip_rows=skip, max_rows=most, chunk_rows=chunk_rows))
    found = [key for chunk in chunks for key in chunk.ids["C1"].values.tolist()]
    assert found == list(range(10))[skip:][:most]


def numbered_files(folder: Path, sizes: list[int], suffix: str = "") -> list[Path]:
    """Files whose rows, one file after the other, have C1 = 0, 1, 2, …; every second one ends without a line end."""
    folder.mkdir(exist_ok=True)
    starts = np.cumsum([0, *sizes])
    return [
        write(
            folder / f"day_{day}{suffix}",
            b"\n".join(line_with(14, b"%x" % row) for row in range(start, start + size)) + b"\n" * (day % 2),
        )
        for day, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]


def read_numbers(paths: Path | list[Path], **options: int | None) -> list[int]:
    return [key for chunk in read_criteo(paths, **options) for key in chunk.ids["C1"].values.tolist()]  # type: ignore[arg-type]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    suffix=st.sampled_from(["", ".gz"]),
    skip=st.integers(0, 12),
    most=st.integers(0, 30) | st.none(),
    every=st.integers(1, 5),
    first=st.integers(0, 12),
    chunk_rows=st.integers(1, 10),
)
def test_several_files_are_one_log_of_which_every_nth_row_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    suffix: str,
    skip: int,
    most: int | None,
    every: int,
    first: int,
    chunk_rows: int,
) -> None:
    paths = numbered_files(tmp_path_factory.mktemp("days"), sizes, suffix)
    options = {"skip_rows": skip, "max_rows": most, "every": every, "first": first, "chunk_rows": chunk_rows}
    chunks = list(read_criteo(paths, **options))  # type: ignore[arg-type]
    found = [key for chunk in chunks for key in chunk.ids["C1"].values.tolist()]
    assert found == list(range(sum(sizes)))[skip:][:most][first::every]
    assert [len(chunk) for chunk in chunks[:-1]] == [chunk_rows] * (len(chunks) - 1)


def test_sampling_beyond_the_first_block_of_bytes(tmp_path: Path) -> None:
    paths = numbered_files(tmp_path / "days", [20_000, 7_777, 10_000])
    assert read_numbers(paths, skip_rows=19, every=8, first=3) == list(range(22, 37_777, 8))
    # The last row that is read is the last one that is looked for: nothing of the third file is opened.
    paths[2].write_bytes(b"rubbish")
    assert read_numbers(paths, max_rows=27_777, every=7777) == [0, 7777, 15_554, 23_331]


def test_lines_that_are_not_read_are_not_checked_and_those_that_are_say_where(tmp_path: Path) -> None:
    (tmp_path / "days").mkdir()
    lines = [GOOD] * 10
    lines[7] = b"rubbish"
    paths = [write(tmp_path / "days" / f"day_{day}", b"\n".join(lines)) for day in (0, 1)]
    assert sum(map(len, read_criteo(paths, every=2))) == 10
    with pytest.raises(DataFileError, match=r"day_0:8: found 1 tab-separated columns"):
        list(read_criteo(paths, every=2, first=1))
    with pytest.raises(DataFileError, match=r"day_1:8: found 1 tab-separated columns"):
        list(read_criteo(paths, skip_rows=8, every=9))


def test_a_pattern_is_its_files_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    numbered_files(tmp_path / "days", [3] * 12, ".gz")
    assert read_numbers(tmp_path / "days" / "day_*.gz") == list(range(36))
    patterns = [tmp_path / "days" / pattern for pattern in ("day_1[01].gz", "day_?.gz")]
    assert read_numbers(patterns) == [*range(30, 36), *range(30)]


def test_a_missing_file_is_found_out_before_any_is_read(tmp_path: Path) -> None:
    paths = numbered_files(tmp_path / "days", [3, 3])
    with pytest.raises(DataFileError, match="day_2: no such file or folder"):
        next(read_criteo([*paths, tmp_path / "days" / "day_2"], chunk_rows=1))


def test_skipped_lines_and_lines_after_max_rows_are_not_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "log.tsv", b"header\n\n" + GOOD + b"\n" + GOOD + b"\nrubbish\n")
    assert sum(map(len, read_criteo(path, skip_rows=2, max_rows=2))) == 2
    with pytest.raises(DataFileError, match=r"log\.tsv:5: found 1 tab-separated columns"):
        list(read_criteo(path, skip_rows=2))


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


def test_truncated_gzip_is_never_a_short_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lines = [line_with(14, b"%x" % int(generator.integers(2**60))) for _ in range(20_000)]
    whole = gzip.compress(b"\n".join(lines) + b"\n")
    assert len(whole) > 1 << 17
    path = tmp_path / "log.tsv.gz"
    cuts = {1, 2, 5, 9, 10, 11, 100, 4096, len(whole) // 2, *range(len(whole) - 9, len(whole))}
    for size in sorted(cuts | set(generator.integers(20, len(whole), 10).tolist())):
        path.write_bytes(whole[:size])
        # What can be decompressed ends in the line that the error names.
        line = zlib.decompressobj(31).decompress(whole[:size]).count(b"\n") + 1
        rows = 0
        with pytest.raises(DataFileError) as raised:  # noqa: PT012 - the rows before the error are of interest
            for chunk in read_criteo(path, chunk_rows=7):
                rows += len(chunk)
        assert str(raised.value).startswith(f"{path}:{line}: the gzip stream ends here")
        assert rows == (line - 1) // 7 * 7
    path.write_bytes(whole)
    assert sum(map(len, read_criteo(path))) == 20_000


def test_truncated_gzip_within_skipped_rows(tmp_path: Path) -> None:
    whole = gzip.compress(b"\n".join([GOOD] * 100))
    path = tmp_path / "log.tsv.gz"
    path.write_bytes(whole[:-4])
    with pytest.raises(DataFileError, match=r":100: the gzip stream ends here"):
        list(read_criteo(path, skip_rows=1000))


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(b"\n".join([GOOD] * 100)))
    whole[-6] ^= 1  # the checksum
    path = tmp_path / "log.tsv.gz"
    path.write_bytes(whole)
    with pytest.raises(DataFileError, match=r"log\.tsv\.gz:\d+: the gzip stream is damaged"):
        list(read_criteo(path))
    path.write_bytes(GOOD)
    with pytest.raises(DataFileError, match=r"log\.tsv\.gz:1: the gzip stream is damaged .* not compressed"):
        list(read_criteo(path))


def test_gzip_of_several_members_and_padding(tmp_path: Path) -> None:
    members = [b"\n".join([GOOD] * 3) + b"\n", GOOD[:50], GOOD[50:] + b"\n" + GOOD, b""]
    path = tmp_path / "log.tsv.gz"
    path.write_bytes(b"".join(map(gzip.compress, members)) + b"\0" * 512)
    assert sum(map(len, read_criteo(path))) == 5


def no_file(path: Path) -> Path:
    return path / "missing.tsv"


def folder(path: Path) -> Path:
    return path


def nothing_of_the_pattern(path: Path) -> Path:
    return path / "day_*.gz"


def that_cannot_be_read(path: Path) -> Path:
    (path / "log.tsv").symlink_to("/proc/self/mem")  # its first byte is an I/O error
    return path / "log.tsv"


def empty(path: Path) -> Path:
    return write(path / "empty.tsv", b"")


def empty_gzip(path: Path) -> Path:
    return write(path / "empty.tsv.gz", b"")


def zero_bytes(path: Path) -> Path:
    (path / "zero.tsv.gz").touch()
    return path / "zero.tsv.gz"


def no_line_ends(path: Path) -> Path:
    return write(path / "log.tsv", b"1\t" * (1 << 19))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_file, ": no such file or folder"),
        (folder, ": a folder; name the files in it, or a pattern such as "),
        (nothing_of_the_pattern, ": no file matches this pattern"),
        (that_cannot_be_read, ": Input/output error; pass a Criteo TSV file, plain or .gz"),
        (empty, ":1: the file is empty"),
        (empty_gzip, ":1: the file is empty"),
        (zero_bytes, ":1: the file is empty"),
        (no_line_ends, ":1: no line end within"),
    ],
)
def test_no_such_log(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path)
    with pytest.raises(DataFileError) as raised:
        list(read_criteo(path))
    assert str(raised.value).startswith(f"{path}{message}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "arguments", [{"skip_rows": -1}, {"max_rows": -1}, {"chunk_rows": 0}, {"every": 0}, {"first": -1}]
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(arguments))}={next(iter(arguments.values()))}"):
        list(read_criteo(write(tmp_path / "log.tsv", GOOD), **arguments))


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


def test_real_log_in_days(real_data: Path, tmp_path: Path) -> None:
    """Cut into files by lines, plain and gzip, an eighth of it is every eighth line."""
    lines = (real_data / "criteo_80k" / "criteo_10k.tsv").read_bytes().splitlines(keepends=True)
    days = [
        write(tmp_path / f"day_{day}{suffix}", b"".join(lines[start : start + 4000]))
        for day, (start, suffix) in enumerate([(0, ""), (4000, ".gz"), (8000, "")])
    ]
    rows = joined(list(read_criteo(days, every=8, first=5, chunk_rows=100)))
    assert_same(rows, expected_rows([parse_line(line.rstrip(b"\r\n")) for line in lines[5::8]]))


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
