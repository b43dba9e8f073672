"""Adopting clusters that others have learned while residents have private rows, which make up for the difference."""

from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.fixed_point import FixedPoint, add_rows
from torchrec_cce.clustering.fold import TableFold
from torchrec_cce.clustering.table import Centroids, NewPointers
from torchrec_cce.kernels.slots import NEVER

Floats = npt.NDArray[np.float32]


class ResidentAdoption(TableFold):
    """The move of one table to clusters that are given, in the steps of `TableClustering.sum_members`, `member_means`
    and `adopt`, with `finish`.

    As in a fold, IDs that never had a row have no say: a codeword becomes the mean of the embeddings, rows included, of
    its IDs that have or had one. A row is then what its resident's embedding has beyond its new codewords.

    Args:
        given: [c, k, w] float32, for codewords at which nobody has a say.
        arguments: of `TableFold`, with ages by positions of the new map, and codes that these had in the old one.

    Raises:
        As `TableFold`; ClusteringError: NaN or infinite values in `given`.
    """

    def __init__(self, *, given: Floats, **arguments: Any) -> None:
        super().__init__(**arguments)
        largest = self._largest_value
        self._unit = FixedPoint(self.num_ids * largest)
        self._distance_unit = self._unit_of_distances(largest + max(largest, float(np.abs(given).max())))

    def sum_members(self, pointers: NewPointers, start: int, stop: int) -> npt.NDArray[np.int64]:
        """What `member_means` needs to know of the positions `start … stop − 1`: [c, k·(1 + w)] int64, to be added."""
        members = np.zeros((self.num_columns, self.num_rows), np.int64)
        sums = np.zeros((self.num_columns, self.num_rows, self.width), np.int64)
        for portion in self._portions(start, stop):
            positions = np.arange(portion.first, portion.first + len(portion.codes))
            heard = np.flatnonzero(self._ages[positions] != NEVER)
            targets = pointers(positions)[:, heard]
            for column in range(self.num_columns):
                members[column] += np.bincount(targets[column], minlength=self.num_rows)
                values = self._unit.encode(self._embeddings(column, portion)[heard])
                add_rows(sums[column], targets[column], values, np.arange(len(heard)))
        return np.concatenate([members, sums.reshape(self.num_columns, -1)], axis=1)

    def member_means(self, totals: npt.NDArray[np.int64], otherwise: Floats) -> list[Floats]:
        """The centroids, [k, w] a column, from the sums over all positions; `otherwise: [c, k, w]` where nobody has a
        say."""
        members, sums = np.split(totals, [self.num_rows], axis=1)
        means = self._unit.decode(sums.reshape(otherwise.shape)) / np.maximum(members, 1)[:, :, None]
        return list(np.where(members[:, :, None] > 0, means, otherwise).astype(np.float32))

    def adopt(self, centroids: Centroids, pointers: NewPointers, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The totals of `assign` for the positions `start … stop − 1`, whose pointers are given."""
        totals = np.zeros((self.num_columns, 2 + self.num_rows), np.int64)
        for portion in self._portions(start, stop):
            given = pointers(np.arange(portion.first, portion.first + len(portion.codes)))
            for column in range(self.num_columns):
                gaps = self._embeddings(column, portion) - centroids[column][given[column]]
                totals[column, 0] += np.count_nonzero(given[column] != portion.codes[:, column])
                totals[column, 1] += self._distance_unit.encode(np.einsum("nw,nw->n", gaps, gaps)).sum()
                totals[column, 2:] += np.bincount(given[column], minlength=self.num_rows)
        return totals

    def rows_left(self, codebook: Floats, pointers: NewPointers, out: Floats) -> None:
        """Write to `out: [m, d]`, which is zero, what the rows are then, by their slots.

        Args:
            codebook: [c, k, w], of the new table.
        """
        for portion in self._portions(0, self.num_ids):
            residents = portion.first + portion.residents
            given, slots = pointers(residents), self._slots.of(residents)
            for column in range(self.num_columns):
                old = self._codebook[column, portion.codes[portion.residents, column]]
                part = self._part(column)
                out[slots, part] = portion.rows[:, part] + (old - codebook[column, given[column]])
