"""Speed of the nearest centroid and of k-means, against FAISS. One thread, CPU time, interleaved, medians.

The points are sums of two rows, as those of a CCE column are: a codebook and a smaller helper. So are the centroids.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import faiss
import numpy as np
import numpy.typing as npt

from benchmarks.figure import race, report
from tests.support.kernel_references import reference_nearest
from torchrec_cce.clustering.kmeans.kmeans import kmeans
from torchrec_cce.clustering.kmeans.nearest import NearestCentroid
from torchrec_cce.clustering.settings import Backend

BLOCK, ITERATIONS = 65536, 10
"""FAISS is as fast as it gets in blocks of 65,536: twice and four times as many take as long a point."""
CHECKED = 2000
NEAREST = [(width, num_rows) for width in (4, 8, 16) for num_rows in (256, 1024, 4096, 65536)]
KMEANS = [(4, 4096, 500_000), (8, 4096, 500_000), (16, 1024, 200_000)]
TARGETS = {(4, 65536): 10.0}
LEAST = 0.95
"""The target of all other tables."""

Points = npt.NDArray[np.float32]


def column(rng: np.random.Generator, num_rows: int, width: int, count: int) -> Points:
    """[count, width]: points of a column whose tables have `num_rows` random rows."""
    codebook, helper = rng.standard_normal((num_rows, width)), 0.3 * rng.standard_normal((num_rows, width))
    picked = codebook[rng.integers(0, num_rows, count)] + helper[rng.integers(0, num_rows, count)]
    return picked.astype(np.float32)


def num_wrong(points: Points, centroids: Points, codes: npt.NDArray[np.int64]) -> int:
    """How many of `codes` are not the nearest in float64; ties within float32 are right."""
    wrong, size = 0, max(1, 2**24 // centroids.size)
    for start in range(0, len(points), size):
        part, chosen = points[start : start + size], centroids[codes[start : start + size]]
        found = np.square(part.astype(np.float64) - chosen).sum(axis=1)
        wrong += int(np.count_nonzero(found > reference_nearest(part, centroids)[1] * (1 + 1e-6)))
    return wrong


def nearest_speed(width: int, num_rows: int) -> None:
    rng = np.random.default_rng(0)
    points = column(rng, num_rows, width, BLOCK + num_rows)
    centroids, points = points[:num_rows], points[num_rows:]
    nearest, flat = NearestCentroid(centroids), faiss.IndexFlatL2(width)
    flat.add(centroids)
    rounds = 7 if num_rows * width <= 2**16 else 3
    seconds = race({"ours": lambda: nearest(points), "FAISS": lambda: flat.search(points, 1)}, rounds=rounds)
    ratio, target = seconds["FAISS"] / seconds["ours"], TARGETS.get((width, num_rows), LEAST)
    what = f"nearest of {num_rows} centroids, {width} floats"
    report(
        f"{what}, times as fast",
        ratio,
        target=f"≥ {target:g}",
        holds=ratio >= target,
        against=f"FAISS IndexFlatL2, {BLOCK} points at a time, one thread",
    )
    report(f"{what}, ns a point", seconds["ours"] / BLOCK * 1e9, against=f"FAISS {seconds['FAISS'] / BLOCK * 1e9:.0f}")
    checked = points[: min(CHECKED, 2**28 // centroids.size)]
    wrong = num_wrong(checked, centroids, nearest(checked)[0])
    report(f"{what}, wrong of {len(checked)}", wrong, target="= 0", holds=wrong == 0, against="float64")


def sums_speed(width: int = 4) -> None:
    """With points that are sums of a row of each of two tables, the centroids being one of them."""
    rng = np.random.default_rng(0)
    for num_rows, least in ((4096, 0.95), (65536, 5.0)):
        codewords = rng.normal(size=(2, num_rows, width)).astype(np.float32)
        codes = rng.integers(0, num_rows, (2, BLOCK))
        points, centroids = codewords[0, codes[0]] + codewords[1, codes[1]], codewords[0]
        nearest, flat = NearestCentroid(centroids), faiss.IndexFlatL2(points.shape[1])
        flat.add(centroids)
        seconds = race({"ours": lambda: nearest(points), "faiss": lambda: flat.search(points, 1)}, rounds=5)  # noqa: B023
        times = seconds["faiss"] / seconds["ours"]
        report(
            f"nearest centroid, k = {num_rows}, d = {points.shape[1]}: times as fast as FAISS",
            times,
            target=f"≥ {least}",
            holds=times >= least,
            against=f"IndexFlatL2, blocks of {BLOCK}, one thread: {1e9 * seconds['faiss'] / BLOCK:.0f} ns a point",
        )
        sample = points[:CHECKED]
        wrong = num_wrong(sample, centroids, nearest(sample)[0])
        report(
            f"nearest centroid, k = {num_rows}, d = {points.shape[1]}: wrong ones",
            wrong,
            target="0",
            holds=wrong == 0,
            against="float64 by brute force, 2000 points; ties within float32 aside",
        )


def kmeans_speed(width: int, num_rows: int, num_points: int) -> None:
    points = column(np.random.default_rng(0), num_rows, width, num_points)
    found: dict[str, Points] = {}

    def run(backend: Backend) -> None:
        found[backend] = kmeans(points, num_rows, seed=1, num_iterations=ITERATIONS, backend=backend)

    seconds = race({"numba": lambda: run("numba"), "faiss": lambda: run("faiss")}, rounds=1)
    costs = {
        name: float(NearestCentroid(centroids)(points)[1].mean(dtype=np.float64)) for name, centroids in found.items()
    }
    ratio, worse = seconds["faiss"] / seconds["numba"], costs["numba"] / costs["faiss"] - 1
    what = f"k-means of {num_points:,} points, {num_rows} centroids, {width} floats, {ITERATIONS} iterations"
    report(
        f"{what}, times as fast", ratio, target="≥ 2", holds=ratio >= 2, against="FAISS from the same start, one thread"
    )
    report(f"{what}, seconds", seconds["numba"], against=f"FAISS {seconds['faiss']:.2f}")
    report(
        f"{what}, objective above FAISS's", worse, target="≤ 0.005", holds=worse <= 0.005, against="FAISS, same start"
    )


def nearest_figures() -> None:
    for width, num_rows in NEAREST:
        nearest_speed(width, num_rows)
    sums_speed()
    for width, num_rows, num_points in KMEANS:
        kmeans_speed(width, num_rows, num_points)


if __name__ == "__main__":
    nearest_figures()
