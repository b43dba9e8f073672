"""Stored pointers by raw ID, bounds checked: the loops of a lookup that wants the pointers and nothing else.

A map is far larger than any cache, so a loop is as fast as the cache lines it keeps on their way. Every loop returns
the index of the first ID that is not in `0..n - 1`, or -1; for such an ID it reads nothing and writes zero.
`reference_gather` says the same in plain numpy. `torchrec_cce.kernels.packed.as_packed` makes the words.
"""

import numpy as np
import numpy.typing as npt

from torchrec_cce.jit import jit
from torchrec_cce.kernels.prefetch import prefetch

# IDs between the prefetch of a word and its load: more than memory can have on its way, so that it never runs dry, and
# few enough that their lines are still in the nearest cache when the loop arrives.
_AHEAD = 96
_LINE_BYTES = 64


@jit
def gather_words(
    words: npt.NDArray[np.unsignedinteger], ids: npt.NDArray[np.int64], out: npt.NDArray[np.unsignedinteger]
) -> int:
    """`out[i] = words[ids[i]]`. `words: [n]` of any unsigned dtype, `ids: [N]`, `out: [N]` of the dtype of `words`."""
    count = len(ids)
    assert len(out) == count
    limit = np.uint64(len(words))
    bad = -1
    main = max(count - _AHEAD, 0)
    # The last IDs have no successor to prefetch: they name themselves, which costs less than asking at every ID.
    for start, stop, ahead in ((0, main, _AHEAD), (main, count, 0)):
        for i in range(start, stop):
            prefetch(words, ids[i + ahead])
            x = np.uint64(ids[i])
            if x < limit:  # a negative ID is a huge unsigned one
                out[i] = words[x]
            else:
                out[i] = 0
                if bad < 0:
                    bad = i
    return bad


@jit
def gather_rows(
    rows: npt.NDArray[np.unsignedinteger], ids: npt.NDArray[np.int64], out: npt.NDArray[np.unsignedinteger]
) -> int:
    """`out[i] = rows[ids[i]]`. `rows: [n, w]`, C-contiguous, of any unsigned dtype, `ids: [N]`, `out: [N, w]` alike.

    Every cache line of a row is prefetched: a row that straddles two would wait for the second.
    """
    count = len(ids)
    width = rows.shape[1]
    assert out.shape == (count, width)
    limit = np.uint64(len(rows))
    flat = rows.reshape(-1)
    line = _LINE_BYTES // rows.itemsize
    bad = -1
    main = max(count - _AHEAD, 0)
    for start, stop, ahead in ((0, main, _AHEAD), (main, count, 0)):
        for i in range(start, stop):
            first = ids[i + ahead] * width
            for j in range(0, width, line):
                prefetch(flat, first + j)
            prefetch(flat, first + width - 1)
            x = np.uint64(ids[i])
            if x < limit:
                for j in range(width):
                    out[i, j] = rows[x, j]
            else:
                for j in range(width):
                    out[i, j] = 0
                if bad < 0:
                    bad = i
    return bad


def reference_gather(
    words: npt.NDArray[np.unsignedinteger], ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.unsignedinteger], int]:
    """What `gather_words` (`words: [n]`) and `gather_rows` (`words: [n, w]`) write, and what they return."""
    inside = (ids >= 0) & (ids < len(words))
    out = np.zeros((len(ids), *words.shape[1:]), words.dtype)
    out[inside] = words[ids[inside]]
    return out, -1 if inside.all() else int(inside.argmin())
