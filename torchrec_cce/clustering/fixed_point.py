"""Sums over IDs with the same bits in any order: they are sums of integers, whose addition is associative."""

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ClusteringError
from torchrec_cce.jit import jit


class FixedPoint:
    """Real numbers as int64 multiples of a power of two, chosen so that a sum of known size fits.

    With 1e9 terms of equal size, 31 bits remain for each: more than the 24 of a float32.
    """

    def __init__(self, largest_sum: float) -> None:
        """Room for sums up to `largest_sum` in absolute value, the sum of the terms' bounds.

        Raises:
            ClusteringError: `largest_sum` is NaN or infinite.
        """
        if not np.isfinite(largest_sum):
            raise ClusteringError(f"a sum over IDs may reach {largest_sum}; the tables hold values that are too large")
        # frexp: largest_sum < 2^e. The slack takes the rounding of each term, half a unit.
        self._exponent = 63 - int(np.frexp(largest_sum * (1 + 2.0**-20))[1])

    def encode(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """The nearest integers to `values` (any shape) in this unit."""
        return np.rint(np.ldexp(values.astype(np.float64), self._exponent)).astype(np.int64)

    def decode(self, sums: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The numbers that `sums` (any shape) stand for."""
        return np.ldexp(sums.astype(np.float64), -self._exponent)


class TableSum:
    """Per new row, the sum over its members of one old row from each of several tables."""

    def __init__(self, tables: npt.NDArray[np.float32], num_ids: int) -> None:
        """`tables: [t, k, s]` float32, finite; at most `num_ids` members in all."""
        # Each number becomes two integers, a coarse and a fine one. The coarse one would do for large rows, but an
        # optimizer state that is a billionth of the largest must not become zero: the step is divided by its root.
        self._coarse = FixedPoint(num_ids * _largest_sum(tables))
        coarse = self._coarse.encode(tables)
        rest = tables - self._coarse.decode(coarse)
        self._fine = FixedPoint(num_ids * _largest_sum(rest))
        self._tables = np.concatenate([coarse, self._fine.encode(rest)], axis=2)
        self.totals = np.zeros(self._tables.shape[1:], np.int64)

    def add(self, targets: npt.NDArray[np.int64], *codes: npt.NDArray[np.int64]) -> None:
        """Add row `codes[i]` of each table to the total of `targets[i]`; there is one `codes: [N]` for each table."""
        for table, rows in zip(self._tables, codes, strict=True):
            add_rows(self.totals, targets, table, rows)

    def mean(self, totals: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """[k, s]: `totals` over `counts: [k]`; zero where nothing was counted."""
        coarse, fine = np.split(totals.reshape(self.totals.shape), 2, axis=1)
        sums = self._coarse.decode(coarse) + self._fine.decode(fine)
        return (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)


def _largest_sum(tables: npt.NDArray[np.floating]) -> float:
    """The largest absolute value that a sum of one entry of each of `tables: [t, k, s]` can have."""
    return float(np.abs(tables).max(axis=(1, 2), initial=0).sum(dtype=np.float64))


@jit
def add_rows(
    totals: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    table: npt.NDArray[np.int64],
    codes: npt.NDArray[np.int64],
) -> None:
    """`totals[targets[i]] += table[codes[i]]` for every i; totals: [k, s], table: [k', s], all indices inside."""
    for i in range(targets.shape[0]):
        target, code = targets[i], codes[i]
        for dim in range(totals.shape[1]):
            totals[target, dim] += table[code, dim]
