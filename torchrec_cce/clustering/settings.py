"""How a table is clustered again."""

import os
from dataclasses import dataclass, field
from typing import Literal, get_args

from torchrec_cce.errors import ConfigError

Backend = Literal["numba", "faiss", "sklearn"]
HelperInit = Literal["zero", "residual"]


@dataclass(frozen=True, kw_only=True)
class ReclusterConfig:
    """How a table is clustered again."""

    points_per_centroid: int = 256
    """k-means trains on at most this many IDs a centroid."""
    num_iterations: int = 50
    """Lloyd iterations of k-means."""
    backend: Backend = "numba"
    """Of k-means; see `kmeans`. The others have to be installed."""
    helper_init: HelperInit = "zero"
    """New helper rows: `"zero"`, or `"residual"`: what the codebook misses, in the mean over the IDs of a row."""
    chunk_size: int = 65536
    """IDs handled at a time: memory and speed. Never changes the result."""
    num_threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Threads, over the columns of a table. Never changes the result."""

    def __post_init__(self) -> None:
        for name in ("points_per_centroid", "num_iterations", "chunk_size", "num_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not at least 1")
        for name, allowed in (("helper_init", get_args(HelperInit)), ("backend", get_args(Backend))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {allowed}")


MIN_H1 = 0.5
"""Smallest H1 as a share of log k, or of log n where n is smaller. Below: few rows have most of the IDs."""
MIN_H2_GAIN = 0.1
"""Smallest H2 − H1 as a share of what it is for random pointers, or of what n IDs leave room for. Below: one column
follows from another."""
MIN_LEARNED = 0.005
"""How far H1 or H2 must lie below that of random pointers, as a share of it. Below: as random as a hash."""
