"""Pooled embeddings of bags, and their gradients, by the codes of IDs: no list of rows, and no sort.

Loops go feature by feature, in each by blocks of bags, and in each of those column by column: a column's codewords and
a block's outputs then stay in a cache. Every sum of floats has one order, whatever the blocks and threads are.
"""

import numpy as np
import numpy.typing as npt

from torchrec_cce.jit import jit
from torchrec_cce.kernels.lookup.layout import (
    IS_MEAN,
    MASK,
    OUT_BYTES,
    OWN_ROWS,
    ROW_BYTES,
    SHIFT,
    SOURCE,
    START_BYTES,
    TABLE,
    TERM_BYTES,
    WORD,
    WORDS_A_TERM,
)
from torchrec_cce.kernels.lookup.vectors import add, add_scaled, clear, load_row, scale, store_row, zero_row

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
Offsets = npt.NDArray[np.int64]

_BLOCK = 512
"""Bags."""


@jit
def _are_single(offsets: Offsets, first: np.uint64, last: np.uint64) -> bool:
    """Whether each of the bags `first … last − 1` holds one ID."""
    several = np.int64(0)
    for bag in range(first, last):
        several |= (offsets[bag + np.uint64(1)] - offsets[bag]) ^ np.int64(1)
    single: bool = several == 0
    return single


@jit
def _last_of_feature(columns: Words, first: int, last: int) -> int:
    """The line after those of the feature that line `first` is of."""
    stop = first + 1
    while (
        stop < last
        and columns[stop, SOURCE] == columns[first, SOURCE]
        and columns[stop, TABLE] == columns[first, TABLE]
    ):
        stop += 1
    return stop


@jit
def pool_bags(
    columns: Words,
    tables: Words,
    words: Words,
    offsets: Offsets,
    weights: Floats | None,
    out: Floats,
    first: int,
    last: int,
    first_bag: int,
    last_bag: int,
    width: tuple[None, ...],
    terms: tuple[None, ...],
) -> None:
    """Write the pooled embeddings of bags `first_bag … last_bag − 1` in the columns of lines `first … last − 1`.

    Args:
        columns: see `Layout`; the lines are of one group.
        tables: [tables] the address of each, float32.
        words: [W, N].
        offsets: [sources · B + 1]: where in `N` each bag of each source begins.
        weights: [N], or None where all are 1.
        out: [B, Σ d], written to.
        width, terms: as long as the group's rows are wide, and as it has terms.
    """
    flat, count = words.reshape(-1), np.uint64(words.shape[1])
    to, out_row, num_bags = np.uint64(out.ctypes.data), np.uint64(out.shape[1] * 4), np.uint64(len(out))
    one = np.uint64(1)
    while first < last:
        stop = _last_of_feature(columns, first, last)
        skipped = columns[first, SOURCE] * num_bags
        for block in range(first_bag, last_bag, _BLOCK):
            bags, end = np.uint64(block), np.uint64(min(block + _BLOCK, last_bag))
            single = _are_single(offsets, skipped + bags, skipped + end)
            for line in range(first, stop):
                start = tables[columns[line, TABLE]] + columns[line, START_BYTES]
                row_bytes, term_bytes = columns[line, ROW_BYTES], columns[line, TERM_BYTES]
                shift, mask = columns[line, SHIFT], columns[line, MASK]
                word, next_word = columns[line, WORD] * count, columns[line, WORDS_A_TERM] * count
                place, is_mean = to + columns[line, OUT_BYTES], columns[line, IS_MEAN] == one
                if single:
                    # An index that only grows by one needs no load of offsets.
                    word += np.uint64(offsets[skipped + bags]) - bags
                    for bag in range(bags, end):
                        if weights is None:
                            total = load_row(start + ((flat[word + bag] >> shift) & mask) * row_bytes, width)
                            for p in range(1, len(terms)):
                                term = np.uint64(p)
                                code = (flat[word + term * next_word + bag] >> shift) & mask
                                total = add(total, load_row(start + term * term_bytes + code * row_bytes, width))
                        else:
                            weight = weights[word - columns[line, WORD] * count + bag]
                            total = zero_row(width)
                            for p in range(len(terms)):
                                term = np.uint64(p)
                                code = (flat[word + term * next_word + bag] >> shift) & mask
                                row = load_row(start + term * term_bytes + code * row_bytes, width)
                                total = add_scaled(total, row, weight)
                        store_row(place + bag * out_row, total)
                else:
                    for bag in range(bags, end):
                        begin, after = offsets[skipped + bag], offsets[skipped + bag + one]
                        total = zero_row(width)
                        for i in range(np.uint64(begin), np.uint64(after)):
                            for p in range(len(terms)):
                                term = np.uint64(p)
                                code = (flat[word + term * next_word + i] >> shift) & mask
                                row = load_row(start + term * term_bytes + code * row_bytes, width)
                                if weights is None:  # noqa: SIM108  numba drops the branch that has no weights
                                    total = add(total, row)
                                else:
                                    total = add_scaled(total, row, weights[i])
                        if is_mean and after > begin:
                            total = scale(total, np.float32(1) / np.float32(after - begin))
                        store_row(place + bag * out_row, total)
        first = stop


