"""Reclustering one table in steps that several workers can share: columns to train, ranges of IDs to assign."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.column import ColumnAssigner, MemberMeans, TrainedColumn, nearest_pairs, train_column
from torchrec_cce.clustering.sample import Frequencies, training_sample
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.errors import ClusteringError, ConfigError
from torchrec_cce.hashing import derive_seed

OldCodes = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
HelperCodes = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
NewPointers = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
"""ids [N] int64 → [c, N] int64, new codebook rows; called from the calling thread only."""
Centroids = Sequence[npt.NDArray[np.float32]]
"""Of each column, [k', w] float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusteredTable:
    """A table's new codewords."""

    weights: npt.NDArray[np.float32]
    """[c, 2, k, w]: the new codebooks (rows past the number of distinct embeddings are zero), the new helper tables."""
    row_states: dict[str, npt.NDArray[np.float32]]
    """Each [c, 2, k, …]. A codebook row has the mean over its members of the mean state of the two old rows that made
    the member's embedding, and 0 without members; helper rows have 0."""
    objective: float
    """Mean over the IDs, weighted by their frequencies if there are any, of the squared distance, summed over columns,
    from the old embedding to its new centroid."""
    share_changed: float
    """Share, 0 to 1, of the (ID, column) pointers that differ from the old codebook codes."""
    cluster_sizes: npt.NDArray[np.int64]
    """[c, k]: how many IDs each codebook row has."""


class TableClustering:
    """CCE's cluster step for one table's column embeddings `T_j[id] = codebook_j[h_j(id)] + helper_j[h'_j(id)]`.

    `train` gives a column its centroids, `assign` a range of IDs its new pointers and the sums over it, and `finish`
    makes the new tables of the sums over all ranges. Where there are more IDs than different embeddings, `num_pairs` of
    those are assigned first by `nearest_pairs`, and IDs look theirs up. To move to pointers that others have learned,
    `sum_members` and `member_means` give the centroids, and `adopt` takes the place of `assign`. Workers that were made
    with the same arguments may share columns and ranges as they like: the result has the same bits. Nothing that is
    passed in is written.

    Args:
        weights: [c, 2, k, w] float32: for each column the codebook, then the helper table.
        num_ids: `n`, at least 1; the IDs are `0 … n − 1`.
        old_codes: ids [N] int64 → [c, 2, N] int64, the old `h` and `h'`. Called from the calling thread only.
        new_helper_codes: ids [N] int64 → [c, N] int64, the fresh `h'`; called only for `helper_init="residual"`.
        row_states: optimizer states by name, each [c, 2, k, …] float32.
        frequencies: [n], how often each ID occurs, at least 0; may be memory-mapped, and is read in chunks. IDs train
            k-means in proportion; one with 0 does not train, and gets its pointers like all others. Without them every
            ID counts once.
        pointer_dtype: an unsigned dtype that holds `k − 1`.
        seed: a new one for every clustering.
        config: of sample, k-means and helper.

    Raises:
        ConfigError: shapes, dtypes or frequencies that cannot work, or (later) codes outside `0 … k − 1`.
        ClusteringError: NaN or infinite weights or states; the message says how many and where.
    """

    def __init__(
        self,
        *,
        weights: npt.NDArray[np.float32],
        num_ids: int,
        old_codes: OldCodes,
        new_helper_codes: HelperCodes,
        row_states: Mapping[str, npt.NDArray[np.float32]] | None = None,
        frequencies: npt.NDArray[np.number] | None = None,
        pointer_dtype: npt.DTypeLike,
        seed: int,
        config: ReclusterConfig | None = None,
    ) -> None:
        self._weights, self._states = weights, dict(row_states or {})
        _check_tables(weights, self._states)
        self.num_columns, self.num_rows, self.width = (int(weights.shape[axis]) for axis in (0, 2, 3))
        self.pointer_dtype = _check_pointer_dtype(pointer_dtype, self.num_rows)
        if num_ids < 1:
            raise ConfigError(f"num_ids={num_ids} is not at least 1")
        self.num_ids = num_ids
        self._frequencies = None if frequencies is None else Frequencies(frequencies, num_ids)
        self._total_importance = float(num_ids) if self._frequencies is None else self._frequencies.total
        self._old_codes, self._new_helper_codes = old_codes, new_helper_codes
        self._seed, self._config = seed, config or ReclusterConfig()

    @property
    def training_cost(self) -> int:
        """Of one column, in a unit that is the same for all tables."""
        points = min(self.num_ids, self._config.points_per_centroid * self.num_rows)
        return points * self.num_rows * self.width * self._config.num_iterations

    @property
    def num_pairs(self) -> int:
        """How many embeddings there can be in all columns, where IDs are more than those of one; else 0."""
        return self.num_columns * self.num_rows**2 if self.num_ids > self.num_rows**2 else 0

    def train(self, columns: Sequence[int]) -> list[TrainedColumn]:
        """Train some columns."""
        if not columns:
            return []
        codes, weights = self.sample
        num_threads = min(self._config.num_threads, len(columns))

        def train(column: int) -> TrainedColumn:
            return train_column(
                self._weights[column],
                sample_codes=codes[column],
                sample_weights=weights,
                num_iterations=self._config.num_iterations,
                backend=self._config.backend,
                seed=derive_seed(self._seed, "kmeans", column),
                num_threads=max(1, self._config.num_threads // num_threads),
            )

        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(train, columns))

    def nearest_pairs(self, centroids: Centroids, start: int, stop: int, out: npt.NDArray[np.void]) -> None:
        """Write the answers for the embeddings `start … stop − 1` of `num_pairs`, column after column, to `out: [m]`.

        Args:
            out: of dtype `PAIR`.
        """
        each = self.num_rows**2

        def find(column: int) -> None:
            first, last = max(start, column * each), min(stop, (column + 1) * each)
            part = out[first - start : last - start]
            nearest_pairs(self._weights[column], centroids[column], first - column * each, last - column * each, part)

        with ThreadPoolExecutor(self._config.num_threads) as pool:
            list(pool.map(find, range(start // each, -(-stop // each))))

    def assign(
        self,
        centroids: Centroids,
        start: int,
        stop: int,
        out: npt.NDArray[np.unsignedinteger],
        pairs: npt.NDArray[np.void] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Write the new pointers of the IDs `start … stop − 1` to `out: [stop − start, c]`.

        Args:
            pairs: [num_pairs] PAIR, all answers of `nearest_pairs`; without them each ID is compared by itself.

        Returns:
            totals: [c, t] int64; those of ranges that make up all IDs are to be added.
        """
        assigners = self._assigners(centroids)
        answers = [None] * self.num_columns if pairs is None else list(pairs.reshape(self.num_columns, -1))

        def take(column: int, portion: _Portion) -> None:
            out[portion.first - start : portion.last - start, column] = assigners[column].take(
                portion.codes[column],
                helper_codes=portion.helper_codes[column],
                importances=portion.importances,
                pairs=answers[column],
            )

        self._for_each_portion(start, stop, take)
        return np.stack([assigner.totals() for assigner in assigners])

    def sum_members(self, pointers: NewPointers, start: int, stop: int) -> npt.NDArray[np.int64]:
        """What `member_means` needs to know of the IDs `start … stop − 1`: [c, t] int64, to be added over ranges."""
        members = self._member_means()

        def take(column: int, portion: _Portion) -> None:
            members[column].take(portion.codes[column], portion.given[column])

        self._for_each_portion(start, stop, take, pointers)
        return np.stack([column.totals() for column in members])

    def member_means(
        self, totals: npt.NDArray[np.int64], otherwise: npt.NDArray[np.float32]
    ) -> list[npt.NDArray[np.float32]]:
        """The centroids of clusters that are given: the mean embeddings of their IDs, [k, w] a column.

        Args:
            totals: [c, t], from `sum_members` over all IDs.
            otherwise: [c, k, w] float32, for clusters without an ID.
        """
        parts = zip(self._member_means(), totals, otherwise, strict=True)
        return [members.means(sums, rest) for members, sums, rest in parts]

    def adopt(self, centroids: Centroids, pointers: NewPointers, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Take pointers that are given for the IDs `start … stop − 1`: as `assign`, which finds the nearest."""
        assigners = self._assigners(centroids)

        def take(column: int, portion: _Portion) -> None:
            assigners[column].take(
                portion.codes[column],
                helper_codes=portion.helper_codes[column],
                importances=portion.importances,
                pointers=portion.given[column],
            )

        self._for_each_portion(start, stop, take, pointers)
        return np.stack([assigner.totals() for assigner in assigners])

    def finish(self, centroids: Centroids, totals: npt.NDArray[np.int64]) -> ClusteredTable:
        """The new tables from the `totals: [c, t]` over all IDs."""
        columns = self._assigners(centroids)
        results = [column.result(sums) for column, sums in zip(columns, totals, strict=True)]
        return ClusteredTable(
            weights=np.stack([result.weights for result in results]),
            row_states={name: np.stack([result.row_states[name] for result in results]) for name in self._states},
            objective=sum(result.distance_sum for result in results) / self._total_importance,
            share_changed=sum(result.num_changed for result in results) / (self.num_ids * self.num_columns),
            cluster_sizes=np.stack([result.cluster_sizes for result in results]),
        )

    @cached_property
    def sample(self) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.float64]]:
        """[c, 2, m] old codes of the IDs that train, and their [m] weights."""
        sample, weights = training_sample(
            self.num_ids,
            self._config.points_per_centroid * self.num_rows,
            frequencies=self._frequencies,
            seed=derive_seed(self._seed, "sample"),
        )
        codes = np.empty((self.num_columns, 2, len(sample)), self.pointer_dtype)
        for start, stop in _chunks(0, len(sample), self._config.chunk_size):
            codes[:, :, start:stop] = self._codes(sample[start:stop])
        return codes, weights

    def _codes(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return _check_codes("old_codes", self._old_codes(ids), (self.num_columns, 2, len(ids)), self.num_rows)

    def _for_each_portion(
        self, start: int, stop: int, take: Callable[[int, "_Portion"], None], pointers: NewPointers | None = None
    ) -> None:
        """Call `take(column, portion)` for every column of every chunk of IDs, columns in threads."""
        with ThreadPoolExecutor(min(self._config.num_threads, self.num_columns)) as pool:
            for first, last in _chunks(start, stop, self._config.chunk_size):
                ids = np.arange(first, last)
                shape = (self.num_columns, len(ids))
                helper_codes: npt.NDArray[np.int64] | list[None] = [None] * self.num_columns
                if self._config.helper_init == "residual":
                    helper_codes = _check_codes("new_helper_codes", self._new_helper_codes(ids), shape, self.num_rows)
                given = np.empty((self.num_columns, 0), np.int64)
                if pointers is not None:
                    given = _check_codes("pointers", pointers(ids), shape, self.num_rows)
                portion = _Portion(
                    first=first,
                    last=last,
                    codes=self._codes(ids),
                    helper_codes=helper_codes,
                    given=given,
                    importances=None if self._frequencies is None else self._frequencies.of(first, last),
                )
                list(pool.map(take, range(self.num_columns), [portion] * self.num_columns))

    def _assigners(self, centroids: Centroids) -> list[ColumnAssigner]:
        return [
            ColumnAssigner(
                self._weights[column],
                {name: state[column] for name, state in self._states.items()},
                centroids[column],
                num_ids=self.num_ids,
                total_importance=self._total_importance,
                residual_helper=self._config.helper_init == "residual",
            )
            for column in range(self.num_columns)
        ]

    def _member_means(self) -> list[MemberMeans]:
        return [MemberMeans(column, num_ids=self.num_ids) for column in self._weights]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Portion:
    """The IDs `first … last − 1` of a table."""

    first: int
    last: int
    codes: npt.NDArray[np.int64]
    """[c, 2, N]."""
    helper_codes: npt.NDArray[np.int64] | list[None]
    """[c, N], or nothing for each column."""
    given: npt.NDArray[np.int64]
    """[c, N] new pointers, where they are not to be found."""
    importances: npt.NDArray[np.float64] | None


def _chunks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


def _check_tables(weights: npt.NDArray[np.float32], states: Mapping[str, npt.NDArray[np.float32]]) -> None:
    if weights.ndim != 4 or weights.shape[1] != 2 or weights.size == 0:
        raise ConfigError(f"weights have shape {list(weights.shape)}, not [c, 2, k, w]")
    for name, table in (("weights", weights), *((f"row_states[{name!r}]", state) for name, state in states.items())):
        if table.shape[:3] != weights.shape[:3] or table.dtype != np.float32:
            expected = ", ".join(map(str, weights.shape[:3]))
            raise ConfigError(f"{name} are {table.dtype} {list(table.shape)}, not float32 [{expected}, …]")
        finite = np.isfinite(table)
        if not finite.all():
            column, term, row = (int(axis[0]) for axis in np.nonzero(~finite)[:3])
            raise ClusteringError(
                f"{finite.size - np.count_nonzero(finite)} of {finite.size} values of {name} are NaN or infinite, the "
                f"first in column {column}, {('codebook', 'helper')[term]} row {row}; nothing was clustered"
            )


def _check_pointer_dtype(pointer_dtype: npt.DTypeLike, num_rows: int) -> np.dtype[np.unsignedinteger]:
    dtype: np.dtype[Any] = np.dtype(pointer_dtype)
    if not np.issubdtype(dtype, np.unsignedinteger):
        raise ConfigError(f"pointer_dtype={dtype} is not an unsigned integer type")
    if num_rows - 1 > np.iinfo(dtype).max:
        raise ConfigError(
            f"k={num_rows} rows do not fit {dtype} pointers (at most {np.iinfo(dtype).max + 1}); "
            f"pass pointer_dtype={np.min_scalar_type(num_rows - 1).name!r}"
        )
    return dtype


def _check_codes(
    name: str, codes: npt.NDArray[np.int64], shape: tuple[int, ...], num_rows: int
) -> npt.NDArray[np.int64]:
    """Checked because the compiled loops do not: a code out of range would write past a table."""
    if codes.shape != shape or codes.dtype != np.int64:
        raise ConfigError(f"{name} returned {codes.dtype} {list(codes.shape)}, not int64 {list(shape)}")
    if codes.size and (codes.min() < 0 or codes.max() >= num_rows):
        raise ConfigError(f"{name} returned codes {codes.min()}..{codes.max()}, outside 0..{num_rows - 1}")
    return np.ascontiguousarray(codes)
