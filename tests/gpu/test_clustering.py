"""Nearest centroids by faiss-gpu against the CPU's: the same bits, so that maps are the same wherever they are made."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.support.module_cases import cce
from tests.support.near_ties import KINDS, Made, assert_same_bits, by_definition, gaussian
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.clustering.kmeans import gpu
from torchrec_cce.clustering.kmeans.gpu import GpuSearch, faiss_on_gpu
from torchrec_cce.clustering.kmeans.nearest import NearestCentroid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(faiss_on_gpu() is None, reason="FAISS sees no GPU, or is not installed for GPUs"),
]


@pytest.fixture(autouse=True)
def _rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.mark.parametrize("width", [1, 4, 16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_cpu_bit_for_bit(
    kind: Callable[..., Made], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "MIN_CENTROIDS", 2)
    centroids, points = kind(np.random.default_rng(0), 300, 5000, width)
    nearest = NearestCentroid(centroids)
    assert nearest._on_gpu is not None
    assert_same_bits(nearest(points), by_definition(points, centroids))


def test_a_gpu_decides_nearly_always() -> None:
    rng = np.random.default_rng(0)
    centroids, points = gaussian(rng, 4096, 8), gaussian(rng, 65536, 8)
    codes, distances = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    assert len(GpuSearch(faiss_on_gpu(), centroids)(points, codes, distances)) < 0.01 * len(points)


def test_a_clustering_has_the_pointers_and_codewords_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    collection = CCEEmbeddingBagCollection([cce(num_embeddings=300_000, num_rows=2048)])
    twin = copy.deepcopy(collection)
    collection.recluster(seed=0)
    monkeypatch.setattr(gpu, "faiss_on_gpu", lambda: None)
    twin.recluster(seed=0)
    assert collection.pointer_map("t_user").digest == twin.pointer_map("t_user").digest
    for mine, theirs in zip(collection.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
