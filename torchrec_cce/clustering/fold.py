"""Folding the private rows of a table's residents into its codewords and pointers.

Residents are this project's own, beyond the paper: see `docs/residents.md`. While a phase is open, the embedding of an
ID is that of its codewords, plus a private row if it is a resident. A fold makes codewords and pointers of it all:
k-means in each column, from where the codewords are, over the embeddings of the residents, each as heavy as the loss
depends on its row, and over the codewords, each as heavy as there are other IDs at it that had a row before. Then every
resident points at the nearest new codeword, and every other ID where the nearest to its old codeword is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.column import SampleErrors, TrainedColumn, match_labels
from torchrec_cce.clustering.fixed_point import FixedPoint
from torchrec_cce.clustering.kmeans.kmeans import kmeans
from torchrec_cce.clustering.kmeans.nearest import NearestCentroid
from torchrec_cce.clustering.sample import training_sample
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import Centroids, ClusteredTable
from torchrec_cce.errors import ClusteringError, ConfigError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.kernels.slots import NEVER
from torchrec_cce.maps.residency import Residency

Floats = npt.NDArray[np.float32]
Codes = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.integer]]
"""positions [N] int64 → [N, c] integers, their codes in the codebook."""


class RowArray(Protocol):
    """Rows of float32 numbers: an array, possibly memory-mapped, or what gives arrays where it is asked for some."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Any, /) -> Floats: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidentRows:
    """What the residents of a table have learned."""

    residency: Residency
    """Of an open phase."""
    rows: RowArray
    """[m, d]: the rows of the residents, by their slots."""
    importances: npt.NDArray[np.float32] | None = None
    """[m], at least 0, possibly memory-mapped: how heavy each row is in k-means, beside their mean; None if all are
    alike. The squared gradients that its optimizer has summed say how much the loss depends on where a row is."""


