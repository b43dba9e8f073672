"""Kernels that are loaded where this is imported: the fork server does it once, and its processes need not.

A process that clusters takes 1.5 seconds of a core to load what numba has compiled, more than most of them compute.
"""

import tempfile
from pathlib import Path

import torch

from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.data.criteo import read_criteo
from torchrec_cce.data.tsv import CATEGORICAL_FEATURES, DENSE_FEATURES


def _cluster() -> None:
    torch.manual_seed(0)
    sizes = {"num_embeddings": 300, "embedding_dim": 16, "num_rows": 10}
    collection = CCEEmbeddingBagCollection([CCEEmbeddingBagConfig(name="t", feature_names=["f"], **sizes)])
    # With one thread, which has ended before anything is forked.
    settings = ReclusterConfig(num_threads=1, helper_init="residual")
    for _ in range(2):
        collection.recluster(seed=0, settings=settings)


def _read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.tsv"
        log.write_text("\t".join(["1", *("1" for _ in DENSE_FEATURES), *("f" for _ in CATEGORICAL_FEATURES)]) + "\n")
        assert len(list(read_criteo(log))) == 1


_cluster()
_read()
