"""k-means of every back end: as good as scikit-learn, the same for any number of threads, and clear errors."""

import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_cce.clustering.kmeans import kmeans as module
from torchrec_cce.clustering.kmeans.kmeans import FUSED_MIN_FLOATS, kmeans
from torchrec_cce.clustering.kmeans.lloyd import first_distinct
from torchrec_cce.clustering.kmeans.nearest import NearestCentroid
from torchrec_cce.clustering.settings import Backend
from torchrec_cce.errors import ClusteringError, ConfigError

faiss = pytest.importorskip("faiss")
cluster = pytest.importorskip("sklearn.cluster")
threadpool_limits = pytest.importorskip("threadpoolctl").threadpool_limits


def objective(
    points: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32], weights: npt.NDArray[np.float32] | None = None
) -> float:
    return float(np.average(NearestCentroid(centroids)(points)[1].astype(np.float64), weights=weights))


def sums_of_two(rng: np.random.Generator, num_points: int, width: int, spread: float = 0.05) -> npt.NDArray[np.float32]:
    """What CCE columns look like: one of a few large vectors and one of a few small ones, and some noise."""
    large, small = rng.standard_normal((30, width)), 0.3 * rng.standard_normal((30, width))
    noise = spread * rng.standard_normal((num_points, width))
    picked = large[rng.integers(0, 30, num_points)] + small[rng.integers(0, 30, num_points)]
    return (picked + noise).astype(np.float32)


def start(
    points: npt.NDArray[np.float32], num_rows: int, seed: int, weights: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32]:
    """The first centroids that `kmeans` takes."""
    rng = np.random.default_rng(seed)
    return points[first_distinct(points, module._random_order(len(points), weights, rng), num_rows)[0]]


def of_scikit_learn(
    points: npt.NDArray[np.float32],
    first: npt.NDArray[np.float32],
    num_iterations: int,
    weights: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.float64]:
    """The centroids after so many iterations from `first`; none of the clusters may run empty on the way."""
    model = cluster.KMeans(len(first), init=first.astype(np.float64), n_init=1, max_iter=num_iterations, tol=0)
    with threadpool_limits(1):  # on a busy machine several wait for each other
        model.fit(points.astype(np.float64), sample_weight=weights)
    return model.cluster_centers_


BACKENDS: list[Backend] = ["numba", "faiss", "sklearn"]


@pytest.mark.parametrize("backend", ["numba", "sklearn"])
@pytest.mark.parametrize("num_iterations", [1, 2, 7, 50])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("num_points", "num_rows", "width"), [(3000, 40, 1), (3000, 50, 4), (5000, 60, 16)])
def test_same_start_same_centroids_as_scikit_learn(
    num_points: int, num_rows: int, width: int, weighted: bool, num_iterations: int, backend: Backend
) -> None:
    """After the same number of iterations, in the same order."""
    rng = np.random.default_rng(width)
    points = sums_of_two(rng, num_points, width, spread=0.3)
    weights = rng.uniform(0.5, 3, num_points).astype(np.float32) if weighted else None
    expected = of_scikit_learn(points, start(points, num_rows, 5, weights), num_iterations, weights)
    found = kmeans(points, num_rows, seed=5, weights=weights, num_iterations=num_iterations, backend=backend)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["numba", "sklearn"])
