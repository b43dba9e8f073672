"""Criteo's click logs (Kaggle and Terabyte) in their own TSV format, plain or gzip, as a stream of `Rows`.

Every line is a row, so line numbers in errors are exact. A compiled loop parses the bytes themselves: it is faster than
a CSV reader that makes strings first, and nothing it refuses is lost to a type inference or a quoting rule.
"""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from torchrec_cce.data.files import PathLike, files_of
from torchrec_cce.data.rows import Column, Rows, log_transform
from torchrec_cce.data.tsv import CATEGORICAL_FEATURES, DENSE_FEATURES, parse_line, parse_lines
from torchrec_cce.errors import ConfigError, DataFileError

KAGGLE_UNIVERSES = dict(
    zip(
        CATEGORICAL_FEATURES,
        (
            *(1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194),
            *(27, 14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
        ),
        strict=True,
    )
)
"""Feature → distinct values in the 45,840,617 rows of the Kaggle log, a missing one counted, without any threshold: the
tables of DLRM and of the paper, 33,762,577 rows in all. The paper brings the Terabyte log into them by a modulus."""

_BLOCK_BYTES = 1 << 18  # fits the cache; what gzip makes of one block stays small too
_LONGEST_LINE = 1 << 16  # far beyond any log; stops a file without line ends from being read into memory
_GZIP = 16 + zlib.MAX_WBITS


def read_criteo(
    paths: PathLike | Sequence[PathLike],
    *,
    skip_rows: int = 0,
    max_rows: int | None = None,
    every: int = 1,
    first: int = 0,
    chunk_rows: int = 16384,
) -> Iterator[Rows]:
    """Stream one or more files of a Criteo log as one: label, 13 integers (`I1`..`I13`), 26 categories (`C1`..`C26`).

    As in DLRM, an integer becomes `log(1 + max(x, 0))`, a missing integer 0, and a missing category the raw ID 0. A
    category has up to 16 hexadecimal digits and is read as the two's complement of that 64-bit number. Lines end in LF
    or CRLF.

    Args:
        paths: a TSV file without a header, or several, in this order; see `criteo_files`.
        skip_rows: lines to pass over without checking them.
        max_rows: lines of the log after those; None = to the end.
        every, first: of those lines, numbered from 0, the rows `first`, `first + every`, `first + 2·every`, … are
            read; the others are passed over, too.
        chunk_rows: rows of each chunk; the last one may have fewer.

    Yields:
        `Rows` with `dense [N, 13] float32` and one ID in every bag of the 26 features.

    Raises:
        DataFileError: while iterating; one line. A file is missing, which is found out before any is read. Or, after
            `path:line:` (line 1 is the first of that file): it is empty, not readable, truncated or damaged gzip, or a
            line is not a row. Rows before that line may have been yielded.
        ConfigError: a negative `skip_rows`, `max_rows` or `first`, `every < 1` or `chunk_rows < 1`.
    """
    if min(skip_rows, first) < 0 or min(every, chunk_rows) < 1 or (max_rows is not None and max_rows < 0):
        raise ConfigError(
            f"skip_rows={skip_rows}, max_rows={max_rows}, first={first}, every={every}, chunk_rows={chunk_rows}: the "
            "first three must be at least 0, the last two at least 1"
        )
    left = None if max_rows is None else len(range(first, max_rows, every))
    chunk = _Chunk(chunk_rows if left is None else min(chunk_rows, left))
    wait = skip_rows + first  # lines to pass over before the next row
    for path in criteo_files(paths):
        line = 1  # the line that `buffer[at]` starts
        buffers = _whole_lines(path)
        while left != 0 and (buffer := _next_buffer(buffers, path, line)) is not None:
            at = 0
            while at < len(buffer) and left != 0:
                parsed = parse_lines(buffer, at, wait, every, chunk.filled, chunk.labels, chunk.dense, chunk.ids)
                chunk.filled, at, wait, lines, good = parsed
                line += lines
                if not good:
                    raise DataFileError(f"{path}:{line}: {_what_is_wrong(buffer, at)}")
                if chunk.filled == len(chunk.labels):
                    yield chunk.rows()
                    left = None if left is None else left - chunk.filled
                    chunk = _Chunk(chunk_rows if left is None else min(chunk_rows, left))
    if chunk.filled:
        yield chunk.rows()


def criteo_files(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """The files that `paths` stands for: files, `*.gz` among them, and patterns such as `day_*`; see `files_of`.

    Raises:
        DataFileError: a path that is not there, a folder, or a pattern that nothing matches.
    """
    return files_of(paths, ())


class _Chunk:
    """The arrays of one chunk while they are being filled."""

    def __init__(self, num_rows: int) -> None:
        self.labels = np.empty(num_rows, dtype=np.float32)
        self.dense = np.empty((num_rows, len(DENSE_FEATURES)), dtype=np.float32)
        self.ids = np.empty((len(CATEGORICAL_FEATURES), num_rows), dtype=np.int64)
        self.filled = 0

    def rows(self) -> Rows:
        log_transform(self.dense[: self.filled])
        columns = {name: Column(values=self.ids[i, : self.filled]) for i, name in enumerate(CATEGORICAL_FEATURES)}
        return Rows(labels=self.labels[: self.filled], dense=self.dense[: self.filled], ids=columns)


def _what_is_wrong(buffer: npt.NDArray[np.uint8], at: int) -> str:
    line = buffer[at : at + _LONGEST_LINE].tobytes().split(b"\n", 1)[0].removesuffix(b"\r")
    try:
        parse_line(line)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"parse_lines refuses a line that parse_line takes: {line!r}")


def _next_buffer(buffers: Iterator[npt.NDArray[np.uint8]], path: Path, line: int) -> npt.NDArray[np.uint8] | None:
    """The next whole lines, or None at the end; a stream that breaks off before its end is an error at `line`."""
    try:
        return next(buffers, None)
    except EOFError as error:
        raise DataFileError(f"{path}:{line}: {error}") from None
    except zlib.error as error:
        raise DataFileError(
            f"{path}:{line}: the gzip stream is damaged ({error}); fetch the file again, or take .gz off the name "
            "of a file that is not compressed"
        ) from None
    except OSError as error:
        raise DataFileError(f"{path}: {error.strerror or error}; pass a Criteo TSV file, plain or .gz") from error


def _whole_lines(path: Path) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of a file, uncompressed, in buffers that end with a newline; one is added where the last line has none.

    Raises:
        EOFError: the file is empty, a line does not end, or the gzip stream stops before its end; every whole line
            before that point has been yielded.
        zlib.error: damaged gzip. OSError: the file cannot be opened or read.
    """
    rest, empty = b"", True
    for block in _gunzip(path) if path.suffix == ".gz" else _blocks(path):
        empty = False
        data = rest + block
        end = data.rfind(b"\n") + 1
        rest = data[end:]
        if len(rest) > _LONGEST_LINE:
            raise EOFError(f"no line end within {len(rest)} bytes; this is not a Criteo TSV file")
        if end:
            yield np.frombuffer(data, dtype=np.uint8, count=end)
    if empty:
        raise EOFError("the file is empty")
    if rest:
        yield np.frombuffer(rest + b"\n", dtype=np.uint8)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def _gunzip(path: Path) -> Iterator[bytes]:
    """The members of a gzip file, one after the other.

    Not `gzip.open`: it reads ahead, so that at a truncation the rows between its last two reads, and with them the
    number of the line where the data end, would be lost.
    """
    member = zlib.decompressobj(_GZIP)
    started = False
    for block in _blocks(path):
        while block:
            if member.eof:
                block = block.lstrip(b"\0")  # padding between members, as gzip itself allows
                if not block:
                    break
                member = zlib.decompressobj(_GZIP)
            started = True
            if data := member.decompress(block):
                yield data
            block = member.unused_data
    if started and not member.eof:
        raise EOFError("the gzip stream ends here, before its end mark: the file is truncated; fetch it again")
