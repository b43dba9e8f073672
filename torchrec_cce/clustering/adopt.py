"""Adopting clusters that others have learned: the members of a cluster keep the mean of the embeddings they had."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.executor import Clustering, Executor, Extent, Totals
from torchrec_cce.clustering.resident_adoption import ResidentAdoption
from torchrec_cce.clustering.table import Centroids, ClusteredTable, NewPointers, TableClustering


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """The clusters that a table adopts."""

    pointers: NewPointers
    """IDs [N] int64 → [c, N] int64, where they point from now on."""
    codebook: npt.NDArray[np.float32]
    """[c, k, w]: for codebook rows that no ID points at."""


def adopt_tables(executor: Executor, given: Mapping[str, Given]) -> dict[str, ClusteredTable]:
    """Move the tables of `executor` to the clusters that are given: every codebook row becomes the mean, over the IDs
    that now point at it, of the embeddings they had; in a phase of residents see `ResidentAdoption`. The same bits for
    any executor.
    """
    done = {}
    for table, clustering in executor.tables.items():
        assert isinstance(clustering, TableClustering | ResidentAdoption)
        clusters = given[table]
        members = Extent(table=table, length=clustering.num_ids, given=executor.share(clusters))
        (sums,) = executor.sum("members", sum_members, [members])
        centroids = clustering.member_means(sums, clusters.codebook)
        adopted = Extent(table=table, length=clustering.num_ids, given=executor.share((clusters, centroids)))
        (totals,) = executor.sum("assignment", adopt_pointers, [adopted])
        done[table] = clustering.finish(centroids, totals)
    return done


def sum_members(clustering: Clustering, given: Given, start: int, stop: int, _out: npt.NDArray[Any]) -> Totals:
    """Step: the sums that the means over members are made of."""
    assert isinstance(clustering, TableClustering | ResidentAdoption)
    return clustering.sum_members(given.pointers, start, stop)


def adopt_pointers(
    clustering: Clustering, given: tuple[Given, Centroids], start: int, stop: int, _out: npt.NDArray[Any]
) -> Totals:
    """Step: the sums that the new tables are made of, for pointers that are given."""
    assert isinstance(clustering, TableClustering | ResidentAdoption)
    clusters, centroids = given
    return clustering.adopt(centroids, clusters.pointers, start, stop)
