"""Headers of pages, read and written by compiled loops: a chunk may have thousands of pages, or a file of chunks.

A header is a struct of Thrift's compact protocol (`thrift.py`) that holds another for its kind of page.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchrec_cce.jit import jit
from torchrec_cce.jobs.remap.parquet.thrift import BOOL, I32, STRUCT, skipped

Bytes = npt.NDArray[np.uint8]


class Page(NamedTuple):
    """A page, by what its header says; places are bytes of its column chunk. All are int, as they lie in a table."""

    start: int
    """Of the header."""
    body: int
    stop: int
    kind: int
    """A `PageType`."""
    uncompressed_size: int
    """Of the body."""
    num_values: int
    """0 of a page of indexes."""
    encoding: int
    level_encoding: int
    """Of definition levels in a page of the first version, or -1."""
    num_nulls: int
    """By a page of the second version; of others, 0."""
    definition_bytes: int
    """Levels of a page of the second version, which are not compressed; of others, 0."""
    repetition_bytes: int
    is_compressed: int
    """0 if the part after those levels is not."""
    has_crc: int
    crc: int
    """CRC-32 of the page's bytes as they lie in the file, without the header, as a signed number."""
    kept: int
    """First byte of the fields of the inner struct, of those that a new header keeps."""
    kept_stop: int
    """The byte after those, -1 if other fields follow the statistics, which are not kept."""


(
    _START,
    _BODY,
    _STOP,
    _KIND,
    _UNCOMPRESSED,
    _NUM_VALUES,
    _ENCODING,
    _LEVEL_ENCODING,
    _NUM_NULLS,
    _DEFINITION,
    _REPETITION,
    _IS_COMPRESSED,
    _HAS_CRC,
    _CRC,
    _KEPT,
    _KEPT_STOP,
) = range(len(Page._fields))
_WIDTH = len(Page._fields)

_DATA, _INDEX, _DICTIONARY, _DATA_2 = range(4)
_ENCODINGS = 10
"""One more than the highest, of which 1 is none any more."""
_FIELDS = 9
_HEAD = np.array([0, I32, I32, I32, I32, STRUCT, 0, STRUCT, STRUCT])
"""Field number → type of the fields of a header: kind, sizes, CRC; what a kind of page has of its own."""
_INNER = (5, 0, 7, 8)
"""Kind → number of the field that has its own header, 0 if nothing of it is asked for."""
_OF_DATA = np.array([0, I32, I32, I32, 0, STRUCT, 0, 0, 0])
_OF_DICTIONARY = np.array([0, I32, I32, 0, 0, 0, 0, 0, 0])
_OF_DATA_2 = np.array([0, I32, I32, 0, I32, I32, I32, BOOL, STRUCT])
MOST_HEADER_BYTES = 32
"""Of a new header, without what it keeps."""

_NO_HEADER, _OUTSIDE, _TOO_MANY, _NOT_FIRST, _SIZE, _LEVELS, _NO_DICTIONARY, _NO_KIND, _NO_DATA = range(-1, -10, -1)
FAULTS = {
    _NO_HEADER: "the header of a page is cut short, or no header",
    _OUTSIDE: "a page does not lie in its column chunk",
    _TOO_MANY: "the pages of a column chunk have more values than the chunk",
    _NOT_FIRST: "the page of a dictionary is not the first of its column chunk",
    _SIZE: "the header of a page says how many bytes it has when it is not compressed, and cannot be true",
    _LEVELS: "the header of a page has levels or nulls that do not fit into it",
    _NO_DICTIONARY: "the page of a dictionary has no header that can be true",
    _NO_KIND: "a page has a type that Parquet does not have",
    _NO_DATA: "a page of data has no header that can be true",
}
"""What `read_pages` finds wrong → in words."""


@jit
def _read_fields(
    data: Bytes,
    position: int,
    kinds: npt.NDArray[np.int64],
    values: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
) -> int:
    """Read a struct; the position after it, or -1 if it cannot be read.

    Args:
        kinds: [9], field number → the type that the field must have, 0 for one that is passed over.
        values: [9], written: the value of a number or a bool, the first byte of a struct.
        places: [9, 2], written: the first byte of the field and the byte after it, both 0 if it is not there.
    """
    places[:] = 0
    number = 0
    while position < len(data):
        start = position
        head = np.int64(data[position])
        position += 1
        if head == 0:
            return position
        wire = head & 15
        if head > 15:
            number += head >> 4
        else:
            number, position = _number(data, position)
            if position < 0:
                return -1
        kind = kinds[number] if 0 <= number < _FIELDS else 0
        if kind != 0 and kind != wire and (kind != BOOL or wire != BOOL + 1):
            return -1
        if kind != 0 and places[number, 1]:
            return -1  # it is there twice
        if kind == STRUCT:
            values[number] = position
        if kind == I32:
            values[number], position = _number(data, position)
        elif kind == BOOL:
            values[number] = wire == BOOL
        elif wire > BOOL + 1:  # a bool has no more bytes
            position = skipped(data, position, wire)
        if position < 0:
            return -1
        if kind != 0:
            places[number, 0], places[number, 1] = start, position
    return -1


@jit
def _number(data: Bytes, position: int) -> tuple[int, int]:
    """A number of 32 bits and the position after it, which is -1 if there is none."""
    found, shift = 0, 0
    while position < len(data) and shift < 35:
        byte = np.int64(data[position])
        position += 1
        found |= (byte & 127) << shift
        if byte < 128:
            if found >> 32:
                return 0, -1
            return (found >> 1) ^ -(found & 1), position
        shift += 7
    return 0, -1


