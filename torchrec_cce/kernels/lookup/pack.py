"""From raw IDs to the words of a lookup: the codes of all features of a batch, in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from torchrec_cce.hashing import UniversalHash
from torchrec_cce.jit import jit
from torchrec_cce.kernels.lookup.vectors import load_byte, load_word, prefetch_at
from torchrec_cce.kernels.packed import num_words, packed_hashes

Words = npt.NDArray[np.uint64]

# IDs from the prefetch of pointers to their load, see `kernels.rows`.
_AHEAD = 64
_WORD_BYTES = 8

# Of a line that describes how a feature's IDs become codes.
_SOURCE, _WORD, _LAST_ID, _POINTERS, _ROW_BYTES, _STORED_WORDS, _TERM_WORDS, _HASH, _NUM_HASHES, _COLUMNS = range(10)
_BITS, _ROWS = 10, 11
_NUM_FIELDS = 12


@dataclass(frozen=True, kw_only=True)
class Codes:
    """How the IDs of a feature become codes: one term by stored pointers, others by hashes; without both, they are the
    codes."""

    source: int
    """Which feature of the input the IDs are of."""
    first_word: int
    bits: int
    """Of a code."""
    num_ids: int | None
    """IDs are `0 … num_ids − 1`; None: any."""
    pointers: npt.NDArray[np.unsignedinteger] | None = None
    """[n, …], C-contiguous: the first term's codes of each ID, packed in bytes as in words."""
    hashes: Sequence[UniversalHash] = ()
    """Of the terms that follow."""


@dataclass(frozen=True, eq=False)
class Packer:
    """Packs the IDs of several features."""

    features: Sequence[Codes]
    lines: Words = field(init=False)
    """[features, 12]."""
    multipliers: Words = field(init=False)
    """Of all hashes, side by side."""
    offsets: Words = field(init=False)

    def __post_init__(self) -> None:
        functions = [each for feature in self.features for each in feature.hashes]
        nothing = np.empty(0, np.uint64)
        before = np.cumsum([0, *(each.num_columns for each in functions)])
        lines, number = [], 0
        for feature in self.features:
            lines.append(_line(feature, int(before[number])))
            number += len(feature.hashes)
        object.__setattr__(self, "lines", np.array(lines, np.uint64).reshape(-1, _NUM_FIELDS))
        object.__setattr__(self, "multipliers", np.concatenate([nothing, *(each.multipliers for each in functions)]))
        object.__setattr__(self, "offsets", np.concatenate([nothing, *(each.offsets for each in functions)]))

    def pack(
        self, ids: npt.NDArray[np.integer], bounds: npt.NDArray[np.int64], words: Words, first: int, last: int
    ) -> tuple[int, int]:
        """Write the words of features `first … last − 1`.

        Args:
            ids: [N] int32 or int64, of all sources, one after the other.
            bounds: [sources + 1]: where in `N` each begins.
            words: [W, N], written to.

        Returns:
            The number of the first feature that has an ID outside its table, and which of its IDs is the first such;
            (-1, -1) if there is none. If there is one, none of its words may be used.
        """
        return pack_features(self.lines, self.multipliers, self.offsets, ids, bounds, words, first, last)


