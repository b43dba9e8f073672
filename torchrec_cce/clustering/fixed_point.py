"""Sums over IDs that are the same bits in any order: of integers, whose addition is associative, as floats' is not."""

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ClusteringError


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
        """What `sums` (any shape) stand for."""
        return np.ldexp(sums.astype(np.float64), -self._exponent)
