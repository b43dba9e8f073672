"""Stored pointers by position, bounds checked: the loops of a lookup that wants pointers and nothing else.

A map is far larger than any cache, so a loop is as fast as the cache lines that it keeps on their way. Every loop
returns the index of the first position that is outside `0..n - 1`, or -1; for such a position it reads nothing and
writes zero. `torchrec_cce.kernels.packed.as_packed` makes the words.
"""

import numpy as np
import numpy.typing as npt

from torchrec_cce.jit import jit
from torchrec_cce.kernels.prefetch import prefetch

# The distance from the prefetch of a word to its load: more than memory can have on its way, so that it never runs dry,
# and small enough that the lines are still in the nearest cache when the loop arrives.
_AHEAD = 96
_LINE_BYTES = 64


@jit
def gather_words(
    words: npt.NDArray[np.unsignedinteger], positions: npt.NDArray[np.int64], out: npt.NDArray[np.unsignedinteger]
) -> int:
    """`out[i] = words[positions[i]]`. `words: [n]` and `out: [N]` of the same unsigned dtype, `positions: [N]`."""
    count = len(positions)
    assert len(out) == count
    limit = np.uint64(len(words))
    bad = -1
    main = max(count - _AHEAD, 0)
    # The last positions have no successor to prefetch: they prefetch themselves, which costs less than a condition.
    for start, stop, ahead in ((0, main, _AHEAD), (main, count, 0)):
        for i in range(start, stop):
            prefetch(words, positions[i + ahead])
            x = np.uint64(positions[i])
            if x < limit:  # a negative number is a huge unsigned one
                out[i] = words[x]
            else:
                out[i] = 0
                if bad < 0:
                    bad = i
    return bad


@jit
def gather_rows(
    rows: npt.NDArray[np.unsignedinteger], positions: npt.NDArray[np.int64], out: npt.NDArray[np.unsignedinteger]
) -> int:
    """`out[i] = rows[positions[i]]`. `rows: [n, w]`, C-contiguous, of any unsigned dtype; `positions: [N]`.

    `out: [N, w]`, of the dtype of `rows`. Every cache line of a row is prefetched: a row that lies on two lines would
    otherwise wait for the second.
    """
    count = len(positions)
    width = rows.shape[1]
    assert out.shape == (count, width)
    limit = np.uint64(len(rows))
    flat = rows.reshape(-1)
    line = _LINE_BYTES // rows.itemsize
    bad = -1
    main = max(count - _AHEAD, 0)
    for start, stop, ahead in ((0, main, _AHEAD), (main, count, 0)):
        for i in range(start, stop):
            first = positions[i + ahead] * width
            for j in range(0, width, line):
                prefetch(flat, first + j)
            prefetch(flat, first + width - 1)
            x = np.uint64(positions[i])
            if x < limit:
                for j in range(width):
                    out[i, j] = rows[x, j]
            else:
                for j in range(width):
                    out[i, j] = 0
                if bad < 0:
                    bad = i
    return bad
