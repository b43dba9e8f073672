"""Reclustering one table: old tables and codes in, new tables and pointers out. A pure function."""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.column import PAIR, SampleErrors, sum_errors
from torchrec_cce.clustering.entropy import pointer_entropies
from torchrec_cce.clustering.table import ClusteredTable, TableClustering


@dataclass(frozen=True, kw_only=True, eq=False)
class Reclustered(ClusteredTable):
    """A table after its clustering."""

    pointers: npt.NDArray[np.unsignedinteger]
    """[n, c], the new codebook row of every ID in every column."""
    sample_errors: SampleErrors
    """Of all columns together."""
    entropies: tuple[float, ...]
    """H1 … Hc of the pointers, in nats; see `pointer_entropies`."""
    seconds: float
    """Wall-clock time that it took."""


def recluster_table(table: TableClustering) -> Reclustered:
    """Cluster a table in this process (CCE's cluster step).

    In each column, k-means on a sample of the embeddings gives the new codebook, and every ID points at its nearest
    centroid. All of it is computed from the old tables and codes. The result is a function of what `table` was made
    from and of the machine's arithmetic: the same bits for any chunk size and number of threads.
    """
    started = time.perf_counter()
    trained = table.train(range(table.num_columns))
    centroids = [column.centroids for column in trained]
    pairs = None
    if table.num_pairs:
        pairs = np.empty(table.num_pairs, PAIR)
        table.nearest_pairs(centroids, 0, table.num_pairs, pairs)
    pointers = np.empty((table.num_ids, table.num_columns), table.pointer_dtype)
    totals = table.assign(centroids, 0, table.num_ids, pointers, pairs)
    return Reclustered(
        **vars(table.finish(centroids, totals)),
        pointers=pointers,
        sample_errors=sum_errors(trained),
        entropies=pointer_entropies(pointers, table.num_rows),
        seconds=time.perf_counter() - started,
    )
