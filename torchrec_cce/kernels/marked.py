"""Values of Parquet's hybrid of runs and bit packing, counted where they are marked, without decoding them to an array.

Dictionary indices and levels are encoded so. A header, a varint, precedes each part: `2·n`, and the value follows once
for `n` of them; or `2·n + 1`, and `8·n` values follow, each in `bit_width` bits, the first in the lowest.
"""

import numpy as np
import numpy.typing as npt

from torchrec_cce.jit import jit

_HEADER_BITS = 35


@jit
def count_marked(data: npt.NDArray[np.uint8], bit_width: int, count: int, marks: npt.NDArray[np.bool_]) -> int:
    """How many of the first `count` values in `data` are marked.

    Args:
        bit_width: 0 to 32.
        marks: [v], one for each value from 0 on.

    Returns:
        The number, or -1 if `data` cannot be of so many values, or one is beyond `v - 1`.
    """
    if not 0 <= bit_width <= 32:
        return -1
    width = np.uint64(bit_width)
    mask = (np.uint64(1) << width) - np.uint64(1)
    limit = np.uint64(len(marks))
    position, left, found = 0, count, 0
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
        run = min((header >> 1) * (8 if packed else 1), left)
        stop = position + ((run * bit_width if packed else bit_width) + 7) // 8
        if run == 0 or stop > len(data):
            return -1
        buffer, bits = np.uint64(0), np.uint64(0)
        for _ in range(run if packed else 1):
            while bits < width:
                buffer |= np.uint64(data[position]) << bits
                position += 1
                bits += np.uint64(8)
            value = buffer & mask
            buffer >>= width
            bits -= width
            if value >= limit:
                return -1
            if marks[value]:
                found += 1 if packed else run
        position = stop
        left -= run
    return found


def reference_count(data: bytes, bit_width: int, count: int, marks: npt.NDArray[np.bool_]) -> int:
    """What `count_marked` returns for data that are whole."""
    values: list[int] = []
    position = 0
    while len(values) < count:
        header = shift = 0
        while True:
            header |= (data[position] & 127) << shift
            shift += 7
            position += 1
            if data[position - 1] < 128:
                break
        size = header // 2 * bit_width if header % 2 else (bit_width + 7) // 8
        number = int.from_bytes(data[position : position + size], "little")
        position += size
        if header % 2:
            values += [number >> bit_width * i & (1 << bit_width) - 1 for i in range(header // 2 * 8)]
        else:
            values += [number & (1 << bit_width) - 1] * (header // 2)
    return int(np.count_nonzero(marks[values[:count]]))
