"""Raw IDs to index pointers within the pages of a Parquet column chunk, without decoding its rows.

A pointer depends on its ID alone. Where a chunk holds a dictionary and indices into it, as most writers make them, only
the dictionary's IDs are looked up, and the pages of indices and of nulls stay as they are. Pages of plain IDs are
looked up one by one. `parquet.thrift` of the Apache Parquet format has the meaning of the numbers here.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_cce.jobs.remap.parquet.chunks import Chunk
from torchrec_cce.jobs.remap.parquet.thrift import BINARY, STRUCT, Struct, i32, i64, items, read_struct, write_struct
from torchrec_cce.jobs.remap.remapper import FeatureMap, Unseen, Words
from torchrec_cce.kernels.parquet_hybrid import count_marked

CODECS = {0: None, 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
"""Parquet's number → pyarrow's name. The deprecated LZ4 (5) and LZO (3) are left to pyarrow's reader."""

PLAIN, RLE, BIT_PACKED, DICTIONARIES = 0, 3, 4, (2, 8)
INT32, INT64 = 1, 2

_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_PAGE, _PAGE_V2 = 5, 8
"""Fields of a page's header that tell more of it."""


class CannotRewrite(Exception):
    """The pages are not of a kind that is rewritten here, or hold an ID that the map does not know: decode the rows."""


@dataclass(kw_only=True)
class _Column:
    """A new column chunk, as it grows."""

    parts: list[bytes | memoryview | pa.Buffer] = field(default_factory=list)
    dictionary_at: int | None = None
    data_at: int | None = None
    size: int = 0
    uncompressed: int = 0

    def page(self, header: bytes, body: "bytes | memoryview | pa.Buffer", uncompressed: int) -> None:
        self.parts += [header, body]
        self.size += len(header) + len(body)
        self.uncompressed += len(header) + uncompressed


def rewrite_chunk(
    data: bytes,
    meta: Struct,
    features: Sequence[FeatureMap],
    *,
    unsigned: bool,
    optional: bool,
    compression: str | None,
) -> tuple[list[Chunk], Unseen]:
    """The chunks of the new columns of `features`, and how many IDs of the rows their maps do not know.

    Args:
        data: the bytes of the chunk.
        meta: its `ColumnMetaData`.
        unsigned: 32-bit values are.
        optional: the column may have nulls.
        compression: pyarrow's name of the codec to write, None for no compression.

    Raises:
        CannotRewrite
    """
    recode = _Recoder(CODECS[meta[4].value], compression)
    dtype = {INT32: np.dtype("<u4" if unsigned else "<i4"), INT64: np.dtype("<i8")}[meta[1].value]
    names = [name for one in features for name in one.columns]
    columns = [_Column() for _ in names]
    unseen: Unseen = Counter()
    marks: dict[str, npt.NDArray[np.bool_]] = {}  # entries of the dictionary that are unseen

    def look_up(values: memoryview) -> tuple[Words, dict[str, npt.NDArray[np.bool_]]]:
        ids = np.frombuffer(values, dtype).astype(np.int64, copy=False)
        found = [one.find(ids) for one in features]
        if any(one.bad >= 0 for one in found):
            raise CannotRewrite
        marked = {one.key: each.unseen for one, each in zip(features, found, strict=True) if each.unseen is not None}
        return [word for one in found for word in one.words], marked

    position, values_left = 0, meta[5].value
    while values_left > 0:
        head, start = read_struct(data, position)
        kind, size = head[1].value, head[3].value
        body = memoryview(data)[start : start + size]
        position = start + size
        if kind == _DICTIONARY_PAGE:
            words, marks = look_up(recode.unpacked(body, head[2].value))
            for column, word in zip(columns, words, strict=True):
                column.dictionary_at = column.size
                _add(column, head, b"", recode, word)
            continue
        if kind not in (_DATA_PAGE, _DATA_PAGE_V2):
            continue
        number = _PAGE if kind == _DATA_PAGE else _PAGE_V2
        page: Struct = head[number].value
        values_left -= page[1].value
        encoding = page[2 if kind == _DATA_PAGE else 4].value
        page.pop(5 if kind == _DATA_PAGE else 8, None)  # statistics of raw IDs
        for column in columns:
            column.data_at = column.size if column.data_at is None else column.data_at
        if encoding in DICTIONARIES:
            if kind == _DATA_PAGE_V2 and recode.changes:
                raise CannotRewrite
            for key, marked in marks.items():
                unseen[key] += _count_marked(head, body, recode, marked, optional=optional)
            packed = recode.again(body, head[2].value)
            header = write_struct({1: head[1], 2: head[2], 3: i32(len(packed)), number: head[number]})
            for column in columns:
                column.page(header, packed, head[2].value)
        elif encoding == PLAIN and kind == _DATA_PAGE and (not optional or page[3].value == RLE):
            raw = recode.unpacked(body, head[2].value)
            levels = 4 + int.from_bytes(raw[:4], "little") if optional else 0
            words, plain_marks = look_up(raw[levels:])
            unseen.update({key: int(np.count_nonzero(marked)) for key, marked in plain_marks.items()})
            for column, word in zip(columns, words, strict=True):
                _add(column, head, raw[:levels], recode, word)
        else:
            raise CannotRewrite
    chunks = [
        Chunk(parts=column.parts, entry=_entry(column, meta, name, compression))
        for column, name in zip(columns, names, strict=True)
    ]
    return chunks, unseen


