"""How often each ID of a table occurs, read a chunk at a time from an array that may be a file."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError

# Never another: sums of floats depend on where they are cut.
_CHUNK = 1 << 20


class Frequencies:
    """Counts or weights of the IDs `0 … n − 1`, checked when this is made. Nothing of their size is held.

    Args:
        values: [n], at least 0 and not all 0; of any number type, and possibly memory-mapped.
        num_ids: `n`.

    Raises:
        ConfigError: another shape, values that are negative, NaN or infinite, or all zero.
    """

    def __init__(self, values: npt.NDArray[np.number], num_ids: int) -> None:
        if values.shape != (num_ids,):
            raise ConfigError(f"frequencies have shape {list(values.shape)}, not [{num_ids}], one for each ID")
        self._values = values
        bad = self.num_seen = 0
        for _, chunk in self._chunks():
            bad += int(np.count_nonzero(~np.isfinite(chunk) | (chunk < 0)))
            self.num_seen += int(np.count_nonzero(chunk))
        if bad:
            raise ConfigError(f"{bad} of {num_ids} frequencies are negative, NaN or infinite; pass counts ≥ 0")
        if not self.num_seen:
            raise ConfigError(f"all {num_ids} frequencies are zero; pass None to let every ID count once")
        for _, cumulated in self._cumulated():
            self.total = float(cumulated[-1])

    def of(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """[stop − start] float64, of the IDs `start … stop − 1`."""
        return self._values[start:stop].astype(np.float64)

    def seen(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The IDs that occur, ascending, and how often: [m] int64, [m] float64."""
        parts = [(start + np.flatnonzero(chunk), chunk[chunk > 0]) for start, chunk in self._chunks()]
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([counts for _, counts in parts])

    def at(self, shares: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """[m] int64: the IDs at `shares: [m]`, ascending, 0 ≤ share < 1, of the cumulated frequency."""
        draws = shares * self.total
        ids = np.empty(len(draws), np.int64)
        done = 0
        for start, cumulated in self._cumulated():
            # From the right: ID i takes cumulated[i − 1] ≤ draw < cumulated[i], nothing if its frequency is zero.
            upto = int(np.searchsorted(draws, cumulated[-1], side="left"))
            ids[done:upto] = start + np.searchsorted(cumulated, draws[done:upto], side="right")
            done = max(done, upto)
            if cumulated[-1] == self.total:
                # A draw that rounds up to the very end belongs to the last ID that was seen.
                ids[done:] = start + int(np.searchsorted(cumulated, self.total, side="left"))
                break
        return ids

    def _chunks(self) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
        return ((start, self.of(start, start + _CHUNK)) for start in range(0, len(self._values), _CHUNK))

    def _cumulated(self) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
        """Sums of all frequencies up to and with each ID; every call gives the same bits."""
        before = 0.0
        for start, chunk in self._chunks():
            cumulated = before + np.cumsum(chunk)
            before = float(cumulated[-1])
            yield start, cumulated


def training_sample(
    num_ids: int, max_ids: int, *, frequencies: Frequencies | None, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """At most `max_ids` IDs of `0 … num_ids − 1`, ascending and distinct, and how often each counts.

    Without frequencies: every ID once, or one drawn uniformly from each of `max_ids` equal ranges. With frequencies:
    every ID that was seen, weighted by its frequency, if those are few enough; else `max_ids` draws proportional to
    frequency, one from each of as many equal ranges of the cumulated frequency, and repeats become weights. Never-seen
    IDs do not train. (One draw a range, and not so many independent draws: no ID comes twice without frequencies,
    nothing of size `num_ids` is shuffled, and the variance is lower.)

    Returns:
        ids: [m] int64.
        weights: [m] float64, positive.
    """
    rng = np.random.default_rng(seed)
    if frequencies is None:
        if num_ids <= max_ids:
            return np.arange(num_ids), np.ones(num_ids)
        edges = np.arange(max_ids + 1) * num_ids // max_ids
        return rng.integers(edges[:-1], edges[1:]), np.ones(max_ids)
    if frequencies.num_seen <= max_ids:
        return frequencies.seen()
    shares = (np.arange(max_ids) + rng.random(max_ids)) / max_ids
    ids, repeats = np.unique(frequencies.at(shares), return_counts=True)
    return ids, repeats.astype(np.float64)
