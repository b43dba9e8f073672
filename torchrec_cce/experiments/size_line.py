"""What an entry takes between the caps that were run, and beyond them."""

from collections.abc import Callable, Sequence

import numpy as np

from torchrec_cce.experiments.curve import Point
from torchrec_cce.experiments.results import Result


class SizeLine:
    """Sizes over the trained parameters of all tables; for `inf` parameters, all but the pointers are `inf`, too.

    Bytes of tables and parameters of the largest table are taken to be linear between caps and beyond the last, as they
    are while the same tables are compressed; bytes of pointers to be those of the next larger cap, or of the last.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        trials = {point.first.parameters: point.first for point in points}
        self._trials = [trials[parameters] for parameters in sorted(trials)]
        self._parameters = np.array(sorted(trials), np.float64)

    def largest_parameters(self, parameters: float) -> float:
        """Of the largest table."""
        return self._linear(lambda trial: trial.largest_parameters, parameters)

    def host_bytes(self, parameters: float) -> float:
        """Of pointers in host memory."""
        return self._next(parameters).pointer_bytes

    def accelerator_bytes(self, parameters: float) -> float:
        """Of tables, and of pointers that live beside them."""
        tables = self._linear(lambda trial: trial.table_bytes, parameters)
        return tables + self._next(parameters).device_pointer_bytes

    def total_bytes(self, parameters: float) -> float:
        return self.accelerator_bytes(parameters) + self.host_bytes(parameters)

    def _next(self, parameters: float) -> Result:
        at = int(np.searchsorted(self._parameters, parameters * (1 - 1e-9)))  # a logarithm and back is not exact
        return self._trials[min(at, len(self._trials) - 1)]

    def _linear(self, size: Callable[[Result], float], parameters: float) -> float:
        sizes = np.array([size(trial) for trial in self._trials], np.float64)
        if len(sizes) == 1:
            return float(sizes[0] * parameters / self._parameters[0])
        at = int(np.clip(np.searchsorted(self._parameters, parameters), 1, len(sizes) - 1))
        (left, right), (low, high) = self._parameters[at - 1 : at + 1], sizes[at - 1 : at + 1]
        return float(low + (parameters - left) * (high - low) / (right - left)) if np.isfinite(parameters) else np.inf