@jit
def sum_gradients(
    columns: Words,
    tables: Words,
    words: Words,
    offsets: Offsets,
    weights: Floats | None,
    gradients: Floats,
    first: int,
    last: int,
    width: tuple[None, ...],
    terms: tuple[None, ...],
) -> None:
    """Write to gradients of tables the sum of what `gradients: [B, Σ d]`, those of `pool_bags`' output, give each row.

    A column is cleared right before it is added to, so that it is in a cache.

    Args:
        tables: [tables] the address of the gradient of each, float32; 0 where none is wanted. What is added to a row is
            added in the order of features and bags.

    All others are as of `pool_bags`.
    """
    flat, count = words.reshape(-1), np.uint64(words.shape[1])
    source, out_row = np.uint64(gradients.ctypes.data), np.uint64(gradients.shape[1] * 4)
    num_bags, one, part_bytes = np.uint64(len(gradients)), np.uint64(1), np.uint64(len(width) * 4)
    while first < last:
        stop = _last_of_feature(columns, first, last)
        skipped = columns[first, SOURCE] * num_bags
        wanted = tables[columns[first, TABLE]] != 0
        for line in range(first, stop if wanted else first):
            start, row_bytes = tables[columns[line, TABLE]] + columns[line, START_BYTES], columns[line, ROW_BYTES]
            if row_bytes == part_bytes:
                clear(start, columns[line, OWN_ROWS] * row_bytes)
            else:
                for row in range(columns[line, OWN_ROWS]):
                    clear(start + row * row_bytes, part_bytes)
        for block in range(0, len(gradients) if wanted else 0, _BLOCK):
            bags, end = np.uint64(block), np.uint64(min(block + _BLOCK, len(gradients)))
            single = _are_single(offsets, skipped + bags, skipped + end)
            for line in range(first, stop):
                start = tables[columns[line, TABLE]] + columns[line, START_BYTES]
                row_bytes, term_bytes = columns[line, ROW_BYTES], columns[line, TERM_BYTES]
                shift, mask = columns[line, SHIFT], columns[line, MASK]
                word, next_word = columns[line, WORD] * count, columns[line, WORDS_A_TERM] * count
                place, is_mean = source + columns[line, OUT_BYTES], columns[line, IS_MEAN] == one
                ahead = np.uint64(offsets[skipped + bags]) - bags
                for bag in range(bags, end):
                    gradient = load_row(place + bag * out_row, width)
                    if single:
                        begin = ahead + bag
                        after = begin + one
                    else:
                        begin, after = np.uint64(offsets[skipped + bag]), np.uint64(offsets[skipped + bag + one])
                    if is_mean and after > begin:
                        gradient = scale(gradient, np.float32(1) / np.float32(after - begin))
                    for i in range(begin, after):
                        part = gradient
                        if weights is not None:
                            part = scale(gradient, weights[i])
                        for p in range(len(terms)):
                            term = np.uint64(p)
                            code = (flat[word + term * next_word + i] >> shift) & mask
                            at = start + term * term_bytes + code * row_bytes
                            store_row(at, add(load_row(at, width), part))
        first = stop
