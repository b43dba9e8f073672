"""Searches on a GPU with stand-ins for faiss-gpu: the same bits as on the CPU, however the GPU rounds.

What they find is computed in float32 by the expanded form, as faiss-gpu does it. That it is as exact as that, only
`tests/gpu` can say.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.near_ties import KINDS, Made, assert_same_bits, by_definition, gaussian
from torchrec_cce.clustering.kmeans import gpu, nearest
from torchrec_cce.clustering.kmeans.gpu import GpuSearch
from torchrec_cce.clustering.kmeans.kmeans import kmeans
from torchrec_cce.clustering.kmeans.nearest import NearestCentroid
from torchrec_cce.clustering.kmeans.scores import Scores

Floats = npt.NDArray[np.float32]


class Gpus:
    """As much of FAISS as is asked for, with two GPUs."""

    def __init__(self, rounded: Callable[[Floats], Floats] = lambda values: values, *, wrong_by: float = 0) -> None:
        """Numbers are rounded before they are multiplied, and distances off by so many `(d + 3)us²`, here and there."""
        self.GpuIndexFlatConfig, self.devices = SimpleNamespace, list[int]()
        self.rounded, self.wrong_by = rounded, wrong_by

    def get_num_gpus(self) -> int:
        return 2

    def StandardGpuResources(self) -> Any:
        return SimpleNamespace(setTempMemory=lambda _: None)

    def GpuIndexFlatL2(self, _resources: Any, _width: int, config: Any) -> Any:
        self.devices.append(config.device)
        index = SimpleNamespace()
        index.add = lambda vectors: setattr(index, "vectors", vectors)
        index.search = lambda points, count: self._search(points, index.vectors, count)
        return index

    def _search(self, points: Floats, vectors: Floats, count: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        lengths = [np.square(each).sum(axis=1, dtype=np.float32) for each in (points, vectors)]
        products = self.rounded(points) @ self.rounded(vectors).T
        found = lengths[0][:, None] + lengths[1] - 2 * products
        if self.wrong_by:
            signs = np.where(np.arange(found.size).reshape(found.shape) * 7 % 3 == 0, -1, 1)
            longest = np.sqrt(lengths[0].astype(np.float64))[:, None] + np.sqrt(lengths[1].max())
            found = (found + signs * self.wrong_by * (points.shape[1] + 3) * 2.0**-24 * longest**2).astype(np.float32)
        order = np.argsort(found, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(found, order, axis=1), order


def tensor_float(values: Floats) -> Floats:
    """With ten digits of the mantissa, as tensor cores take float32 if they are let."""
    return (values.view(np.int32) & ~np.int32(0x1FFF)).view(np.float32)


def by(faiss: Gpus, points: Floats, centroids: Floats) -> tuple[npt.NDArray[np.int64], Floats, int]:
    """With how many points were left to the CPU."""
    codes, distances = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    with np.errstate(all="ignore"):
        undecided = GpuSearch(faiss, centroids)(points, codes, distances)
    rest = np.empty(len(undecided), np.int64), np.empty(len(undecided), np.float32)
    Scores(centroids)(points[undecided], *rest)
    codes[undecided], distances[undecided] = rest
    return codes, distances, len(undecided)


@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(KINDS),
    width=st.sampled_from([1, 4, 16]),
    rows=st.integers(2, 200),
    wrong_by=st.sampled_from([0, 0.5, -0.5]),
)
def test_answers_are_those_of_the_cpu_bit_for_bit(
    seed: int, kind: Callable[..., Made], width: int, rows: int, wrong_by: float
) -> None:
    centroids, points = kind(np.random.default_rng(seed), rows, 50, width)
    codes, distances, _ = by(Gpus(wrong_by=wrong_by), points, centroids)
    assert_same_bits((codes, distances), by_definition(points, centroids))


def test_a_gpu_decides_nearly_always_but_for_ties() -> None:
    rng = np.random.default_rng(0)
    for offset in (0, 1e3):
        centroids, points = gaussian(rng, 500, 8, offset=offset), gaussian(rng, 5000, 8, offset=offset)
        codes, distances, undecided = by(Gpus(), points, centroids)
        assert undecided < 50
        assert_same_bits((codes, distances), by_definition(points, centroids))
    assert by(Gpus(), points, np.concatenate([centroids, centroids]))[2] == 5000


def test_a_gpu_that_rounds_more_than_it_may_decides_next_to_nothing() -> None:
    rng = np.random.default_rng(0)
    centroids, points = gaussian(rng, 500, 8), gaussian(rng, 2000, 8)
    codes, distances, undecided = by(Gpus(tensor_float), points, centroids)
    assert undecided > 1900
    assert_same_bits((codes, distances), by_definition(points, centroids))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    gpus = Gpus()
    monkeypatch.setattr(gpu, "faiss_on_gpu", lambda: gpus)
    monkeypatch.setattr(gpu, "MIN_CENTROIDS", 20)
    monkeypatch.setattr(nearest, "MIN_POINTS", 100)
    monkeypatch.setenv("LOCAL_RANK", "0")
    return gpus


def test_large_searches_go_to_the_gpu_of_the_rank(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centroids, points = gaussian(rng, 40, 4), gaussian(rng, 300, 4)
    for local_rank, device in (("0", 0), ("1", 1), ("2", 0)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert_same_bits(NearestCentroid(centroids)(points), by_definition(points, centroids))
        assert gpus.devices.pop() == device
    NearestCentroid(centroids[:19])(points)
    monkeypatch.delenv("LOCAL_RANK")  # a worker of a job
    NearestCentroid(centroids)(points)
    assert not gpus.devices


def test_centroids_are_those_of_the_cpu(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    points = gaussian(np.random.default_rng(0), 1000, 4)
    found = kmeans(points, 30, seed=0)
    assert gpus.devices
    monkeypatch.setattr(gpu, "faiss_on_gpu", lambda: None)
    np.testing.assert_array_equal(found, kmeans(points, 30, seed=0))


@pytest.mark.parametrize("step", ["GpuIndexFlatL2", "_search"])
def test_a_full_gpu_leaves_it_to_the_cpu(
    step: str, gpus: Gpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("Error in allocMemory: out of memory")

    monkeypatch.setattr(gpus, step, full)
    centroids, points = (gaussian(np.random.default_rng(seed), count, 4) for seed, count in ((0, 40), (1, 300)))
    assert_same_bits(NearestCentroid(centroids)(points), by_definition(points, centroids))
    assert "no room on the GPU: Error in allocMemory: out of memory" in caplog.text


def test_points_that_are_no_numbers_are_refused(gpus: Gpus) -> None:
    centroids, points = (gaussian(np.random.default_rng(seed), count, 4) for seed, count in ((0, 40), (1, 300)))
    points[7, 2] = np.nan
    with pytest.raises(nearest.ClusteringError, match="1 of 300 points are NaN"):
        NearestCentroid(centroids)(points)
    assert gpus.devices == [0]


def test_faiss_clusters_on_the_gpu_of_the_rank_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the GPU build: that the index is the GPU's, not what it finds."""
    faiss, made = pytest.importorskip("faiss"), []

    def gpu_index(_resources: object, width: int, config: Any) -> Any:
        made.append(config.device)
        return faiss.IndexFlatL2(width)

    gpus = Gpus()
    for name in ("get_num_gpus", "StandardGpuResources", "GpuIndexFlatConfig"):
        monkeypatch.setattr(faiss, name, getattr(gpus, name), raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatL2", gpu_index, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    points = gaussian(np.random.default_rng(0), 500, 4)
    assert kmeans(points, 10, seed=0, backend="faiss").shape == (10, 4)
    assert made == [1]
