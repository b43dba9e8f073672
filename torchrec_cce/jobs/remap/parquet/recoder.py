"""From the codec of a raw column chunk to that of the new one."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_cce.jit import jit
from torchrec_cce.jobs.remap.parquet.header import Page

Bytes: TypeAlias = bytes | memoryview | pa.Buffer

_BODY, _UNCOMPRESSED, _DEFINITION, _REPETITION, _IS_COMPRESSED = map(
    Page._fields.index, ("body", "uncompressed_size", "definition_bytes", "repetition_bytes", "is_compressed")
)
_STOP = Page._fields.index("stop")


class Recoder:
    """Unpacks the pages of a chunk, and packs new ones.

    Args:
        data: the chunk.
        old, new: pyarrow's names of codecs, or None.
    """

    def __init__(self, data: bytes, old: str | None, new: str | None) -> None:
        self.changes = old != new
        self._data, self._array = memoryview(data), np.frombuffer(data, np.uint8)
        self._is_zstd = old == "zstd"
        self._old = None if old is None else pa.Codec(old)
        self._new = None if new is None else pa.Codec(new)

    def unpacked(self, page: Page) -> memoryview:
        """The content of a page; of one of the second version, the part after its levels."""
        levels = page.definition_bytes + page.repetition_bytes
        body = self._data[page.body + levels : page.stop]
        if self._old is None or not page.is_compressed:
            return body
        return memoryview(self._old.decompress(body, page.uncompressed_size - levels))

    def all_unpacked(
        self, pages: Sequence[Page], table: npt.NDArray[np.int64]
    ) -> tuple[memoryview, npt.NDArray[np.int64]]:
        """The contents of some pages together, and where each begins and ends in them: [n, 2].

        Args:
            table: the same pages, [n, fields of `Page`].
        """
        levels = table[:, _DEFINITION] + table[:, _REPETITION]
        if self._old is None:
            return self._data, np.stack([table[:, _BODY] + levels, table[:, _STOP]], axis=1)
        if len(pages) > 1 and self._is_zstd and are_frames(self._array, table):
            # A call for many pages takes less time than one for each: Zstandard's frames may follow each other, and
            # each of these says that it has the bytes of its page.
            bodies = b"".join([self._data[page.body : page.stop] for page in pages])
            stops = np.cumsum(table[:, _UNCOMPRESSED])
            content = memoryview(self._old.decompress(bodies, int(stops[-1])))
            starts = stops - table[:, _UNCOMPRESSED]
        else:
            parts = [self.unpacked(page) for page in pages]
            content = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
            sizes = np.array([len(part) for part in parts])
            stops = np.cumsum(sizes)
            starts = stops - sizes
        return content, np.stack([starts, stops], axis=1)

    def packed(self, content: bytes | memoryview) -> Bytes:
        """The body of a new page."""
        return content if self._new is None else self._new.compress(content)


@jit
def are_frames(data: npt.NDArray[np.uint8], pages: npt.NDArray[np.int64]) -> bool:
    """Whether each of some pages of the chunk `data` begins with the head of a Zstandard frame (RFC 8878, 3.1.1.1) that
    has as many bytes as the page, and is compressed as a whole.
    """
    for number in range(len(pages)):
        page = pages[number]
        at = page[_BODY]
        if page[_DEFINITION] or page[_REPETITION] or not page[_IS_COMPRESSED] or page[_STOP] - at < 18:
            return False
        if data[at] != 0x28 or data[at + 1] != 0xB5 or data[at + 2] != 0x2F or data[at + 3] != 0xFD:
            return False
        described = np.int64(data[at + 4])
        is_single, kind = described >> 5 & 1, described >> 6
        num_bytes = 1 << kind if kind or is_single else 0
        if num_bytes == 0 or described & 3:  # does not say its size, or needs a dictionary
            return False
        at += 5 if is_single else 6
        size = np.int64(256 if kind == 1 else 0)
        for place in range(num_bytes):
            size += np.int64(data[at + place]) << (8 * place)
        if size != page[_UNCOMPRESSED]:
            return False
    return True
