"""Lines of Criteo's TSV layout: label, 13 integers, 26 hexadecimal categories, separated by tabs, without quoting.

`parse_lines` and `format_lines` are the hot loops; `parse_line` is the plain reference of the first, and explains what
is wrong with a line that it refuses.
"""

import re

import numpy as np
import numpy.typing as npt

from torchrec_cce.jit import jit

DENSE_FEATURES = tuple(f"I{number}" for number in range(1, 14))
"""The integer columns, in file order."""
CATEGORICAL_FEATURES = tuple(f"C{number}" for number in range(1, 27))
"""The hexadecimal columns, in file order."""
NUM_COLUMNS = 1 + len(DENSE_FEATURES) + len(CATEGORICAL_FEATURES)

MAX_LINE_BYTES = NUM_COLUMNS * 20
"""No line that `format_lines` writes is longer: a sign or a tab, and at most 19 digits, per column."""

_TAB, _NEWLINE, _RETURN, _MINUS, _ZERO = 9, 10, 13, 45, 48
_MAX_DECIMAL, _MAX_HEX = 18, 16  # digits that surely fit 64 bits
_DIGITS = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
_HEX_VALUE = np.full(256, 255, dtype=np.uint8)
_HEX_VALUE[_DIGITS] = np.arange(16)
_HEX_VALUE[np.frombuffer(b"ABCDEF", dtype=np.uint8)] = np.arange(10, 16)


def parse_line(line: bytes) -> tuple[int, list[int], list[int]]:
    """One line, without its line end, as (label, 13 integers, 26 IDs); an empty cell is 0, an ID is two's complement.

    Raises:
        ValueError: what is wrong with the line, naming the column, the value found and what is allowed.
    """
    cells = line.split(b"\t")
    if len(cells) != NUM_COLUMNS:
        what = "an empty line" if not line else f"{len(cells)} tab-separated columns"
        raise ValueError(f"found {what}, expected {NUM_COLUMNS} columns: label, I1..I13, C1..C26")
    if cells[0] not in (b"0", b"1"):
        raise ValueError(f"the label is {_shown(cells[0])}; it must be 0 or 1")
    integers, ids = [], []
    for name, cell in zip(DENSE_FEATURES, cells[1:], strict=False):
        if not re.fullmatch(rb"|-?[0-9]{1,%d}" % _MAX_DECIMAL, cell):
            raise ValueError(
                f"column {name} is {_shown(cell)}; it must be an integer of at most {_MAX_DECIMAL} digits, or empty"
            )
        integers.append(int(cell or b"0"))
    for name, cell in zip(CATEGORICAL_FEATURES, cells[1 + len(DENSE_FEATURES) :], strict=True):
        if not re.fullmatch(rb"[0-9a-fA-F]{0,%d}" % _MAX_HEX, cell):
            raise ValueError(
                f"column {name} is {_shown(cell)}; it must be at most {_MAX_HEX} hexadecimal digits, or empty"
            )
        unsigned = int(cell or b"0", 16)
        ids.append(unsigned - 2**64 if unsigned >= 2**63 else unsigned)
    return int(cells[0]), integers, ids


def _shown(cell: bytes) -> str:
    """`cell` in quotes, on one line, not longer than an error message bears."""
    return repr(cell[:40].decode("utf-8", "backslashreplace") + ("…" if len(cell) > 40 else ""))


@jit
def parse_lines(
    buffer: npt.NDArray[np.uint8],
    start: int,
    wait: int,
    every: int,
    row: int,
    labels: npt.NDArray[np.float32],
    dense: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int64],
) -> tuple[int, int, int, int, bool]:
    """Parse whole lines of `buffer` from byte `start` on into rows `row`, `row + 1`, … until either is exhausted.

    Args:
        buffer: [B] uint8; the last byte is a newline, which also ends every inner loop, so none checks for B.
        wait: lines to pass over, unread, before the first one that is parsed.
        every: after that, of so many lines the last one is parsed; 1 = all.
        labels: [N] float32. dense: [N, 13] float32, negative integers as 0. ids: [26, N] int64.

    Returns:
        (the first row not filled, the first byte not parsed, the `wait` from there on, how many lines lie before it,
        whether all is well). If not, the line that starts at that byte is one that `parse_line` refuses.
    """
    lines = 0
    while start < len(buffer) and row < len(labels):
        at = start
        if wait > 0:
            while buffer[at] != _NEWLINE:
                at += 1
            start = at + 1
            wait -= 1
            lines += 1
            continue
        label = buffer[at] - _ZERO
        if label < 0 or label > 1 or buffer[at + 1] != _TAB:
            return row, start, wait, lines, False
        labels[row] = label
        at += 2
        for column in range(dense.shape[1]):
            negative = buffer[at] == _MINUS
            at += negative
            first, number = at, 0
            while buffer[at] >= _ZERO and buffer[at] < _ZERO + 10:
                number = number * 10 + (buffer[at] - _ZERO)
                at += 1
            if buffer[at] != _TAB or at - first > _MAX_DECIMAL or (negative and at == first):
                return row, start, wait, lines, False
            dense[row, column] = 0 if negative else number
            at += 1
        for column in range(ids.shape[0]):
            first, key = at, np.uint64(0)
            while _HEX_VALUE[buffer[at]] < 16:
                key = (key << np.uint64(4)) | np.uint64(_HEX_VALUE[buffer[at]])
                at += 1
            if at - first > _MAX_HEX:
                return row, start, wait, lines, False
            ids[column, row] = np.int64(key)
            if column + 1 < ids.shape[0]:
                if buffer[at] != _TAB:
                    return row, start, wait, lines, False
            else:
                if buffer[at] == _RETURN:
                    at += 1
                if buffer[at] != _NEWLINE:
                    return row, start, wait, lines, False
            at += 1
        start = at
        row += 1
        wait = every - 1
        lines += 1
    return row, start, wait, lines, True


@jit
def format_lines(
    labels: npt.NDArray[np.int64],
    integers: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int64],
    out: npt.NDArray[np.uint8],
) -> int:
    """Write N lines to `out` (at least `N · MAX_LINE_BYTES` bytes) and return the number of bytes written.

    Args:
        labels: [N] int64, 0 or 1.
        integers: [N, 13] int64, not negative; -1 writes an empty cell.
        ids: [26, N] int64 in 0..2^32, written as 8 hexadecimal digits; -1 writes an empty cell.
    """
    at = 0
    for row in range(len(labels)):
        out[at] = _ZERO + labels[row]
        at += 1
        for column in range(integers.shape[1]):
            out[at] = _TAB
            at += 1
            rest = integers[row, column]
            if rest >= 0:
                width = 1
                while width < 19 and rest >= 10**width:
                    width += 1
                for place in range(at + width - 1, at - 1, -1):
                    out[place] = _ZERO + rest % 10
                    rest //= 10
                at += width
        for column in range(ids.shape[0]):
            out[at] = _TAB
            at += 1
            key = ids[column, row]
            if key >= 0:
                for shift in range(28, -1, -4):
                    out[at] = _DIGITS[(key >> shift) & 15]
                    at += 1
        out[at] = _NEWLINE
        at += 1
    return at
