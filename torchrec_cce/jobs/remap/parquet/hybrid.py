"""Dictionary indices and levels as Parquet encodes them, counted and checked where they lie."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from torchrec_cce.jit import jit
from torchrec_cce.jobs.remap.parquet.header import Page
from torchrec_cce.jobs.remap.parquet.metadata import Encoding, PageType

_Bytes: TypeAlias = npt.NDArray[np.uint8]
_Marks: TypeAlias = npt.NDArray[np.bool_]

_HEADER_BITS = 35
_SECOND = int(PageType.DATA_PAGE_V2)
_RLE = int(Encoding.RLE)
_NUM_LEVELS = 2
_BODY, _KIND, _NUM_VALUES, _LEVEL_ENCODING, _NUM_NULLS, _DEFINITION, _REPETITION = map(
    Page._fields.index,
    ("body", "kind", "num_values", "level_encoding", "num_nulls", "definition_bytes", "repetition_bytes"),
)

NO_MARKS = np.empty(0, np.bool_)
DEFINED = np.array([False, True])
"""Of the definition levels 0 and 1 of a column without lists, those of a value."""


def count_marked(data: npt.NDArray[np.uint8], bit_width: int, count: int, marks: npt.NDArray[np.bool_]) -> int:
    """How many of the first `count` values in `data` are marked; `marks: [v]` is for each of the values 0 to `v - 1`.

    Arguments and result: as `scanned`.
    """
    return scanned(data, bit_width, count, len(marks), marks)


@jit
def scanned(data: npt.NDArray[np.uint8], bit_width: int, count: int, limit: int, marks: npt.NDArray[np.bool_]) -> int:
    """How many of the first `count` values in `data` are marked, without decoding all of them to an array.

    Dictionary indices and levels are in Parquet's hybrid of runs and bit packing. A header, which is a varint, precedes
    each part. After the header `2·n`, one value follows that stands for `n` of them; after `2·n + 1`, `8·n` values
    follow, each in `bit_width` bits, the first in the lowest.

    Args:
        bit_width: 0 to 32.
        limit: the values are below it.
        marks: [limit], which of them are marked, or empty if none is.

    Returns:
        The number, or -1 if `data` does not hold so many values and nothing after them, or a value is not below the
        limit.
    """
    if not 0 <= bit_width <= 32:
        return -1
    width = np.uint64(bit_width)
    mask = (np.uint64(1) << width) - np.uint64(1)
    most = np.uint64(limit)
    some = len(marks) > 0
    position, left, found, end = 0, count, 0, 0
    while left > 0:
        header, shift = 0, 0
        while True:
            if position >= len(data) or shift >= _HEADER_BITS:
                return -1
            byte = np.int64(data[position])
            position += 1
            header |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        packed = header & 1
        # The last eight values may be cut short, and some of them are none.
        end = position + ((header >> 1) * bit_width if packed else (bit_width + 7) // 8)
        run = min((header >> 1) * (8 if packed else 1), left)
        stop = position + ((run * bit_width if packed else bit_width) + 7) // 8
        if run == 0 or stop > len(data):
            return -1
        buffer, bits = np.uint64(0), np.uint64(0)
        # Where all that the bits can say is right, and nothing marked, there is nothing to see.
        for _ in range(0 if mask < most and not some else run if packed else 1):
            while bits < width:
                buffer |= np.uint64(data[position]) << bits
                position += 1
                bits += np.uint64(8)
            value = buffer & mask
            buffer >>= width
            bits -= width
            if value >= most:
                return -1
            if some and marks[value]:
                found += 1 if packed else run
        position = stop
        left -= run
    return found if len(data) <= end else -1


@jit
def skip_levels(
    content: _Bytes, start: int, stop: int, num_values: int, level_encoding: int, defined: _Marks
) -> tuple[int, int]:
    """The first byte after the definition levels that a page of the first version, `content[start:stop]`, begins with,
    and how many of its `num_values` are not null; -1 for both if it does not hold such levels.
    """
    if stop - start < 4 or level_encoding != _RLE:
        return -1, -1
    size = np.int64(0)
    for place in range(4):
        size |= np.int64(content[start + place]) << (8 * place)
    first = start + 4
    if size > stop - first:
        return -1, -1
    count = scanned(content[first : first + size], 1, num_values, _NUM_LEVELS, defined)
    return (first + size, count) if count >= 0 else (-1, -1)


@jit
def count_indices(
    data: _Bytes,
    pages: npt.NDArray[np.int64],
    content: _Bytes,
    parts: npt.NDArray[np.int64],
    is_optional: bool,
    limit: int,
    marks: _Marks,
    defined: _Marks,
) -> tuple[int, int]:
    """Of pages of indices: how many are marked, and how many values are null.

    Args:
        data: the chunk.
        pages: [n, fields of `Page`].
        content: of all pages, not compressed; without the levels of pages of the second version.
        parts: [n, 2], where each begins and ends in it.
        is_optional: the column may hold nulls.
        limit, marks: as `scanned` takes them, of the dictionary.
        defined: `DEFINED`.

    Returns:
        -1 for the first if a page does not hold what its header says, or an index is not in the dictionary.
    """
    found = nulls = 0
    for number in range(len(pages)):
        page = pages[number]
        start, stop, count = parts[number, 0], parts[number, 1], page[_NUM_VALUES]
        if page[_KIND] == _SECOND:
            size = page[_DEFINITION]
            if page[_REPETITION] or (size > 0 and not is_optional):
                return -1, 0
            if is_optional:
                levels = data[page[_BODY] : page[_BODY] + size]
                count = scanned(levels, 1, count, _NUM_LEVELS, defined)
            if count != page[_NUM_VALUES] - page[_NUM_NULLS]:
                return -1, 0
        elif is_optional:
            start, count = skip_levels(content, start, stop, count, page[_LEVEL_ENCODING], defined)
        if count < 0:
            return -1, 0
        nulls += page[_NUM_VALUES] - count
        if count:
            if start >= stop:
                return -1, 0
            marked = scanned(content[start + 1 : stop], np.int64(content[start]), count, limit, marks)
            if marked < 0:
                return -1, 0
            found += marked
    return found, nulls