class TableFold:
    """The fold of one table, in the steps of a clustering; see `TableClustering`, whose methods these are.

    The possible embeddings that `nearest_pairs` assigns are the `c·k` codewords.

    Args:
        codebook: [c, k, w] float32.
        codes: positions → their codes. Called from the calling thread only.
        residents: of the table.
        is_first: whether the codewords are of no fold before: then k-means starts from random points.
        row_states: optimizer states by name, each [c, 2, k, …] float32. They start again at zero.
        pointer_dtype: an unsigned dtype that holds `k − 1`.
        seed: a new one for every fold.
        config: of k-means. With more residents than `points_per_centroid` for each codeword, it trains on a sample.

    Raises:
        ConfigError: shapes that do not fit.
        ClusteringError: NaN or infinite codewords or rows.
    """

    def __init__(
        self,
        *,
        codebook: Floats,
        codes: Codes,
        residents: ResidentRows,
        is_first: bool,
        row_states: Mapping[str, Floats],
        pointer_dtype: np.dtype[np.unsignedinteger],
        seed: int,
        config: ReclusterConfig,
    ) -> None:
        self.num_columns, self.num_rows, self.width = map(int, codebook.shape)
        self.num_ids, self.pointer_dtype = residents.residency.num_ids, pointer_dtype
        self._codebook, self._states = codebook, row_states
        self._codes, self._is_first = codes, is_first
        self._seed, self._config = seed, config
        self._ages, self._slots, self._rows = residents.residency.ages, residents.residency.slots, residents.rows
        self._importances = residents.importances
        self.num_residents = self._slots.num_slots
        if self._rows.shape[1:] != (self.num_columns * self.width,) or self._rows.shape[0] < self._slots.num_taken:
            expected = f"[m, {self.num_columns * self.width}] for {self.num_residents} residents"
            raise ConfigError(f"rows are {list(self._rows.shape)}, not {expected}")
        if not residents.residency.is_open:
            raise ConfigError("no phase is open, whose rows could be folded")
        self._largest_value = self._found_largest_value()
        self._distance_unit = self._unit_of_distances(2 * self._largest_value)

    @property
    def training_cost(self) -> int:
        """Of one column, in a unit that is the same for all tables."""
        points = min(self.num_residents, self._config.points_per_centroid * self.num_rows) + self.num_rows
        return points * self.num_rows * self.width * self._config.num_iterations

    @property
    def num_pairs(self) -> int:
        """How many codewords there are."""
        return self.num_columns * self.num_rows

    def train(self, columns: Sequence[int]) -> list[TrainedColumn]:
        """Train some columns."""
        if not columns:
            return []
        _ = self.sample, self._others  # once, for all threads
        num_threads = min(self._config.num_threads, len(columns))
        with ThreadPoolExecutor(num_threads) as pool:
            each = max(1, self._config.num_threads // num_threads)
            return list(pool.map(lambda column: self._train(column, each), columns))

    def nearest_pairs(self, centroids: Centroids, start: int, stop: int, out: npt.NDArray[np.void]) -> None:
        """Write the answers for the codewords `start … stop − 1`, column after column, to `out: [m]` PAIR."""
        for column in range(start // self.num_rows, -(-stop // self.num_rows)):
            first = column * self.num_rows
            part = slice(max(start, first) - first, min(stop, first + self.num_rows) - first)
            answers = out[first + part.start - start : first + part.stop - start]
            answers["code"], answers["distance"] = NearestCentroid(centroids[column])(self._codebook[column, part])

    def assign(
        self,
        centroids: Centroids,
        start: int,
        stop: int,
        out: npt.NDArray[np.unsignedinteger],
        pairs: npt.NDArray[np.void] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Write the new pointers of the positions `start … stop − 1` to `out: [stop − start, c]`.

        Returns:
            totals: [c, 2 + k] int64: pointers that changed, squared distances, members of each codeword.
        """
        assert pairs is not None  # there always are some
        answers = pairs.reshape(self.num_columns, self.num_rows)
        nearest = [NearestCentroid(each) for each in centroids]
        totals = np.zeros((self.num_columns, 2 + self.num_rows), np.int64)

        def take(column: int, portion: _Portion) -> None:
            old = portion.codes[:, column].astype(np.int64)
            new, distances = answers["code"][column][old].astype(np.int64), answers["distance"][column][old]
            at = portion.residents
            if len(at):
                embeddings = self._codebook[column, old[at]] + portion.rows[:, self._part(column)]
                new[at], distances[at] = nearest[column](embeddings)
            out[portion.first - start : portion.first - start + len(old), column] = new
            totals[column, 0] += np.count_nonzero(new != old)
            totals[column, 1] += self._distance_unit.encode(distances).sum()
            totals[column, 2:] += np.bincount(new, minlength=self.num_rows)

        with ThreadPoolExecutor(min(self._config.num_threads, self.num_columns)) as pool:
            for portion in self._portions(start, stop):
                list(pool.map(take, range(self.num_columns), [portion] * self.num_columns))
        return totals

    def finish(self, centroids: Centroids, totals: npt.NDArray[np.int64]) -> ClusteredTable:
        """The new tables from the `totals` over all positions."""
        weights = np.zeros((self.num_columns, 2, self.num_rows, self.width), np.float32)
        for column, codewords in enumerate(centroids):
            weights[column, 0, : len(codewords)] = codewords
        return ClusteredTable(
            weights=weights,
            row_states={name: np.zeros_like(state) for name, state in self._states.items()},
            objective=float(self._distance_unit.decode(totals[:, 1]).sum()) / self.num_ids,
            share_changed=float(totals[:, 0].sum()) / (self.num_ids * self.num_columns),
            cluster_sizes=totals[:, 2:],
        )

    def _train(self, column: int, num_threads: int) -> TrainedColumn:
        codes, rows, weights = self.sample
        parts = rows[:, self._part(column)]
        embeddings = self._codebook[column, codes[:, column]] + parts
        counts = self._others[column]
        used = np.flatnonzero(counts)
        points = np.concatenate([self._codebook[column, used], embeddings])
        masses = np.concatenate([counts[used], weights])
        if len(points) == 0:  # nobody has ever had a row
            return TrainedColumn(centroids=self._codebook[column], errors=SampleErrors(new=0.0, parent=0.0, total=0.0))
        centroids = kmeans(
            points,
            self.num_rows,
            seed=derive_seed(self._seed, "kmeans", column),
            weights=(masses / masses.mean()).astype(np.float32),
            first=None if self._is_first else self._codebook[column],
            num_iterations=self._config.num_iterations,
            num_threads=num_threads,
            backend=self._config.backend,
        )
        labels, distances = NearestCentroid(centroids)(points)
        old = np.concatenate([used, codes[:, column]])
        shares = masses / masses.sum()
        return TrainedColumn(
            centroids=centroids[match_labels(old, labels, masses, num_labels=len(centroids))],
            errors=SampleErrors(
                new=float(shares @ distances),
                parent=float(shares[len(used) :] @ np.square(parts, dtype=np.float64).sum(axis=1)),
                total=float(shares @ np.square(points - shares @ points).sum(axis=1)),
            ),
        )

    @cached_property
    def sample(self) -> tuple[npt.NDArray[np.int64], Floats, npt.NDArray[np.float64]]:
        """The residents that train: their codes [m', c], their rows, and as how many residents each counts."""
        most = self._config.points_per_centroid * self.num_rows
        seed = derive_seed(self._seed, "sample")
        chosen, weights = training_sample(self.num_residents, most, frequencies=None, seed=seed)
        positions, before = [np.empty(0, np.int64)], 0
        for first, ages in self._chunks(0, self.num_ids):
            here = np.flatnonzero(ages == 0)
            part = slice(*np.searchsorted(chosen, [before, before + len(here)]))
            positions.append(first + here[chosen[part] - before])
            before += len(here)
        codes = self._codes(np.concatenate(positions)).astype(np.int64)
        slots = self._slots.rows(chosen)
        if self._importances is not None and (importances := self._importances[slots].astype(np.float64)).any():
            weights = weights * importances * (weights.sum() / (weights @ importances))
        return codes, self._rows[slots], weights * (self.num_residents / max(len(chosen), 1))

    @cached_property
    def _others(self) -> npt.NDArray[np.int64]:
        """[c, k]: at each codeword, the IDs that had a row before and have none now."""
        counts = np.zeros((self.num_columns, self.num_rows), np.int64)
        for first, ages in self._chunks(0, self.num_ids):
            there = np.flatnonzero((ages != 0) & (ages != NEVER))
            for column, codes in enumerate(self._codes(first + there).T):
                counts[column] += np.bincount(codes, minlength=self.num_rows)
        return counts

    def _portions(self, start: int, stop: int) -> "Iterator[_Portion]":
        number = self._slots.before(start)
        for first, ages in self._chunks(start, stop):
            here = np.flatnonzero(ages == 0)
            codes = self._codes(np.arange(first, first + len(ages)))
            rows = self._rows[self._slots.rows(slice(number, number + len(here)))]
            yield _Portion(first=first, codes=codes, residents=here, rows=rows)
            number += len(here)

    def _chunks(self, start: int, stop: int) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """The ages of the positions `start … stop − 1`, a chunk at a time, with the first position of each."""
        for first in range(start, stop, self._config.chunk_size):
            yield first, self._ages[first : min(first + self._config.chunk_size, stop)]

    def _part(self, column: int) -> slice:
        """Of a row: what it adds to a column."""
        return slice(column * self.width, (column + 1) * self.width)

    def _embeddings(self, column: int, portion: "_Portion") -> Floats:
        """[N, w]: what IDs have in a column, with the rows of residents."""
        embeddings: Floats = self._codebook[column, portion.codes[:, column]]
        embeddings[portion.residents] += portion.rows[:, self._part(column)]
        return embeddings

    def _unit_of_distances(self, reach: float) -> FixedPoint:
        """Of sums of squared distances in a column, between embeddings whose values differ by `reach` at most."""
        return FixedPoint(self.num_ids * float(self.width * reach**2 * 1.001))

    def _found_largest_value(self) -> float:
        """No value of an embedding is larger. Checks all values, too. Centroids lie among the embeddings."""
        size = self._config.chunk_size
        stop = self._slots.num_taken
        parts = (self._rows[start : min(start + size, stop)] for start in range(0, stop, size))
        rows = float(np.max([np.abs(part).max() for part in parts], initial=0))
        largest = float(np.abs(self._codebook).max()) + rows
        if not np.isfinite(largest):
            raise ClusteringError("the codewords or the rows of residents hold NaN or infinite values; nothing changed")
        return largest


@dataclass(frozen=True, kw_only=True, eq=False)
class _Portion:
    """Some positions of a table, from `first` on."""

    first: int
    codes: npt.NDArray[np.integer]
    """[N, c], in the codebook."""
    residents: npt.NDArray[np.int64]
    """[R]: which of them are residents, from 0 on."""
    rows: Floats
    """[R, d], theirs."""
