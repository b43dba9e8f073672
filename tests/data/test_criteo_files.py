"""Criteo's TSV in files: several of them, skipped rows, gzip, and what cannot be read."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.criteo_lines import GOOD, expected_rows, line_with, write
from tests.support.plain_rows import assert_same, joined
from torchrec_cce.data.criteo import read_criteo
from torchrec_cce.data.tsv import (
    parse_line,
)
from torchrec_cce.errors import ConfigError, DataFileError


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


def test_real_log_in_days(real_data: Path, tmp_path: Path) -> None:
    """Cut into files by lines, plain and gzip, an eighth of it is every eighth line."""
    lines = (real_data / "criteo_80k" / "criteo_10k.tsv").read_bytes().splitlines(keepends=True)
    days = [
        write(tmp_path / f"day_{day}{suffix}", b"".join(lines[start : start + 4000]))
        for day, (start, suffix) in enumerate([(0, ""), (4000, ".gz"), (8000, "")])
    ]
    rows = joined(list(read_criteo(days, every=8, first=5, chunk_rows=100)))
    assert_same(rows, expected_rows([parse_line(line.rstrip(b"\r\n")) for line in lines[5::8]]))
