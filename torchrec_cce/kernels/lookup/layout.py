"""What a lookup of several tables at once is told of them: numbers in one array, a line for each part of a column.

An ID of a feature is a few 64-bit *words*. A table of `c` columns and `t` terms has its codes of one term side by side,
`bits` each, column 0 in the lowest bits; the words of a term come after those of the term before. Those of all features
lie in one array `[W, N]`, where `N` counts the values of the batch: words of value `i` are in its column `i`, from the
feature's first word on. A full table is one column of 64 bits, the ID itself.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchrec_cce.kernels.lookup.vectors import MAX_WIDTH
from torchrec_cce.kernels.packed import num_words

_FLOAT_BYTES = 4

# Of a line of `Layout.columns`.
(TABLE, SOURCE, WORD, WORDS_A_TERM, SHIFT, MASK, ROW_BYTES, TERM_BYTES, START_BYTES, OUT_BYTES, IS_MEAN) = range(11)
OWN_ROWS = 11
"""Rows from the start on whose gradients are no other line's to write first."""
NUM_FIELDS = 12


@dataclass(frozen=True, kw_only=True)
class FeatureTable:
    """A table, as one of its features reads it."""

    table: int
    """Its number: two features of one table have the same."""
    source: int
    """Which feature of the input the IDs are of."""
    num_columns: int
    num_terms: int
    """Codewords that are summed in each column."""
    bits: int
    """Of a code: 4, 8, 16, 32 or 64."""
    width: int
    """Floats of a row."""
    table_rows: int
    column_rows: int
    """Rows from the start of a column to that of the next; 0: a code is a row of the table, in any column."""
    term_rows: int
    """Rows from the start of a term to that of the next."""
    is_mean: bool = False

    def __post_init__(self) -> None:
        assert self.column_rows in (0, self.table_rows // self.num_columns), "columns fill the table"

    @property
    def words_a_term(self) -> int:
        return num_words(self.num_columns, self.bits)

    @property
    def num_words(self) -> int:
        """64-bit words of an ID."""
        return self.words_a_term * self.num_terms

    @property
    def dim(self) -> int:
        """Floats of an embedding."""
        return self.num_columns * self.width


class Group(NamedTuple):
    """Lines of a layout that one compiled loop takes."""

    width: int
    num_terms: int
    first: int
    last: int
    """The line after the last."""
    cuts: tuple[int, ...]
    """Lines before which it may be divided, the first and `last` included: not between lines whose gradients are
    added to the same rows, as those of two features of one table."""

    def parts(self, most: int) -> list[tuple[int, int]]:
        """At most so many runs of lines, of about the same length."""
        if most == 1:
            return [(self.first, self.last)]
        wanted = [self.first + (self.last - self.first) * i // most for i in range(1, most)]
        inner = {min(self.cuts, key=lambda cut: abs(cut - line)) for line in wanted}
        ends = sorted({self.first, self.last, *inner})
        return list(pairwise(ends))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the columns of some features of tables are, in words, tables and output."""

    columns: npt.NDArray[np.uint64]
    """[parts, 12], see the names of the fields in this file. Lines of one group stand together, in it those of one
    table, and in those the ones of one feature."""
    groups: tuple[Group, ...]
    first_words: tuple[int, ...]
    """Of each feature."""
    num_words: int
    """`W`."""
    dim: int
    """`Σ d`: floats of all embeddings, side by side in the order of the features."""
    table_floats: dict[int, int]
    """Of each table, by its number."""

    @classmethod
    def of(cls, features: Sequence[FeatureTable]) -> "Layout":
        used: dict[int, int] = {}
        tables: set[int] = set()
        first_words = []
        lines: list[tuple[tuple[int, int, int, int], list[int]]] = []
        start = 0
        for number, feature in enumerate(features):
            word = used.get(feature.source, 0)
            used[feature.source] = word + feature.num_words
            first_words.append(word)
            for column in range(feature.num_columns):
                for offset in range(0, feature.width, MAX_WIDTH):
                    part = min(MAX_WIDTH, feature.width - offset)
                    line = _line(feature, word, column, offset, start + column * feature.width + offset)
                    line.append(0 if feature.table in tables else _own_rows(feature, column))
                    lines.append(((part, feature.num_terms, feature.table, number), line))
            start += feature.dim
            tables.add(feature.table)
        lines.sort(key=lambda line: line[0])  # stable: columns of a feature stay in order
        keys = [key for key, _ in lines]
        whole = {feature.table for feature in features if feature.num_columns > 1 and not feature.column_rows}
        ends = [i for i, key in enumerate(keys) if i == 0 or key[:2] != keys[i - 1][:2]] + [len(keys)]
        return cls(
            columns=np.array([line for _, line in lines], np.uint64).reshape(-1, NUM_FIELDS),
            groups=tuple(
                Group(*keys[first][:2], first, last, _cuts(keys, first, last, whole)) for first, last in pairwise(ends)
            ),
            first_words=tuple(first_words),
            num_words=max(used.values(), default=0),
            dim=start,
            table_floats={feature.table: feature.table_rows * feature.width for feature in features},
        )


def _cuts(keys: Sequence[tuple[int, int, int, int]], first: int, last: int, whole: Set[int]) -> tuple[int, ...]:
    """`keys`: of each line its width, terms, table and feature; `whole`: tables whose columns have rows in common."""
    shared = whole | {table for *_, table, _ in keys if len({key[3] for key in keys if key[2] == table}) > 1}
    inner = (i for i in range(first + 1, last) if keys[i][2] != keys[i - 1][2] or keys[i][2] not in shared)
    return (first, *inner, last)


def _own_rows(feature: FeatureTable, column: int) -> int:
    return feature.column_rows or (feature.table_rows if column == 0 else 0)


def _line(feature: FeatureTable, word: int, column: int, offset: int, out: int) -> list[int]:
    codes_a_word = 64 // feature.bits
    row_bytes = feature.width * _FLOAT_BYTES
    return [
        feature.table,
        feature.source,
        word + column // codes_a_word,
        feature.words_a_term,
        column % codes_a_word * feature.bits,
        2**feature.bits - 1,
        row_bytes,
        feature.term_rows * row_bytes,
        column * feature.column_rows * row_bytes + offset * _FLOAT_BYTES,
        out * _FLOAT_BYTES,
        feature.is_mean,
    ]