class _Recoder:
    """From the codec of a chunk to that of the new one."""

    def __init__(self, old: str | None, new: str | None) -> None:
        self.changes = old != new
        self._old = None if old is None else pa.Codec(old)
        self._new = None if new is None else pa.Codec(new)

    def unpacked(self, body: memoryview, size: int) -> memoryview:
        return body if self._old is None else memoryview(self._old.decompress(body, size))

    def packed(self, content: bytes | memoryview) -> bytes | memoryview | pa.Buffer:
        return content if self._new is None else self._new.compress(content)

    def again(self, body: memoryview, size: int) -> bytes | memoryview | pa.Buffer:
        return self.packed(self.unpacked(body, size)) if self.changes else body


def _count_marked(
    head: Struct, body: memoryview, recode: _Recoder, marks: npt.NDArray[np.bool_], *, optional: bool
) -> int:
    """How many indices of a page point at marked entries of the dictionary."""
    if _PAGE_V2 in head:
        page = head[_PAGE_V2].value
        levels = page[5].value + page[6].value
        is_packed = page[7].value if 7 in page else True
        content = recode.unpacked(body[levels:], head[2].value - levels) if is_packed else body[levels:]
        count = page[1].value - page[2].value
    else:
        page = head[_PAGE].value
        content, count = recode.unpacked(body, head[2].value), page[1].value
        if optional:
            if page[3].value != RLE:
                raise CannotRewrite
            levels = 4 + int.from_bytes(content[:4], "little")
            count = count_marked(np.frombuffer(content[4:levels], np.uint8), 1, count, np.array([False, True]))
            content = content[levels:]
    if count == 0:
        return 0
    found = count_marked(np.frombuffer(content[1:], np.uint8), content[0], count, marks)
    if found < 0:
        raise CannotRewrite
    return found


def _add(
    column: _Column, head: Struct, levels: bytes | memoryview, recode: _Recoder, word: npt.NDArray[np.uint64]
) -> None:
    """Add a page of plain words to a column: a dictionary, or levels and values."""
    values = word.astype("<u8", copy=False).data.cast("B")
    content = b"".join((levels, values)) if len(levels) else values
    body = recode.packed(content)
    number = next(one for one in (5, 7) if one in head)
    header = {1: head[1], 2: i32(len(content)), 3: i32(len(body)), number: head[number]}
    column.page(write_struct(header), body, len(content))


def _entry(column: _Column, meta: Struct, name: str, compression: str | None) -> Struct:
    """`ColumnChunk` of a new column: what is known of the old one and still true."""
    nulls = meta[12].value.get(3) if 12 in meta else None
    new: Struct = {
        1: i32(INT64),
        2: meta[2],
        3: items(BINARY, [name.encode()]),
        4: i32(next(number for number, codec in CODECS.items() if codec == compression)),
        5: meta[5],
        6: i64(column.uncompressed),
        7: i64(column.size),
        9: i64(column.data_at or 0),
    }
    if column.dictionary_at is not None:
        new[11] = i64(column.dictionary_at)
    if nulls is not None:
        new[12] = meta[12]._replace(value={3: nulls})
    if 13 in meta:
        new[13] = meta[13]
    return {2: i64(0), 3: meta[1]._replace(kind=STRUCT, value=new)}