@pytest.mark.parametrize("weighted", [False, True])
def test_same_centroids_as_scikit_learn_of_many_duplicates(weighted: bool, backend: Backend) -> None:
    """Copies of 300 points, some of weight zero, which scikit-learn must not be given."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((300, 3)).astype(np.float32)[rng.integers(0, 300, 4000)]
    weights = (rng.integers(0, 4, 4000) / np.float32(2)).astype(np.float32) if weighted else None
    counted = weights > 0 if weights is not None else np.ones(4000, bool)
    kept = weights[counted] if weights is not None else None
    expected = of_scikit_learn(points[counted], start(points[counted], 25, 3, kept), 20, kept)
    found = kmeans(points, 25, seed=3, weights=weights, num_iterations=20, backend=backend)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_points_than_centroids(backend: Backend) -> None:
    """scikit-learn refuses them; here they are the centroids, each once."""
    points = np.array([[3, 1], [1, 2], [3, 1], [2, 0]], np.float32)
    weights = np.array([1, 1, 1, 0], np.float32)
    with pytest.raises(ValueError, match="n_samples=4 should be >= n_clusters=5"):
        of_scikit_learn(points, np.zeros((5, 2), np.float32), 1, None)
    assert kmeans(points, 5, seed=0, backend=backend).tolist() == [[1, 2], [2, 0], [3, 1]]
    assert kmeans(points, 3, seed=0, backend=backend).tolist() == [[1, 2], [2, 0], [3, 1]]
    assert kmeans(points, 5, seed=0, weights=weights, backend=backend).tolist() == [[1, 2], [3, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_points", "num_rows", "width"), [(2000, 40, 2), (6000, 64, 4), (4000, 50, 8), (40000, 30, 4)]
)
def test_objective_is_that_of_scikit_learn(num_points: int, num_rows: int, width: int, backend: Backend) -> None:
    # So much noise that the start matters little: over 12 starts, ours and theirs differ by at most 0.6 %.
    points = sums_of_two(np.random.default_rng(width), num_points, width, spread=0.5)
    ours, theirs = [], []
    for seed in range(3):
        centroids = kmeans(points, num_rows, seed=seed, backend=backend)
        assert centroids.shape == (num_rows, width)
        assert centroids.dtype == np.float32
        ours.append(objective(points, centroids))
        with threadpool_limits(1):
            model = cluster.KMeans(num_rows, init="random", n_init=1, max_iter=50, tol=0, random_state=seed).fit(points)
        theirs.append(model.inertia_ / num_points)
    assert np.mean(ours) < 1.03 * np.mean(theirs)


@pytest.mark.parametrize(("num_rows", "width"), [(256, 2), (256, 4), (300, 8), (256, 16), (1100, 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_objective_is_that_of_faiss(num_rows: int, width: int, weighted: bool) -> None:
    backends: list[Backend] = ["numba", "faiss"]
    rng = np.random.default_rng(width)
    points = sums_of_two(rng, 40 * num_rows, width)
    weights = rng.random(len(points)).astype(np.float32) if weighted else None
    costs = [
        [
            objective(points, kmeans(points, num_rows, seed=seed, weights=weights, backend=backend), weights)
            for seed in range(3)
        ]
        for backend in backends
    ]
    assert np.mean(costs[0]) < 1.005 * np.mean(costs[1])


def test_separated_clusters_are_found() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [10, 0], [0, 10]])
    points = (np.repeat(centres, 200, axis=0) + 0.1 * rng.standard_normal((600, 2))).astype(np.float32)
    for seed in range(20):
        centroids = kmeans(points, 3, seed=seed)
        if objective(points, centroids) < 0.1:
            expected = points.reshape(3, 200, 2).mean(axis=1)
            np.testing.assert_allclose(centroids[np.argsort(centroids @ [1, 2])], expected, atol=1e-3)
            return
    pytest.fail("20 random starts, and none found three far clusters")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [100, 1e4])
def test_far_from_the_origin_it_is_as_good(offset: float, backend: Backend) -> None:
    """FAISS alone loses the clusters here: float32 cancels in its expanded distances."""
    near = sums_of_two(np.random.default_rng(0), 5000, 4)
    far = (near + offset).astype(np.float32)
    found = kmeans(far, 64, seed=3, backend=backend)
    assert objective(far, found) < 1.03 * objective(near, kmeans(near, 64, seed=3)) + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exponent", [-60, 60])
def test_scale_does_not_matter(exponent: int, backend: Backend) -> None:
    points = sums_of_two(np.random.default_rng(0), 3000, 4)
    scaled = np.ldexp(points, exponent).astype(np.float32)
    found = kmeans(scaled, 20, seed=0, backend=backend)
    np.testing.assert_array_equal(found, np.ldexp(kmeans(points, 20, seed=0, backend=backend), exponent))


@pytest.mark.parametrize(("num_points", "width"), [(100, 2), (3000, 4), (31_999, 4), (40_000, 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_faiss_always_gets_enough_points_for_its_fast_kernel(
    num_points: int, width: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []
    original = faiss.Clustering.train

    def train(self: Any, points: npt.NDArray[np.float32], index: Any, *weights: npt.NDArray[np.float32]) -> None:
        searched.append(points.size)
        original(self, points, index, *weights)

    monkeypatch.setattr(faiss.Clustering, "train", train)
    rng = np.random.default_rng(0)
    points = rng.standard_normal((num_points, width)).astype(np.float32)
    weights = rng.random(num_points).astype(np.float32) + 0.1 if weighted else None
    kmeans(points, 10, seed=0, weights=weights, num_iterations=2, backend="faiss")
    assert FUSED_MIN_FLOATS <= searched[0] < FUSED_MIN_FLOATS + points.size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_points", [500, 50_000])
@pytest.mark.parametrize("weighted", [False, True])
def test_threads_change_nothing_and_their_number_is_put_back(num_points: int, weighted: bool, backend: Backend) -> None:
    rng = np.random.default_rng(0)
    points = sums_of_two(rng, num_points, 4)
    weights = rng.random(num_points).astype(np.float32) if weighted else None
    before = faiss.omp_get_max_threads()
    try:
        results = []
        for outside, threads in ((1, 1), (1, 2), (2, 1), (2, 3)):
            faiss.omp_set_num_threads(outside)
            results.append(kmeans(points, 70, seed=1, weights=weights, num_threads=threads, backend=backend))
            assert faiss.omp_get_max_threads() == outside
    finally:
        faiss.omp_set_num_threads(before)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_threads_are_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(faiss.Clustering, "train", fail)
    before = faiss.omp_get_max_threads()
    with pytest.raises(RuntimeError, match="out of memory"):
        kmeans(np.arange(20, dtype=np.float32)[:, None], 2, seed=0, num_threads=before + 1, backend="faiss")
    assert faiss.omp_get_max_threads() == before


def test_seed_chooses_the_start() -> None:
    points = sums_of_two(np.random.default_rng(0), 2000, 4)
    assert np.array_equal(kmeans(points, 30, seed=5), kmeans(points, 30, seed=5))
    assert not np.array_equal(kmeans(points, 30, seed=5), kmeans(points, 30, seed=6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_printed_or_warned(
    backend: Backend, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    kmeans(sums_of_two(np.random.default_rng(0), 60, 2), 50, seed=0, backend=backend)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_weights_are_repeats() -> None:
    """An integer weight is that many copies: the same centroids from the same start, here one that has converged."""
    rng = np.random.default_rng(0)
    points = sums_of_two(rng, 300, 2)
    repeats = rng.integers(1, 6, 300)
    weighted = [
        objective(points, kmeans(points, 12, seed=seed, weights=repeats.astype(np.float32)), repeats.astype(np.float32))
        for seed in range(8)
    ]
    repeated = [
        objective(np.repeat(points, repeats, axis=0), kmeans(np.repeat(points, repeats, axis=0), 12, seed=seed))
        for seed in range(8)
    ]
    assert np.mean(weighted) == pytest.approx(np.mean(repeated), rel=0.08)
    one = kmeans(points, 1, seed=0, weights=repeats.astype(np.float32))
    np.testing.assert_allclose(one[0], np.average(points, axis=0, weights=repeats), rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_small_weights_do_not_hang(scale: float, backend: Backend) -> None:
    """With a mean weight below one, and clusters that run empty, FAISS alone would draw forever."""
    rng = np.random.default_rng(0)
    points = np.concatenate([np.zeros((400, 2)), rng.standard_normal((60, 2))]).astype(np.float32)
    points[:400] += rng.standard_normal((400, 2)).astype(np.float32) * 1e-6
    weights = np.full(460, scale, np.float32)
    assert kmeans(points, 50, seed=0, weights=weights, backend=backend).shape == (50, 2)


def test_points_of_zero_weight_take_no_part() -> None:
    rng = np.random.default_rng(0)
    points = sums_of_two(rng, 1000, 3)
    outliers = np.full((100, 3), 1e6, np.float32)
    weights = np.concatenate([np.ones(1000), np.zeros(100)]).astype(np.float32)
    with_outliers = kmeans(np.concatenate([points, outliers]), 20, seed=0, weights=weights)
    np.testing.assert_array_equal(with_outliers, kmeans(points, 20, seed=0, weights=np.ones(1000, np.float32)))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), distinct=st.integers(1, 12), extra=st.integers(0, 5), count=st.integers(1, 60))
def test_few_distinct_points_are_the_centroids(seed: int, distinct: int, extra: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((distinct, 2)).astype(np.float32)
    points = values[rng.integers(0, distinct, count)]
    expected = np.unique(points, axis=0)
    np.testing.assert_array_equal(kmeans(points, len(expected) + extra, seed=seed), expected)


def test_zero_and_minus_zero_are_one_point() -> None:
    assert kmeans(np.array([[0.0], [-0.0]], np.float32), 2, seed=0).tolist() == [[0.0]]


def test_many_duplicates_do_not_hide_the_distinct_ones() -> None:
    points = np.zeros((50_000, 2), np.float32)
    points[:3] = [[1, 0], [2, 0], [3, 0]]
    np.testing.assert_array_equal(kmeans(points, 4, seed=0), [[0, 0], [1, 0], [2, 0], [3, 0]])
    assert kmeans(points, 3, seed=0).shape == (3, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_is_finite_where_clusters_run_empty(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    points = rng.integers(0, 3, (500, 4)).astype(np.float32)  # at most 81 distinct
    centroids = kmeans(points, 70, seed=0, backend=backend)
    assert centroids.shape == (70, 4)
    assert np.isfinite(centroids).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_is_an_error_that_says_how_many(value: float) -> None:
    points = np.zeros((10, 3), np.float32)
    points[2:4, 1] = value
    with pytest.raises(ClusteringError, match="2 of 10 points are NaN or infinite"):
        kmeans(points, 2, seed=0)
    with pytest.raises(ClusteringError, match="1 of 3 weights"):
        kmeans(np.zeros((3, 1), np.float32), 2, seed=0, weights=np.array([1, value, 1], np.float32))


@pytest.mark.parametrize(
    ("points", "num_rows", "options", "message"),
    [
        (np.zeros((4, 2)), 2, {}, "points are float64"),
        (np.zeros((4, 0), np.float32), 2, {}, "points are float32"),
        (np.zeros((0, 2), np.float32), 2, {}, "at least one point"),
        (np.zeros((4, 2), np.float32), 0, {}, "num_centroids=0"),
        (np.zeros((4, 2), np.float32), 1, {"num_iterations": 0}, "num_iterations=0"),
        (np.zeros((4, 2), np.float32), 1, {"num_threads": 0}, "num_threads=0"),
        (np.zeros((4, 2), np.float32), 1, {"backend": "torch"}, "backend='torch' is not one of"),
        (np.zeros((4, 2), np.float32), 1, {"weights": np.ones(3, np.float32)}, r"shape \[3\] for 4 points"),
        (np.zeros((2, 2), np.float32), 1, {"weights": np.array([-1, 1], np.float32)}, "1 of 2 weights are negative"),
        (
            np.zeros((2, 2), np.float32),
            1,
            {"weights": np.zeros(2, np.float32)},
            "at least one point of positive weight",
        ),
    ],
)
def test_refuses_what_cannot_work(
    points: npt.NDArray[np.float32], num_rows: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        kmeans(points, num_rows, seed=0, **options)


@pytest.mark.parametrize(
    ("backend", "module_name", "what"),
    [
        ("faiss", "faiss", "install torchrec-cce[cpu] or torchrec-cce[cuda]"),
        ("sklearn", "sklearn", "install torchrec-cce[sklearn]"),
        ("sklearn", "threadpoolctl", "install torchrec-cce[sklearn]"),
    ],
)
def test_works_without_a_library_and_says_what_to_install(backend: str, module_name: str, what: str) -> None:
    program = f"""
import sys
sys.modules["{module_name}"] = None
import numpy as np
from torchrec_cce.clustering import entropy, recluster
from torchrec_cce.clustering.kmeans import kmeans, nearest
points = np.arange(4, dtype=np.float32)[:, None]
print(kmeans.kmeans(points, 2, seed=0).shape)
try:
    kmeans.kmeans(points, 2, seed=0, backend="{backend}")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "(2, 1)" in done.stdout
    assert what in done.stdout
