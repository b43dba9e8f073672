"""Parquet's hybrid of runs and bit packing: marked values are counted without decoding all of them to an array.

Parquet encodes dictionary indices and levels like this. A header, which is a varint, precedes each part. After the
header `2·n`, one value follows that stands for `n` of them; after `2·n + 1`, `8·n` values follow, each in `bit_width`
bits, the first in the lowest.
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
        marks: [v], whether each of the values 0 to `v - 1` is marked.

    Returns:
        The number, or -1 if `data` does not hold so many values, or if a value is above `v - 1`.
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
