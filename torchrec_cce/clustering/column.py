"""Reclustering one column: train its centroids, give every ID the nearest, make the new tables."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.fixed_point import FixedPoint, TableSum
from torchrec_cce.clustering.kmeans.kmeans import kmeans
from torchrec_cce.clustering.kmeans.nearest import NearestCentroid
from torchrec_cce.clustering.settings import Backend
from torchrec_cce.jit import jit

_PAIRS_AT_A_TIME = 65536

PAIR = np.dtype([("code", np.uint32), ("distance", np.float32)])
"""The nearest centroid of one of the k² embeddings of a column, and the squared distance to it."""


@dataclass(frozen=True, kw_only=True)
class SampleErrors:
    """Mean squared distances of the sample that k-means trained on; those of columns add up to those of a table."""

    new: float
    """To the new centroids."""
    parent: float
    """To the means of the clusters that the old codebook pointers make: the old map's best on today's embeddings."""
    total: float
    """To the mean of all: nothing clustered."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedColumn:
    """What k-means made of one column."""

    centroids: npt.NDArray[np.float32]
    """[k', w], k' ≤ k; see `kmeans`. Each is numbered as an old codebook row with whose IDs it has many in common."""
    errors: SampleErrors


def sum_errors(columns: Iterable[TrainedColumn]) -> SampleErrors:
    """Of a table, from those of its columns."""
    errors = [column.errors for column in columns]
    return SampleErrors(
        new=sum(each.new for each in errors),
        parent=sum(each.parent for each in errors),
        total=sum(each.total for each in errors),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnResult:
    """The tables of one column after all IDs were taken in."""

    weights: npt.NDArray[np.float32]
    """[2, k, w]: codebook, helper."""
    row_states: dict[str, npt.NDArray[np.float32]]
    """Each [2, k, …]."""
    distance_sum: float
    """Σ over IDs of importance times squared distance from the old embedding to the new centroid."""
    num_changed: int
    """How many IDs got another codebook row."""
    cluster_sizes: npt.NDArray[np.int64]
    """[k]: how many IDs each codebook row has."""


def train_column(
    weights: npt.NDArray[np.float32],
    *,
    sample_codes: npt.NDArray[np.unsignedinteger],
    sample_weights: npt.NDArray[np.float64],
    num_iterations: int,
    backend: Backend,
    seed: int,
    num_threads: int,
) -> TrainedColumn:
    """Train the centroids of one column.

    Args:
        weights: [2, k, w] float32, finite.
        sample_codes: [2, m], the old codes of the IDs that train.
        sample_weights: [m], positive.
        num_iterations, backend, seed, num_threads: of k-means.
    """
    # IDs with both codes in common are one point: k-means gets it once, with their weight.
    num_rows = weights.shape[1]
    old, helper = sample_codes.astype(np.int64)
    pairs, inverse = np.unique(_pair(old, helper, num_rows), return_inverse=True)
    pair_weights = np.bincount(inverse.ravel(), sample_weights).astype(np.float64, copy=False)
    old, points = pairs // num_rows, _embed(weights, pairs // num_rows, pairs % num_rows)
    centroids = kmeans(
        points,
        num_rows,
        seed=seed,
        weights=(pair_weights / pair_weights.mean()).astype(np.float32),  # any unit fits float32 so
        num_iterations=num_iterations,
        num_threads=num_threads,
        backend=backend,
    )
    labels, distances = NearestCentroid(centroids)(points)
    share = pair_weights / pair_weights.sum()
    return TrainedColumn(
        centroids=centroids[match_labels(old, labels, pair_weights, num_labels=len(centroids))],
        errors=SampleErrors(
            new=float(share @ distances),
            parent=_error_within(points, share, old),
            total=_error_within(points, share, np.zeros_like(old)),
        ),
    )


def _error_within(
    points: npt.NDArray[np.float32], shares: npt.NDArray[np.float64], groups: npt.NDArray[np.int64]
) -> float:
    """Σ of `shares: [m]` times the squared distance of `points: [m, w]` to the mean of their group."""
    sizes = np.bincount(groups, shares)
    error = 0.0
    for values in points.T.astype(np.float64):
        means = np.bincount(groups, shares * values) / np.where(sizes > 0, sizes, 1.0)
        error += float(shares @ np.square(values - means[groups]))
    return error


class MemberMeans:
    """For given pointers: the mean, over the IDs of each codebook row, of their old embeddings in one column."""

    def __init__(self, weights: npt.NDArray[np.float32], *, num_ids: int) -> None:
        """Prepare for `weights: [2, k, w]` float32, finite, and at most `num_ids` IDs in all."""
        self._sum = TableSum(weights, num_ids)
        self._members = np.zeros(weights.shape[1], np.int64)

    def take(self, codes: npt.NDArray[np.int64], pointers: npt.NDArray[np.int64]) -> None:
        """Take in N IDs: `codes: [2, N]`, their old codebook and helper rows, and `pointers: [N]`, their new rows."""
        self._members += np.bincount(pointers, minlength=len(self._members))
        self._sum.add(pointers, *codes)

    def totals(self) -> npt.NDArray[np.int64]:
        """[t] int64; those of several portions of the IDs add up."""
        return np.concatenate([self._members, self._sum.totals.reshape(-1)])

    def means(self, totals: npt.NDArray[np.int64], otherwise: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """[k, w] from the `totals` of all IDs; rows without members as in `otherwise: [k, w]`."""
        members, sums = np.split(totals, [len(self._members)])
        return np.where(members[:, None] > 0, self._sum.mean(sums, members), otherwise).astype(np.float32)


def nearest_pairs(
    weights: npt.NDArray[np.float32],
    centroids: npt.NDArray[np.float32],
    start: int,
    stop: int,
    out: npt.NDArray[np.void],
) -> None:
    """Write the nearest centroid of the embeddings `start … stop − 1` of a column's k² to `out: [m]` PAIR.

    Embedding `i` is the sum of old codebook row `i // k` and old helper row `i % k`.
    """
    num_rows = weights.shape[1]
    nearest = NearestCentroid(centroids)
    for first in range(start, stop, _PAIRS_AT_A_TIME):
        pairs = np.arange(first, min(first + _PAIRS_AT_A_TIME, stop))
        part = out[first - start :][: len(pairs)]
        part["code"], part["distance"] = nearest(_embed(weights, pairs // num_rows, pairs % num_rows))


class ColumnAssigner:
    """Gives IDs of one column their nearest centroids, and sums up what the new tables are made of.

    IDs may come in any portions, in any order and to any number of assigners: every sum over them is of integers, and
    the `totals` of several assigners add up.
    """

    def __init__(
        self,
        weights: npt.NDArray[np.float32],
        row_states: Mapping[str, npt.NDArray[np.float32]],
        centroids: npt.NDArray[np.float32],
        *,
        num_ids: int,
        total_importance: float,
        residual_helper: bool,
    ) -> None:
        """Prepare.

        Args:
            weights: [2, k, w] float32, finite.
            row_states: each [2, k, …] float32, finite.
            centroids: [k', w] float32: the new codebook.
            num_ids: IDs of the table.
            total_importance: the sum of the importances of all IDs of the table.
            residual_helper: whether the new helper rows start at mean residuals, not at zero.
        """
        self._old = weights
        self._num_rows = weights.shape[1]
        self._residual_helper = residual_helper
        self._centroids = centroids
        self._codebook = np.zeros_like(weights[0])
        self._codebook[: len(centroids)] = centroids
        self._members = np.zeros(self._num_rows, np.int64)
        self._num_changed = 0
        # No distance is longer than the diagonal of the box around the old embeddings and the centroids, up to the
        # rounding of the distance itself. (float32 sums are monotonic: that of the largest terms is the largest.)
        highest, lowest = weights.max(axis=1).sum(axis=0), weights.min(axis=1).sum(axis=0)
        reach = np.maximum(
            highest - centroids.min(axis=0).astype(np.float64), centroids.max(axis=0) - lowest.astype(np.float64)
        )
        self._distance_unit = FixedPoint(float(np.square(reach).sum()) * 1.001 * total_importance)
        self._distance_sum = 0
        self._states = {
            name: TableSum(state.reshape(2, self._num_rows, -1), num_ids) for name, state in row_states.items()
        }
        self._state_shapes = {name: state.shape for name, state in row_states.items()}
        self._residuals = TableSum(np.stack([weights[0], weights[1], -self._codebook]), num_ids)
        self._helper_members = np.zeros(self._num_rows, np.int64)

    def take(
        self,
        codes: npt.NDArray[np.int64],
        *,
        helper_codes: npt.NDArray[np.int64] | None,
        importances: npt.NDArray[np.float64] | None,
        pairs: npt.NDArray[np.void] | None = None,
        pointers: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Take in N IDs that no assigner of this column was given before.

        Args:
            codes: [2, N] int64, their old codebook and helper rows.
            helper_codes: [N] int64, their new helper rows; read for residual helpers only.
            importances: [N] float64, or None for 1 each.
            pairs: [k²] PAIR, from `nearest_pairs`, to look the answers up in.
            pointers: [N] int64, new codebook rows to give them instead of the nearest.

        Returns:
            pointers: [N] int64, their new codebook rows.
        """
        old, helper = codes
        if pointers is not None:
            gaps = self._embed(old, helper) - self._codebook[pointers]
            distances = np.einsum("nw,nw->n", gaps, gaps)
        elif pairs is not None:
            found = pairs[_pair(old, helper, self._num_rows)]
            pointers, distances = found["code"].astype(np.int64), found["distance"]
        else:
            pointers, distances = self._nearest(self._embed(old, helper))
        costs = distances.astype(np.float64) if importances is None else distances * importances
        self._distance_sum += int(self._distance_unit.encode(costs).sum())
        self._num_changed += int(np.count_nonzero(pointers != old))
        self._members += np.bincount(pointers, minlength=self._num_rows)
        for state in self._states.values():
            state.add(pointers, old, helper)
        if self._residual_helper:
            assert helper_codes is not None
            self._residuals.add(helper_codes, old, helper, pointers)
            self._helper_members += np.bincount(helper_codes, minlength=self._num_rows)
        return pointers

    def totals(self) -> npt.NDArray[np.int64]:
        """[t] int64: all sums over the IDs taken in. `t` is the same for all assigners of a column."""
        sums = [self._members, self._helper_members, self._residuals.totals]
        sums += [state.totals for state in self._states.values()]
        return np.concatenate([[self._num_changed, self._distance_sum], *(part.reshape(-1) for part in sums)])

    def result(self, totals: npt.NDArray[np.int64]) -> ColumnResult:
        """The new tables from the `totals` of every ID of the table."""
        k = self._num_rows
        (num_changed, distance_sum), members, helper_members, rest = np.split(totals, [2, 2 + k, 2 + 2 * k])
        residuals, rest = np.split(rest, [self._residuals.totals.size])
        new_helper = self._residuals.mean(residuals, helper_members)  # all zero unless residuals were added
        row_states = {}
        for name, state in self._states.items():
            sums, rest = np.split(rest, [state.totals.size])
            codebook = state.mean(sums, 2 * members)  # 2: each member adds the states of two rows
            row_states[name] = np.stack([codebook, np.zeros_like(codebook)]).reshape(self._state_shapes[name])
        return ColumnResult(
            weights=np.stack([self._codebook, new_helper]),
            row_states=row_states,
            distance_sum=float(self._distance_unit.decode(distance_sum)),
            num_changed=int(num_changed),
            cluster_sizes=members,
        )

    @cached_property
    def _nearest(self) -> NearestCentroid:
        return NearestCentroid(self._centroids)

    def _embed(self, old: npt.NDArray[np.int64], helper: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return _embed(self._old, old, helper)


def _pair(old: npt.NDArray[np.int64], helper: npt.NDArray[np.int64], num_rows: int) -> npt.NDArray[np.int64]:
    pairs: npt.NDArray[np.int64] = old * num_rows + helper
    return pairs


def _embed(
    weights: npt.NDArray[np.float32], old: npt.NDArray[np.int64], helper: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    embeddings: npt.NDArray[np.float32] = weights[0, old] + weights[1, helper]
    return embeddings


def match_labels(
    old: npt.NDArray[np.int64], new: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], *, num_labels: int
) -> npt.NDArray[np.int64]:
    """An order of the new labels in which as many points as can easily be had keep their old label.

    The pairs of an old and a new label are taken from the heaviest down, where both are still free: at least half of
    what the best matching keeps. Labels left over fill the gaps in ascending order.

    Args:
        old: [m] int64; labels that are not below `num_labels` match nothing.
        new: [m] int64, below `num_labels`.
        weights: [m], positive.
        num_labels: k'.

    Returns:
        order: [k'] int64, a permutation: the new label that gets each number.
    """
    keys, inverse = np.unique(old * num_labels + new, return_inverse=True)
    overlaps = np.bincount(inverse.ravel(), weights)
    heaviest = keys[np.argsort(-overlaps, kind="stable")]
    order = np.full(num_labels, -1, np.int64)
    taken = np.zeros(num_labels, np.bool_)
    _take_free(heaviest, order, taken)
    order[order < 0] = np.flatnonzero(~taken)
    return order


@jit
def _take_free(keys: npt.NDArray[np.int64], order: npt.NDArray[np.int64], taken: npt.NDArray[np.bool_]) -> None:
    num_labels = len(order)
    for key in keys:
        number, label = key // num_labels, key % num_labels
        if number < num_labels and order[number] < 0 and not taken[label]:
            order[number] = label
            taken[label] = True
