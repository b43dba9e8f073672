"""CCE's cluster step for whole tables: old tables and codes in, new tables and pointers out. A pure function.

In each column, k-means on a sample of the embeddings gives the new codebook, and every ID points at its nearest
centroid. All of it is computed from the old tables and codes. Where a table has more IDs than different embeddings, the
nearest centroid of each embedding is found first, and IDs look theirs up.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.column import PAIR, SampleErrors, TrainedColumn, sum_errors
from torchrec_cce.clustering.entropy import pointer_entropies
from torchrec_cce.clustering.executor import Clustering, Executor, Extent, Totals
from torchrec_cce.clustering.table import Centroids, ClusteredTable
from torchrec_cce.maps.pointer_format import PointerFormat

Pointers = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reclustered(ClusteredTable):
    """A table after its clustering."""

    pointers: Pointers
    """[n, c], the new codebook code of every ID in every column; [n, ⌈c/2⌉] if two are in a byte."""
    sample_errors: SampleErrors
    """Of all columns together."""
    entropies: tuple[float, ...]
    """H1 … Hc of the pointers, in nats; see `pointer_entropies`."""
    digest: str
    """What `digest_of` gave."""
    seconds: float
    """Wall-clock time from the start of all tables to the end of this one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
    """What the IDs of a table are assigned by."""

    centroids: Centroids
    pairs: npt.NDArray[np.void] | None
    """[num_pairs] PAIR, where embeddings were assigned first."""
    pointer_format: PointerFormat
    """Of what is filled."""


def recluster_tables(
    executor: Executor,
    digest_of: Callable[[str, Pointers], str] = lambda _table, _pointers: "",
    *,
    formats: Mapping[str, PointerFormat] | None = None,
) -> dict[str, Reclustered]:
    """Cluster the tables of `executor`, in its order.

    The result is a function of what the tables were made from and of the machine's arithmetic: the same bits for any
    executor, number of workers, chunk size and number of threads.

    Args:
        digest_of: table and its new pointers → a digest, taken where the pointers are.
        formats: table → how its new pointers are stored; if not given, each as a number of its table's `pointer_dtype`.
    """
    formats = formats or {
        name: PointerFormat(num_columns=clustering.num_columns, bits=8 * clustering.pointer_dtype.itemsize)
        for name, clustering in executor.tables.items()
    }
    started = time.perf_counter()
    trained = executor.each("k-means", train_columns)
    centroids = {table: [column.centroids for column in columns] for table, columns in trained.items()}
    pointers: dict[str, Pointers] = {}
    totals: dict[str, Totals] = {}
    names = list(executor.tables)
    for together in [names] if executor.fills_all_tables_at_once else [[name] for name in names]:
        for table, (filled, sums) in _assign(executor, together, centroids, formats).items():
            pointers[table], totals[table] = filled, sums

    def examine(table: str) -> tuple[str, tuple[float, ...]]:
        entropies = pointer_entropies(formats[table].codes(pointers[table]), executor.tables[table].num_rows)
        return digest_of(table, pointers[table]), entropies

    facts = executor.per_table("digest", examine)
    done = {}
    for table, clustering in executor.tables.items():
        digest, entropies = facts[table]
        done[table] = Reclustered(
            **vars(clustering.finish(centroids[table], totals[table])),
            pointers=pointers[table],
            sample_errors=sum_errors(trained[table]),
            entropies=entropies,
            digest=digest,
            seconds=time.perf_counter() - started,
        )
    return done


def _assign(
    executor: Executor,
    names: Sequence[str],
    centroids: Mapping[str, Centroids],
    formats: Mapping[str, PointerFormat],
) -> dict[str, tuple[Pointers, Totals]]:
    """Table → its new pointers, and the sums over its IDs."""
    learned = {
        name: executor.share(Learned(centroids=centroids[name], pairs=pairs, pointer_format=formats[name]))
        for name, pairs in _nearest_of_all_embeddings(executor, names, centroids).items()
    }
    # What takes an ID longest comes first, so that no worker waits for it in the end.
    order = sorted(names, key=lambda name: (executor.tables[name].num_pairs > 0, -executor.tables[name].num_ids))
    extents = [
        Extent(
            table=name,
            length=executor.tables[name].num_ids,
            given=learned[name],
            item=formats[name].item,
        )
        for name in order
    ]
    return dict(zip(order, executor.fill("assignment", assign_ids, extents), strict=True))


def _nearest_of_all_embeddings(
    executor: Executor, names: Sequence[str], centroids: Mapping[str, Centroids]
) -> dict[str, npt.NDArray[np.void] | None]:
    """Table → the answers for all embeddings it can have, None where it has fewer IDs than those."""
    found: dict[str, npt.NDArray[np.void] | None] = dict.fromkeys(names)
    extents = [
        Extent(
            table=name,
            length=executor.tables[name].num_pairs,
            given=executor.share(centroids[name]),
            item=PAIR,
        )
        for name in names
        if executor.tables[name].num_pairs
    ]
    for extent, (pairs, _) in zip(extents, executor.fill("pairs", find_pairs, extents), strict=True):
        found[extent.table] = pairs
    return found


def train_columns(clustering: Clustering, columns: Sequence[int]) -> list[TrainedColumn]:
    """Step: the centroids of some columns."""
    return clustering.train(columns)


def find_pairs(clustering: Clustering, centroids: Centroids, start: int, stop: int, out: npt.NDArray[Any]) -> Totals:
    """Step: the nearest centroids of some of the embeddings. There is nothing to sum up."""
    clustering.nearest_pairs(centroids, start, stop, out)
    return np.empty(0, np.int64)


def assign_ids(clustering: Clustering, learned: Learned, start: int, _stop: int, out: npt.NDArray[Any]) -> Totals:
    """Step: the new pointers of some IDs, and the sums that the new tables are made of."""
    totals = [
        clustering.assign(learned.centroids, start + first, start + first + len(codes), codes, learned.pairs)
        for first, codes in learned.pointer_format.parts_to_fill(out)
    ]
    return np.sum(totals, axis=0, dtype=np.int64)  # type: ignore[no-any-return]
