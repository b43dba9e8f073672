"""A live model moves to maps that others have learned, and takes its own embeddings along."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import ClusteredTable, TableClustering
from torchrec_cce.errors import MapMismatchError
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.modules.recluster import TableReport, TableTask, report_of
from torchrec_cce.sharding.agreement import on_all_ranks
from torchrec_cce.sharding.host_file import share_keys
from torchrec_cce.sharding.recluster import check_names, for_each_rank
from torchrec_cce.sharding.tables import ShardedTable, check_on_all_ranks, tables_of

Integers = npt.NDArray[np.int64]


def refit_sharded(
    model: DistributedModelParallel,
    optimizer: KeyedOptimizer,
    tables: Mapping[str, TableSnapshot],
    *,
    frequencies: Mapping[str, npt.NDArray[np.integer]] | None = None,
    settings: ReclusterConfig | None = None,
) -> dict[str, TableReport]:
    """Replace the maps of all CCE tables by those of `tables`, and nothing that the model has learned since.

    Every codebook row becomes the mean, over the IDs that now point at it, of the embeddings that they have in the
    model at this moment, so that a map may have been clustered from weights of an hour ago. A row that no ID points at
    gets the word that it has in `tables`. Helper rows and the optimizer's state are made as by a clustering. An ID that
    the old map did not know enters with the embedding that the old map's `unseen` gave it; where that was an error,
    with hashed words, as by `PointerMap.with_vocabulary`.

    Every rank calls it between two steps, with no batch in flight, and takes an equal share of the IDs; the bits do not
    depend on how many ranks there are. If it fails on any rank, it does on all, and nothing has changed.

    Args:
        tables: of an opened version, the same on every rank. Without words, rows that no ID points at become zero.
        frequencies: table → [num_ids] counts, one a row of the new map; the objective weighs IDs by them.
        settings: `helper_init`, `chunk_size` and `num_threads`; the latter for each host, whose ranks share them.

    Returns:
        One report a CCE table. Its entropies are those that came with the map.

    Raises:
        MapMismatchError: `tables` are of other CCE tables or sizes than the model's, or not the same on every rank.
        ClusteringError: the model or `tables` hold NaN or infinite values.
        ConfigError: `frequencies` of an unknown table or of a wrong length.
    """
    started = time.perf_counter()
    check_on_all_ranks(model, tables)
    _check_same_on_all_ranks(tables)
    found = tables_of(model, optimizer)
    check_names(frequencies or {}, found)
    settings = for_each_rank(settings or ReclusterConfig())
    moves = [
        _Move(
            table=table,
            task=TableTask(
                config=table.config,
                pointer_map=table.collection.pointer_map(table.config.name),
                rows=table.store.read(),
                seed=0,  # nothing is drawn
                frequencies=(frequencies or {}).get(table.config.name),
                settings=settings,
            ),
            to=tables[table.config.name],
        )
        for table in found
    ]
    share_keys(move.to.pointer_map for move in moves)
    on_all_ranks(lambda: [move.clustering for move in moves])
    done = [_refit(move) for move in moves]
    reports = {}
    for move, words in zip(moves, done, strict=True):
        name = move.table.config.name
        move.table.store.write(move.task.new_rows(words))
        move.table.collection.attach_pointer_map(name, move.to.pointer_map)
        reports[name] = report_of(
            move.to.pointer_map,
            words,
            sample_errors=None,
            entropies=move.to.entropies,
            seconds=time.perf_counter() - started,
        )
    return reports


@dataclass(frozen=True, kw_only=True)
class _Move:
    """A table, and what it moves to."""

    table: ShardedTable
    task: TableTask
    """The table as it is."""
    to: TableSnapshot

    @cached_property
    def clustering(self) -> TableClustering:
        """Of the rows of the new map. Raises what it raises, with the table's name."""
        inputs, old, new = self.task.inputs, self.task.pointer_map, self.to.pointer_map
        with self.task.named_errors():
            return TableClustering(
                weights=inputs.weights,
                num_ids=new.num_ids,
                old_codes=lambda rows: old.codes_of_any(new.raw_ids(rows)),
                new_helper_codes=lambda rows: new.helper_hash.numpy(new.raw_ids(rows)).T,
                row_states=inputs.row_states,
                frequencies=self.task.frequencies,
                pointer_dtype=inputs.pointer_dtype,
                seed=inputs.seed,
                config=inputs.settings,
            )

    def pointers(self, rows: Integers) -> Integers:
        """[c, N]: where the new map's `rows: [N]` point."""
        codes: Integers = self.to.pointer_map.codebook_codes(rows).astype(np.int64).T
        return codes

    @property
    def their_words(self) -> npt.NDArray[np.float32]:
        """[c, k, w]: the codebook that came with the map."""
        shape = self.task.inputs.weights.shape
        return np.zeros(shape, np.float32)[:, 0] if self.to.weights is None else self.to.weights.reshape(shape)[:, 0]


def _refit(move: _Move) -> ClusteredTable:
    """The new words of one table, each rank summing over its share of the IDs."""
    clustering, rank, world_size = move.clustering, dist.get_rank(), dist.get_world_size()
    start, stop = (clustering.num_ids * each // world_size for each in (rank, rank + 1))

    def summed(share: Callable[[], Integers]) -> Integers:
        def named() -> Integers:
            with move.task.named_errors():
                return share()

        totals = torch.from_numpy(on_all_ranks(named))
        dist.all_reduce(totals)  # of integers: exact, in any order
        return totals.numpy()

    members = summed(lambda: clustering.sum_members(move.pointers, start, stop))
    centroids = clustering.member_means(members, move.their_words)
    return clustering.finish(centroids, summed(lambda: clustering.adopt(centroids, move.pointers, start, stop)))


def _check_same_on_all_ranks(tables: Mapping[str, TableSnapshot]) -> None:
    mine = {name: table.pointer_map.digest for name, table in tables.items()}
    everyones: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    for name, digest in everyones[0].items():
        others = {theirs[name] for theirs in everyones} - {digest}
        if others:
            raise MapMismatchError(
                f"table {name!r}: rank 0 was given the map {digest[:12]}, others {sorted(one[:12] for one in others)}; "
                "let one rank choose the version for all"
            )
