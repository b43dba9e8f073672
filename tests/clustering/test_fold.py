"""The fold of residents' rows against a plain reference, in any cut; and the errors."""

from typing import Any

import numpy as np
import pytest

from torchrec_cce.clustering.executor import InProcess
from torchrec_cce.clustering.fold import ResidentRows, TableFold
from torchrec_cce.clustering.recluster import Reclustered, recluster_tables
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.errors import ClusteringError, ConfigError
from torchrec_cce.maps.residency import Residency

C, K, W, N = 4, 16, 3, 5000
RNG = np.random.default_rng(0)
CODEBOOK = RNG.normal(size=(C, K, W)).astype(np.float32)
POINTERS = RNG.integers(0, K, (N, C)).astype(np.uint8)
AGES = RNG.choice(np.array([0, 1, 2, 255], np.uint8), N)
RESIDENTS = np.flatnonzero(AGES == 0)
ROWS = (0.3 * RNG.normal(size=(len(RESIDENTS) + 3, C * W))).astype(np.float32)  # three that nobody has


def fold(
    *,
    residency: Residency | None = None,
    rows: Any = ROWS,
    codebook: np.ndarray = CODEBOOK,
    first: bool = False,
    pointers: np.ndarray = POINTERS,
    importances: np.ndarray | None = None,
    **settings: Any,
) -> TableFold:
    return TableFold(
        codebook=codebook,
        codes=lambda positions: pointers[positions],
        residents=ResidentRows(
            residency=residency or Residency(ages=AGES, phases=3, is_open=True), rows=rows, importances=importances
        ),
        is_first=first,
        row_states={"momentum": np.ones((C, 2, K), np.float32)},
        pointer_dtype=np.dtype(np.uint8),
        seed=1,
        config=ReclusterConfig(num_iterations=10, **settings),
    )


def folded(**arguments: Any) -> Reclustered:
    return recluster_tables(InProcess({"t": fold(**arguments)}))["t"]


def embeddings() -> np.ndarray:
    """[n, c, w] float64, before the fold."""
    found = np.stack([CODEBOOK[j][POINTERS[:, j]] for j in range(C)], axis=1).astype(np.float64)
    found[RESIDENTS] += ROWS[: len(RESIDENTS)].reshape(-1, C, W)
    return found


def test_every_id_points_at_the_codeword_nearest_to_what_it_was() -> None:
    done, before = folded(), embeddings()
    total = 0.0
    for column in range(C):
        distances = np.square(before[:, column, None] - done.weights[column, 0].astype(np.float64)).sum(axis=2)
        np.testing.assert_array_equal(done.pointers[:, column], distances.argmin(axis=1))
        np.testing.assert_array_equal(done.cluster_sizes[column], np.bincount(done.pointers[:, column], minlength=K))
        total += distances.min(axis=1).mean()
    assert done.objective == pytest.approx(total, rel=1e-5)
    assert done.share_changed == np.mean(done.pointers != POINTERS)
    assert not done.weights[:, 1].any()
    assert not done.row_states["momentum"].any()


@pytest.mark.parametrize("weighted", [False, True])
def test_codewords_are_means_of_residents_and_of_the_old_codewords_of_others_who_had_a_row(weighted: bool) -> None:
    """Lloyd's fixed point, by a plain loop: who never had a row has no say, nor has a row that was never trained."""
    importances = np.random.default_rng(2).exponential(size=len(ROWS)).astype(np.float32) if weighted else None
    masses = np.ones(N)
    if importances is not None:
        importances[:40] = 0
        mean = importances[: len(RESIDENTS)].mean(dtype=np.float64)
        masses[RESIDENTS] = importances[: len(RESIDENTS)] / mean
    done, before = folded(points_per_centroid=10**6, num_threads=1, importances=importances), embeddings()
    heard = (AGES != 255) & (masses > 0)
    for column in range(C):
        codewords = CODEBOOK[column].astype(np.float64)
        points, weights = before[heard, column], masses[heard, None]
        for _ in range(10):
            nearest = np.square(points[:, None] - codewords).sum(axis=2).argmin(axis=1)
            codewords = np.stack(
                [
                    (weights * points)[nearest == code].sum(axis=0) / weights[nearest == code].sum()
                    if (nearest == code).any()
                    else codewords[code]
                    for code in range(K)
                ]
            )
        np.testing.assert_allclose(done.weights[column, 0], codewords, atol=2e-5)


@pytest.mark.parametrize("importance", [0.0, 3.0])
def test_rows_that_matter_alike_count_alike(importance: float) -> None:
    """As where no row was trained."""
    found = folded(importances=np.full(len(ROWS), importance, np.float32))
    np.testing.assert_allclose(found.weights, folded().weights, atol=1e-6)


