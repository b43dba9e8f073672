"""Small CCE tables to cluster in this process, with their codes written out."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.executor import InProcess
from torchrec_cce.clustering.recluster import Reclustered, recluster_tables
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import TableClustering


@dataclasses.dataclass
class Table:
    """A small CCE table, with its codes written out."""

    weights: npt.NDArray[np.float32]
    codes: npt.NDArray[np.int64]
    helper_codes: npt.NDArray[np.int64]
    row_states: dict[str, npt.NDArray[np.float32]]

    @classmethod
    def random(cls, *, n: int, c: int = 3, k: int = 10, w: int = 4, seed: int = 0) -> "Table":
        rng = np.random.default_rng(seed)
        weights = rng.standard_normal((c, 2, k, w)) * np.array([1, 0.3])[:, None, None]
        return cls(
            weights=weights.astype(np.float32),
            codes=rng.integers(0, k, (c, 2, n)),
            helper_codes=rng.integers(0, k, (c, n)),
            row_states={
                "momentum": rng.standard_normal((c, 2, k, w)).astype(np.float32),
                "sum": (rng.random((c, 2, k)) ** 8).astype(np.float32),
            },
        )

    @property
    def num_ids(self) -> int:
        return self.codes.shape[2]

    def embeddings(self, column: int) -> npt.NDArray[np.float32]:
        codes = self.codes[column]
        return self.weights[column, 0, codes[0]] + self.weights[column, 1, codes[1]]

    def recluster(self, **options: Any) -> Reclustered:
        return cluster(self.clustering(**options))

    def clustering(
        self, *, seed: int = 0, frequencies: Any = None, dtype: Any = np.uint16, **config: Any
    ) -> TableClustering:
        return TableClustering(
            weights=self.weights,
            num_ids=self.num_ids,
            old_codes=lambda ids: self.codes[:, :, ids],
            new_helper_codes=lambda ids: self.helper_codes[:, ids],
            row_states=self.row_states,
            frequencies=frequencies,
            pointer_dtype=dtype,
            seed=seed,
            config=ReclusterConfig(**config),
        )


def recluster(**arguments: Any) -> Reclustered:
    return cluster(TableClustering(**arguments))


def cluster(table: TableClustering) -> Reclustered:
    return recluster_tables(InProcess({"t": table}))["t"]


def assert_same(left: Reclustered, right: Reclustered) -> None:
    """The same bits, except for the time it took."""
    for name in ("pointers", "weights"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    assert left.row_states.keys() == right.row_states.keys()
    for name, state in left.row_states.items():
        np.testing.assert_array_equal(state, right.row_states[name])
    for name in ("entropies", "objective", "share_changed"):
        assert getattr(left, name) == getattr(right, name)


def members_mean(
    values: npt.NDArray[np.floating], members: npt.NDArray[np.integer], num_rows: int
) -> npt.NDArray[np.float64]:
    """[k, …]: the mean of `values: [n, …]` over the IDs with each code; 0 without."""
    means = np.zeros((num_rows, *values.shape[1:]))
    for row in range(num_rows):
        if (members == row).any():
            means[row] = values[members == row].astype(np.float64).mean(axis=0)
    return means
