"""`GpuSearch`: nearest centroids by faiss-gpu on this rank's own GPU, where its rounding leaves no doubt."""

import functools
import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.kmeans.simd import LANES, at_most, float_of, lowest_bit, smallest
from torchrec_cce.clustering.kmeans.tiles import pack_tiles, to_tile
from torchrec_cce.extras import require
from torchrec_cce.jit import jit

MIN_CENTROIDS, MIN_POINTS = 1024, 4096
"""From which a search is left to a GPU: what a core does with fewer in a millisecond pays for no copies there and back.
A guess, as no GPU was at hand to measure on."""
_RANK = "LOCAL_RANK"
"""In the environment: the number of this rank among those of its host, as torchrun sets it."""
_DRIVER = Path("/proc/driver/nvidia/gpus")
_SCRATCH_BYTES = 64 << 20
"""Of FAISS on the GPU, which would take 1.5 GB of what a model trains in."""
_SMALLEST = 2.0**-100
"""Far above what float32 rounds to zero, as GPUs may do with more than CPUs."""
_ONE_AT_A_TIME = Lock()  # FAISS's resources are for one thread
_NO_ROOM = "the CPU clusters, as FAISS has no room on the GPU: %s"
_log = logging.getLogger(__name__)


@functools.cache
def faiss_on_gpu() -> Any | None:
    """FAISS, if it is installed for GPUs and sees one. Where the system has no GPU, it is not even imported."""
    if not _DRIVER.is_dir() or not any(_DRIVER.iterdir()) or find_spec("faiss") is None:
        return None
    faiss = require("faiss", "cuda")
    return faiss if num_gpus(faiss) else None


def num_gpus(faiss: Any) -> int:
    """That FAISS sees; builds for CPUs do not even have the question."""
    return int(getattr(faiss, "get_num_gpus", int)())


def gpu_index(faiss: Any, width: int) -> Any:
    """An empty exact index for vectors of `width` floats on this rank's own GPU, the first if it is none."""
    device = int(os.environ.get(_RANK, "0")) % num_gpus(faiss)
    config = faiss.GpuIndexFlatConfig()
    config.device = device
    config.use_cuvs = False  # whose distances are rounded in other ways
    return faiss.GpuIndexFlatL2(_resources(faiss, device), width, config)


@functools.cache
def _resources(faiss: Any, device: int) -> Any:  # noqa: ARG001  one for each device
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_SCRATCH_BYTES)
    return resources


class GpuSearch:
    """Centroids around their mean, on the GPU.

    A point's two lowest squared distances by FAISS decide which centroid is nearest in float32, as the CPU measures it,
    if they are further apart than both can be wrong. Below, d is the width, u = 2^-24, x and y are a point and a
    centroid around the centre, s = |x| + max |y|, and terms of u² are left out, for which there is room at the end.

    - x and y were rounded, each coordinate by at most u times itself, which moves |x − y|² by at most 2us².
    - FAISS computes |x|² + |y|² − 2x·y in float32, in some order: off by at most (d + 3)us².
    - The CPU computes Σ (x − y)² of what was not rounded: off by at most (d + 2)us².

    So the two differ by at most E = (2d + 10)us². Where the GPU's lowest is more than 2E below its second lowest, the
    CPU would find the same centroid nearest, and alone so. And where what FAISS computed is not within E of what the
    CPU measures, it has rounded otherwise, and decides nothing.
    """

    def __init__(self, faiss: Any, centroids: npt.NDArray[np.float32]) -> None:
        """Prepare `centroids: [k, d] float32`, finite, of which there are at least two."""
        self._centre = centroids.mean(axis=0, dtype=np.float64).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            around = centroids - self._centre
            self._longest = np.sqrt(np.square(around.astype(np.float64)).sum(axis=1).max())
        self._tiles, self._measure = pack_tiles(centroids), _measure(centroids.shape[1])
        with _ONE_AT_A_TIME:
            self._index = gpu_index(faiss, centroids.shape[1])
            self._index.add(around)

    def __call__(
        self, points: npt.NDArray[np.float32], codes: npt.NDArray[np.int64], distances: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.int64]:
        """Write the nearest centroids of `points: [N, d]`, C-contiguous, to `codes: [N]` and `distances: [N]`.

        Returns the indices of the points that are left undecided, of which what was written means nothing.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            around = points - self._centre
            try:
                with _ONE_AT_A_TIME:
                    lowest, nearest = self._index.search(around, 2)
            except RuntimeError as error:
                _log.warning(_NO_ROOM, error)
                return np.arange(len(points))
            self._measure(points, self._tiles, np.maximum(nearest[:, 0], 0), codes, distances)
            lengths = np.sqrt(np.square(around, dtype=np.float64).sum(axis=1)) + self._longest
            allowed = (2 * points.shape[1] + 10) * 2.0**-24 * np.square(lengths) + _SMALLEST
            first, second = lowest.astype(np.float64).T
            decided = (
                (second - first > 2 * allowed) & (np.abs(first - distances) <= allowed) & (codes == nearest[:, 0])
            )  # NaN decides nothing
        return np.flatnonzero(~decided)


def gpu_search(centroids: npt.NDArray[np.float32]) -> GpuSearch | None:
    """For a table that is worth it; None in a process that is no rank with a GPU, or if that has no memory left.

    Workers of jobs are none: each of them would take as much of one GPU as CUDA itself needs.
    """
    faiss = faiss_on_gpu() if _RANK in os.environ and len(centroids) >= MIN_CENTROIDS else None
    if faiss is None:
        return None
    try:
        return GpuSearch(faiss, centroids)
    except RuntimeError as error:
        _log.warning(_NO_ROOM, error)
        return None


@functools.cache
def _measure(width: int) -> Callable[..., None]:
    """`(points, tiles, given, codes, distances)`: of the tile that centroid `given: [N]` is in, the first centroid at
    the smallest float32 distance, and that distance, with the bits of `Scores` and `Cells`."""

    @jit
    def measure(
        points: npt.NDArray[np.float32],
        tiles: npt.NDArray[np.float32],
        given: npt.NDArray[np.int64],
        codes: npt.NDArray[np.int64],
        distances: npt.NDArray[np.float32],
    ) -> None:
        for point in range(points.shape[0]):
            tile = given[point] // LANES
            to_centroids = to_tile(tiles, tile, points, point, width)
            nearest = smallest(to_centroids)
            codes[point] = tile * LANES + lowest_bit(at_most(to_centroids, nearest))
            distances[point] = float_of(nearest)

    return measure