@jit
def read_pages(data: Bytes, num_values: int, is_plain: bool) -> tuple[int, int, npt.NDArray[np.int64]]:
    """The pages that have the values of a chunk: their number, the byte after them, and a table of at least so many.

    Args:
        data: the chunk.
        num_values: of the chunk.
        is_plain: it is not compressed.

    Returns:
        In place of the number, one of `FAULTS` if the headers do not hold together. Of the table, [n, fields of
        `Page`], the first rows count.
    """
    pages = np.zeros((4, _WIDTH), np.int64)
    values, places = np.zeros(_FIELDS, np.int64), np.zeros((_FIELDS, 2), np.int64)
    count, position, left = 0, 0, num_values
    while left > 0:
        if count == len(pages):
            more = np.zeros((2 * count, _WIDTH), np.int64)
            more[:count] = pages
            pages = more
        page = pages[count]
        page[_START] = position
        position = _read_fields(data, position, _HEAD, values, places)
        if position < 0 or places[1, 1] == 0 or places[2, 1] == 0 or places[3, 1] == 0:
            return _NO_HEADER, 0, pages
        kind, size = values[1], values[3]
        page[_KIND], page[_UNCOMPRESSED], page[_IS_COMPRESSED] = kind, values[2], 1
        page[_BODY], page[_STOP] = position, position + size
        if not 0 <= size <= len(data) - position:
            return _OUTSIDE, 0, pages
        page[_HAS_CRC], page[_CRC] = places[4, 1] != 0, values[4]
        position += size
        if not 0 <= kind < len(_INNER):
            return _NO_KIND, 0, pages
        if kind == _DICTIONARY and count:
            return _NOT_FIRST, 0, pages
        if page[_UNCOMPRESSED] < 0 or (is_plain and page[_UNCOMPRESSED] != size):
            return _SIZE, 0, pages
        if kind != _INDEX:
            inner = _INNER[kind]
            if places[inner, 1] == 0:
                return (_NO_DICTIONARY if kind == _DICTIONARY else _NO_DATA), 0, pages
            fault = _read_inner(data, kind, values[inner], size, page, values, places)
            if fault:
                return fault, 0, pages
            if kind != _DICTIONARY:
                left -= page[_NUM_VALUES]
        count += 1
    return (count if left == 0 else _TOO_MANY), position, pages


@jit
def _read_inner(
    data: Bytes,
    kind: int,
    position: int,
    size: int,
    page: npt.NDArray[np.int64],
    values: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
) -> int:
    """Read what a kind of page has in its header into `page`. The result is 0, or one of `FAULTS`."""
    page[_KEPT] = position
    kinds = _OF_DATA if kind == _DATA else _OF_DATA_2 if kind == _DATA_2 else _OF_DICTIONARY
    stop = _read_fields(data, position, kinds, values, places)
    if stop < 0:
        return _NO_HEADER
    encoding, statistics = (4, 8) if kind == _DATA_2 else (2, 5)
    page[_NUM_VALUES], page[_ENCODING] = values[1], values[encoding]
    page[_KEPT_STOP] = stop - 1
    is_there = places[1, 1] != 0 and places[encoding, 1] != 0 and values[1] >= 0
    if kind == _DICTIONARY:
        return 0 if is_there and (values[encoding] == 0 or values[encoding] == 2) else _NO_DICTIONARY
    if not is_there or not 0 <= values[encoding] < _ENCODINGS or values[encoding] == 1:
        return _NO_DATA
    if places[statistics, 1]:
        page[_KEPT_STOP] = places[statistics, 0] if places[statistics, 1] == stop - 1 else -1
    page[_LEVEL_ENCODING] = values[3] if kind == _DATA and places[3, 1] else -1
    if kind == _DATA_2:
        if places[2, 1] == 0 or places[5, 1] == 0 or places[6, 1] == 0:
            return _NO_DATA
        page[_NUM_NULLS], page[_DEFINITION], page[_REPETITION] = values[2], values[5], values[6]
        page[_IS_COMPRESSED] = values[7] if places[7, 1] else 1
        levels = values[5] + values[6]
        if values[5] < 0 or values[6] < 0 or levels > size or not 0 <= values[2] <= values[1]:
            return _LEVELS
    return 0


@jit
def write_header(
    out: Bytes, at: int, data: Bytes, page: npt.NDArray[np.int64], uncompressed: int, compressed: int, crc: int
) -> int:
    """Write the header of a page with these sizes and this CRC, otherwise as that of `page` in the chunk `data`, but
    for statistics; the position after it. `out` has room for it: `MOST_HEADER_BYTES` and what is kept.
    """
    kind = page[_KIND]
    for value in (kind, uncompressed, compressed, crc):
        out[at] = 1 << 4 | I32
        at += 1
        left = (value << 1) ^ (value >> 63)
        while left > 127:
            out[at] = left & 127 | 128
            at += 1
            left >>= 7
        out[at] = left
        at += 1
    out[at] = (_INNER[kind] - 4) << 4 | STRUCT
    at += 1
    for place in range(page[_KEPT], page[_KEPT_STOP]):
        out[at] = data[place]
        at += 1
    out[at] = out[at + 1] = 0  # the ends of both structs
    return at + 2


@jit
def write_again(out: Bytes, data: Bytes, pages: npt.NDArray[np.int64], crcs: npt.NDArray[np.int64]) -> int:
    """Write pages of the chunk `data` as they are but for their headers, which get these CRCs; the bytes written."""
    at = 0
    for number in range(len(pages)):
        page = pages[number]
        start, stop = page[_BODY], page[_STOP]
        at = write_header(out, at, data, page, page[_UNCOMPRESSED], stop - start, crcs[number])
        out[at : at + stop - start] = data[start:stop]
        at += stop - start
    return at