def test_importances_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ClusteringError, match="NaN or infinite"):
        folded(importances=np.full(len(ROWS), np.nan, np.float32))


@pytest.mark.parametrize(("chunk_size", "num_threads"), [(1, 1), (117, 3), (5000, 2)])
@pytest.mark.parametrize("points_per_centroid", [20, 10**6])
def test_the_same_bits_in_any_cut(chunk_size: int, num_threads: int, points_per_centroid: int) -> None:
    expected = folded(points_per_centroid=points_per_centroid, num_threads=1)
    found = folded(points_per_centroid=points_per_centroid, chunk_size=chunk_size, num_threads=num_threads)
    for name in ("weights", "pointers", "cluster_sizes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.objective, found.sample_errors) == (expected.objective, expected.sample_errors)


def test_it_does_not_matter_in_which_order_residents_came() -> None:
    order = np.random.default_rng(1).permutation(len(RESIDENTS)).astype(np.uint32)
    rows = np.empty_like(ROWS)
    rows[order], rows[len(RESIDENTS) :] = ROWS[: len(RESIDENTS)], np.nan
    came = Residency(ages=AGES, phases=3, is_open=True, order=order)
    for most in (20, 10**6):
        expected = folded(points_per_centroid=most)
        found = folded(points_per_centroid=most, residency=came, rows=rows, chunk_size=117)
        for name in ("weights", "pointers", "cluster_sizes"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert found.objective == expected.objective


def test_ranges_add_up_to_the_whole() -> None:
    whole, parts = fold(), fold()
    centroids = [column.centroids for column in whole.train(range(C))]
    pairs = np.empty(whole.num_pairs, [("code", np.uint32), ("distance", np.float32)])
    for start in range(0, whole.num_pairs, 13):
        stop = min(start + 13, whole.num_pairs)
        parts.nearest_pairs(centroids, start, stop, pairs[start:stop])
    at_once, in_parts = np.empty((2, N, C), np.uint8)
    totals = whole.assign(centroids, 0, N, at_once, pairs)
    sums = sum(parts.assign(centroids, a, b, in_parts[a:b], pairs) for a, b in ((0, 700), (700, 701), (701, N)))
    np.testing.assert_array_equal(in_parts, at_once)
    np.testing.assert_array_equal(sums, totals)


def test_the_first_fold_starts_from_the_residents() -> None:
    zero = np.zeros_like(CODEBOOK)
    ages = np.where(AGES == 0, 0, 255).astype(np.uint8)
    residency = Residency(ages=ages, phases=1, is_open=True)
    done = folded(codebook=zero, first=True, residency=residency, points_per_centroid=10**6)
    rows = ROWS[: len(RESIDENTS)].reshape(-1, C, W)
    for column in range(C):
        codewords = done.weights[column, 0]
        assert len(np.unique(codewords, axis=0)) == K
        distances = np.square(rows[:, column, None] - codewords).sum(axis=2)
        np.testing.assert_array_equal(done.pointers[RESIDENTS, column], distances.argmin(axis=1))
        nearest_to_zero = np.square(codewords).sum(axis=1).argmin()
        assert (np.delete(done.pointers[:, column], RESIDENTS) == nearest_to_zero).all()


def test_rows_that_moved_nothing_change_nothing() -> None:
    done = folded(rows=np.zeros_like(ROWS))
    np.testing.assert_allclose(done.weights[:, 0], CODEBOOK, atol=1e-6)
    np.testing.assert_array_equal(done.pointers, POINTERS)
    assert done.objective == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("first", [False, True])
def test_where_nobody_ever_had_a_row_nothing_changes(first: bool) -> None:
    nobody = Residency(ages=np.full_like(AGES, 255), phases=1, is_open=True)
    done = folded(residency=nobody, first=first)
    np.testing.assert_array_equal(done.weights[:, 0], CODEBOOK)
    np.testing.assert_array_equal(done.pointers, POINTERS)
    assert done.objective == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["rows", "codebook"])
def test_values_that_are_no_numbers_are_refused(bad: float, where: str) -> None:
    values = {"rows": ROWS.copy(), "codebook": CODEBOOK.copy()}
    values[where].flat[7] = bad
    with pytest.raises(ClusteringError, match="NaN or infinite"):
        fold(**values)


def test_rows_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=rf"rows are \[{len(ROWS)}, 11\], not \[m, 12\]"):
        fold(rows=ROWS[:, :11])
    with pytest.raises(ConfigError, match=rf"rows are \[5, 12\], not \[m, 12\] for {len(RESIDENTS)} residents"):
        fold(rows=ROWS[:5])
    with pytest.raises(ConfigError, match="no phase is open"):
        fold(residency=Residency(ages=AGES, phases=3))
