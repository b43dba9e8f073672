"""From raw IDs to the rows of a physical table, bounds checked: the loops of the remap.

Every loop writes `out[j, i, p]`, the row of term `p` of column `j` of ID `i`. Loops that know which IDs there are
return the index of the first ID that is outside `0..num_ids - 1`, or -1. IDs after it are still written, as rows inside
the table's bounds or as zero, so that nothing can be read out of range.
"""

import numpy as np
import numpy.typing as npt

from torchrec_cce.hashing import hash_one
from torchrec_cce.jit import jit, prefetch

# The number of IDs from the prefetch of pointers to their load. On a map of 1e8 IDs and 4 columns, `clustered_rows`
# takes 20.3 ns per ID at a distance of 8, 13.8 at 16, 10.0 at 32 and 9.7 at 64 (Zen 5).
_AHEAD = 64


@jit
def code_at(pointers: npt.NDArray[np.unsignedinteger], row: np.uint64, column: int, nibbles: bool) -> np.int64:
    """A code among `pointers: [n, c]`; with `nibbles`, `[n, ⌈c/2⌉]` uint8, two codes each, as `PointerFormat` says."""
    code: np.int64
    if nibbles:
        code = np.int64((pointers[row, column >> 1] >> ((column & 1) << 2)) & 15)
    else:
        code = np.int64(pointers[row, column])
    return code


@jit
def identity_rows(ids: npt.NDArray[np.int64], num_ids: int, out: npt.NDArray[np.int64]) -> int:
    """Rows of a full table: the IDs themselves. `ids: [N]`, `out: [1, N, 1]`."""
    bad = -1
    limit = np.uint64(num_ids)
    for i in range(len(ids)):
        inside = np.uint64(ids[i]) < limit  # a negative number is a huge unsigned one
        out[0, i, 0] = ids[i] if inside else 0
        if not inside and bad < 0:
            bad = i
    return bad


@jit
def hashed_rows(
    ids: npt.NDArray[np.int64],
    num_ids: int,
    multipliers: npt.NDArray[np.uint64],
    offsets: npt.NDArray[np.uint64],
    num_rows: int,
    out: npt.NDArray[np.int64],
) -> int:
    """Rows chosen by hashes only. `ids: [N]`, `multipliers, offsets: [c·t]` with term fastest, `out: [c, N, t]`."""
    num_columns, count, num_terms = out.shape
    bad = -1
    limit = np.uint64(num_ids)
    k = np.uint64(num_rows)
    for i in range(count):
        x = np.uint64(ids[i])
        if x >= limit and bad < 0:
            bad = i
        for j in range(num_columns):
            for p in range(num_terms):
                f = j * num_terms + p
                out[j, i, p] = f * num_rows + np.int64(hash_one(x, multipliers[f], offsets[f], k))
    return bad


@jit
def clustered_rows(
    ids: npt.NDArray[np.int64],
    pointers: npt.NDArray[np.unsignedinteger],
    multipliers: npt.NDArray[np.uint64],
    offsets: npt.NDArray[np.uint64],
    num_rows: int,
    out: npt.NDArray[np.int64],
    nibbles: bool = False,
) -> int:
    """Codebook rows by pointers, helper rows by hashes. `pointers` as for `code_at`, `multipliers: [c]`.

    `out: [c, N, 2]`, or `[c, N, 1]` for the codebook rows alone.
    """
    num_columns, count, num_terms = out.shape
    bad = -1
    limit = np.uint64(len(pointers))
    k = np.uint64(num_rows)
    for i in range(count):
        if i + _AHEAD < count:
            prefetch(pointers, ids[i + _AHEAD])
        x = np.uint64(ids[i])
        inside = x < limit
        if not inside and bad < 0:
            bad = i
        at = x if inside else np.uint64(0)
        for j in range(num_columns):
            out[j, i, 0] = 2 * j * num_rows + code_at(pointers, at, j, nibbles)
            if num_terms > 1:
                out[j, i, 1] = (2 * j + 1) * num_rows + np.int64(hash_one(x, multipliers[j], offsets[j], k))
    return bad


@jit
def partly_clustered_rows(
    ids: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    pointers: npt.NDArray[np.unsignedinteger],
    codebook_multipliers: npt.NDArray[np.uint64],
    codebook_offsets: npt.NDArray[np.uint64],
    helper_multipliers: npt.NDArray[np.uint64],
    helper_offsets: npt.NDArray[np.uint64],
    num_rows: int,
    out: npt.NDArray[np.int64],
    nibbles: bool = False,
) -> None:
    """Codebook rows by the pointers at `positions: [N]`, or by a hash of the ID where the position is not in the map.

    `pointers` as for `code_at`. `out: [c, N, 2]`, or `[c, N, 1]` for the codebook rows alone.
    """
    num_columns, count, num_terms = out.shape
    limit = np.uint64(len(pointers))
    k = np.uint64(num_rows)
    for i in range(count):
        if i + _AHEAD < count:
            prefetch(pointers, positions[i + _AHEAD])
        x = np.uint64(ids[i])
        at = np.uint64(positions[i])
        inside = at < limit
        for j in range(num_columns):
            if inside:
                code = code_at(pointers, at, j, nibbles)
            else:
                code = np.int64(hash_one(x, codebook_multipliers[j], codebook_offsets[j], k))
            out[j, i, 0] = 2 * j * num_rows + code
            if num_terms > 1:
                helper = np.int64(hash_one(x, helper_multipliers[j], helper_offsets[j], k))
                out[j, i, 1] = (2 * j + 1) * num_rows + helper


@jit
def coded_rows(
    codes: npt.NDArray[np.unsignedinteger],
    num_rows: int,
    term: int,
    out: npt.NDArray[np.int64],
    nibbles: bool = False,
) -> None:
    """Rows of one term of a table with two terms a column, by codes that are given: `out[j, i, term]`.

    `codes: [N, ≥ c]`, or as many of 4 bits, see `code_at`, all below `num_rows`; columns from `c` on are left out.
    `out: [c, N, 2]`, or `[c, N, 1]` for the codebook rows alone.
    """
    num_columns, count, _ = out.shape
    for i in range(count):
        for j in range(num_columns):
            out[j, i, term] = (2 * j + term) * num_rows + code_at(codes, np.uint64(i), j, nibbles)


@jit
def helper_rows(
    ids: npt.NDArray[np.int64],
    multipliers: npt.NDArray[np.uint64],
    offsets: npt.NDArray[np.uint64],
    num_rows: int,
    out: npt.NDArray[np.int64],
) -> None:
    """The helper rows of `ids: [N]` by hashes, `out[j, i, 1]`. `multipliers, offsets: [c]`, `out: [c, N, 2]`."""
    num_columns, count, _ = out.shape
    k = np.uint64(num_rows)
    for i in range(count):
        x = np.uint64(ids[i])
        for j in range(num_columns):
            out[j, i, 1] = (2 * j + 1) * num_rows + np.int64(hash_one(x, multipliers[j], offsets[j], k))
