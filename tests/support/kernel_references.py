"""Plain references of the compiled loops: the same in numpy or exact integers, as short as it can be said."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from torchrec_cce.hashing import FACTORS, SHIFT, UniversalHash
from torchrec_cce.kernels.hash_table import BUCKET

_MASK_64 = 2**64 - 1


def reference_nearest(
    points: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The nearest centroids by brute force in float64: codes [N], squared distances [N]. Needs `N·k·d` doubles."""
    gaps = points.astype(np.float64)[:, None, :] - centroids.astype(np.float64)
    distances = np.einsum("nkd,nkd->nk", gaps, gaps)
    codes = distances.argmin(axis=1)
    return codes, distances[np.arange(len(points)), codes]


def reference_distances(points: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[N, k] squared distances, rounded as `NearestCentroid` rounds them: `total = fma(gap, gap, total)` in float32."""
    total = np.zeros((len(points), len(centroids)), np.float32)
    for x, y in zip(points.T, centroids.T, strict=True):
        gap = x[:, None] - y
        total = reference_fma(gap, gap, total)
    return total


def reference_fma(
    left: npt.NDArray[np.float32], right: npt.NDArray[np.float32], total: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """`left·right + total` with one rounding, of finite numbers whose sum is finite.

    The product is exact in float64. Of the two float64 beside an inexact sum, the odd one is rounded to float32.
    """
    product, addend = left.astype(np.float64) * right, total.astype(np.float64)
    sums = product + addend
    back = sums - product
    error = (product - (sums - back)) + (addend - back)
    even = sums.view(np.int64) % 2 == 0
    odd = np.where((error != 0) & even, np.nextafter(sums, np.copysign(np.inf, error)), sums)
    return odd.astype(np.float32)


def reference_gather(
    words: npt.NDArray[np.unsignedinteger], ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.unsignedinteger], int]:
    """What `gather_words` (`words: [n]`) and `gather_rows` (`words: [n, w]`) write, and what they return."""
    inside = (ids >= 0) & (ids < len(words))
    out = np.zeros((len(ids), *words.shape[1:]), words.dtype)
    out[inside] = words[ids[inside]]
    return out, -1 if inside.all() else int(inside.argmin())


def reference_packed_hashes(
    ids: npt.NDArray[np.int64], functions: UniversalHash, code_bits: int
) -> npt.NDArray[np.uint64]:
    """`packed_hashes` in numpy: [w, N]."""
    codes = functions.numpy(ids).astype(np.uint64)
    per_word = 64 // code_bits
    out = np.zeros((-(-functions.num_columns // per_word), len(ids)), np.uint64)
    for j in range(functions.num_columns):
        out[j // per_word] |= codes[:, j] << np.uint64(j % per_word * code_bits)
    return out


def reference_coded_rows(terms: Sequence[npt.NDArray[np.integer]], num_rows: int) -> npt.NDArray[np.int64]:
    """[c, N, t] int64: what `coded_rows` and `helper_rows` write, from the `[N, c]` codes of codebook and helper."""
    both = np.stack([codes.T.astype(np.int64) for codes in terms], axis=2)
    blocks = 2 * np.arange(len(both))[:, None, None] + np.arange(len(terms))
    rows: npt.NDArray[np.int64] = both + blocks * num_rows
    return rows


def reference_partly_clustered_rows(
    ids: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    pointers: npt.NDArray[np.unsignedinteger],
    codebook_hash: UniversalHash,
    helper_hash: UniversalHash,
) -> npt.NDArray[np.int64]:
    """`partly_clustered_rows` in numpy: [c, N, 2] int64."""
    codes = codebook_hash.numpy(ids)
    known = positions >= 0
    codes[known] = pointers[positions[known]]
    both = np.stack([codes.T, helper_hash.numpy(ids).T], axis=2)  # [c, N, 2]
    blocks = np.arange(2 * len(both)).reshape(-1, 1, 2)
    rows: npt.NDArray[np.int64] = both + blocks * helper_hash.num_rows
    return rows


def reference_rows(
    ids: npt.NDArray[np.int64],
    pointers: npt.NDArray[np.unsignedinteger] | None,
    hashes: UniversalHash,
    num_terms: int,
) -> npt.NDArray[np.int64]:
    """What `hashed_rows` (`pointers=None`) and `clustered_rows` write for valid IDs. Returns `[c, N, t] int64`."""
    codes = hashes.numpy(ids).T  # [functions, N]
    if pointers is not None:
        codes = np.stack([pointers[ids].T.astype(np.int64), codes], axis=1).reshape(2 * len(codes), len(ids))
    rows = codes + np.arange(len(codes))[:, None] * hashes.num_rows
    return np.ascontiguousarray(rows.reshape(len(rows) // num_terms, num_terms, len(ids)).transpose(0, 2, 1))


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


def reference_hash(key: int, seed: int) -> int:
    """What `mix` returns, in exact integers."""
    x = (key ^ seed) & _MASK_64
    for factor in FACTORS:
        x = ((x ^ (x >> SHIFT)) * factor) & _MASK_64
    return x ^ (x >> SHIFT)


def reference_slots(keys: list[int], num_buckets: int, seed: int) -> list[tuple[int, int]]:
    """The table in which key `keys[i]`, all different, has row `i`, as {key, row} of each slot."""
    slots: list[tuple[int, int]] = []
    for hashed, row in sorted((reference_hash(key, seed), row) for row, key in enumerate(keys)):
        slots += [(0, -1)] * (BUCKET * (hashed * num_buckets >> 64) - len(slots))
        slots.append((keys[row], row))
    return slots + [(0, -1)] * (BUCKET * max(num_buckets, len(slots) // BUCKET + 1) - len(slots))


def reference_positions(keys: list[int], slots: list[tuple[int, int]]) -> list[int]:
    """What `lookup_rows` writes."""
    rows = {key: row for key, row in slots if row >= 0}
    return [rows.get(key, -1) for key in keys]