def _line(feature: Codes, hash_at: int) -> list[int]:
    pointers, hashes = feature.pointers, feature.hashes
    row_bytes = 0 if pointers is None else pointers[:1].nbytes
    columns = hashes[0].num_columns if hashes else 0
    return [
        feature.source,
        feature.first_word,
        2**64 - 1 if feature.num_ids is None else feature.num_ids - 1,
        0 if pointers is None else pointers.ctypes.data,
        row_bytes,
        -(-row_bytes // _WORD_BYTES),
        num_words(columns, feature.bits),
        hash_at,
        len(hashes),
        columns,
        feature.bits,
        hashes[0].num_rows if hashes else 0,
    ]


@jit
def _word_at(address: np.uint64, num_bytes: np.uint64) -> np.uint64:
    """So many bytes at an address, at most eight count, the first in the lowest bits."""
    if num_bytes >= np.uint64(_WORD_BYTES):
        word: np.uint64 = load_word(address)
    else:
        word = np.uint64(0)
        for byte in range(num_bytes):
            word |= load_byte(address + byte) << (byte << np.uint64(3))
    return word


@jit
def _gather(
    ids: npt.NDArray[np.integer], pointers: np.uint64, row_bytes: np.uint64, last_id: np.uint64, out: Words
) -> int:
    """Rows of so many bytes at an address, as words `out: [w, N]`. Returns the index of the first ID that has none."""
    bad = -1
    count, word_bytes = len(ids), np.uint64(_WORD_BYTES)
    main = max(count - _AHEAD, 0)
    # The last IDs have no successor to prefetch: they prefetch themselves.
    for start, stop, ahead in ((0, main, _AHEAD), (main, count, 0)):
        for i in range(start, stop):
            prefetch_at(pointers + np.uint64(ids[i + ahead]) * row_bytes)
            x = np.uint64(ids[i])
            if x > last_id:  # a negative number is a huge unsigned one
                x = np.uint64(0)
                bad = i if bad < 0 else bad
            row = pointers + x * row_bytes
            if row_bytes == word_bytes:
                out[0, i] = load_word(row)
            else:
                for word in range(np.uint64(len(out))):
                    done = word * word_bytes
                    out[word, i] = _word_at(row + done, row_bytes - done)
    return bad


@jit
def _copy(ids: npt.NDArray[np.integer], last_id: np.uint64, out: Words) -> int:
    """IDs that are their own codes. Returns the index of the first that is above `last_id`."""
    bad = -1
    for i in range(len(ids)):
        inside = np.uint64(ids[i]) <= last_id
        out[i] = np.uint64(ids[i]) if inside else np.uint64(0)
        if not inside and bad < 0:
            bad = i
    return bad


@jit
def _first_outside(ids: npt.NDArray[np.integer], last_id: np.uint64) -> int:
    """The index of the first ID that is above `last_id`, or -1."""
    for i in range(len(ids)):
        if np.uint64(ids[i]) > last_id:
            return i
    return -1


@jit
def pack_features(
    lines: Words,
    multipliers: Words,
    offsets: Words,
    ids: npt.NDArray[np.integer],
    bounds: npt.NDArray[np.int64],
    words: Words,
    first: int,
    last: int,
) -> tuple[int, int]:
    """See `Packer.pack`."""
    bad, bad_at = -1, -1
    for number in range(first, last):
        line = lines[number]
        start, stop = bounds[line[_SOURCE]], bounds[line[_SOURCE] + np.uint64(1)]
        mine, word = ids[start:stop], np.int64(line[_WORD])
        outside = np.int64(-1)
        if line[_POINTERS] != 0:
            num_stored = np.int64(line[_STORED_WORDS])
            outside = _gather(
                mine, line[_POINTERS], line[_ROW_BYTES], line[_LAST_ID], words[word : word + num_stored, start:stop]
            )
            word += num_stored
        elif line[_NUM_HASHES] == 0:
            outside = _copy(mine, line[_LAST_ID], words[word, start:stop])
        else:
            outside = _first_outside(mine, line[_LAST_ID])
        for term in range(np.int64(line[_NUM_HASHES])):
            functions = slice(
                np.int64(line[_HASH]) + term * np.int64(line[_COLUMNS]),
                np.int64(line[_HASH]) + (term + 1) * np.int64(line[_COLUMNS]),
            )
            after = word + np.int64(line[_TERM_WORDS])
            packed_hashes(
                mine,
                multipliers[functions],
                offsets[functions],
                np.int64(line[_ROWS]),
                np.int64(line[_BITS]),
                words[word:after, start:stop],
            )
            word = after
        if outside >= 0 and bad < 0:
            bad, bad_at = number, outside
    return bad, bad_at


@jit
def largest_code(words: Words, shift: np.uint64, mask: np.uint64) -> np.uint64:
    """Of the codes at one place of `words: [N]`; 0 if there are none."""
    largest: np.uint64 = np.uint64(0)
    for i in range(len(words)):
        code: np.uint64 = (words[i] >> shift) & mask
        largest = max(largest, code)
    return largest
