"""The ranks of a training job as the executor of a clustering."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from torchrec_cce.clustering.executor import (
    Clustering,
    ColumnStep,
    Executor,
    Extent,
    RangeStep,
    Stage,
    Totals,
    named_errors,
)
from torchrec_cce.sharding.agreement import from_all_ranks, on_all_ranks
from torchrec_cce.sharding.host_file import HostFile

T = TypeVar("T")
Result = TypeVar("Result")


class RankExecutor(Executor):
    """Columns go to ranks by their cost, and each rank takes an equal share of the items of every range.

    What is filled lies in one file a host, which its ranks map. Every rank calls every method; if a step fails on any
    rank, all raise its error.

    Args:
        tables: name → clustering, made on every rank of the same.
    """

    def __init__(self, tables: Callable[[], Mapping[str, Clustering]]) -> None:
        super().__init__(on_all_ranks(tables))
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def each(self, stage: Stage, step: ColumnStep[Result]) -> dict[str, list[Result]]:  # noqa: ARG002
        columns = [(name, column) for name, table in self.tables.items() for column in range(table.num_columns)]
        costs = [self.tables[name].training_cost for name, _ in columns]
        mine = _balanced(columns, costs, self._world_size)[self._rank]

        def do() -> dict[tuple[str, int], Result]:
            done = {}
            for name, group in groupby(mine, itemgetter(0)):
                its_columns = [column for _, column in group]
                with named_errors(name):
                    results = step(self.tables[name], its_columns)
                done.update({(name, column): result for column, result in zip(its_columns, results, strict=True)})
            return done

        together = from_all_ranks(do)
        return {
            name: [together[name, column] for column in range(table.num_columns)] for name, table in self.tables.items()
        }

    def fill(self, stage: Stage, step: RangeStep[T], extents: Sequence[Extent[T]]) -> list[tuple[Any, Totals]]:  # noqa: ARG002
        return [self._fill(step, extent) for extent in extents]

    def sum(self, stage: Stage, step: RangeStep[T], extents: Sequence[Extent[T]]) -> list[Totals]:  # noqa: ARG002
        sums = []
        for extent in extents:
            start, stop = (extent.length * rank // self._world_size for rank in (self._rank, self._rank + 1))
            sums.append(self._do(step, extent, start, stop, np.empty(stop - start, extent.item)))
        return sums

    def per_table(self, stage: Stage, function: Callable[[str], Result]) -> dict[str, Result]:  # noqa: ARG002
        mine = list(self.tables)[self._rank :: self._world_size]
        together = from_all_ranks(lambda: {name: function(name) for name in mine})
        return {name: together[name] for name in self.tables}

    def _fill(self, step: RangeStep[T], extent: Extent[T]) -> tuple[Any, Totals]:
        kind, columns = extent.item.base, extent.item.shape
        file = HostFile((extent.length, *(columns or (1,))), kind)
        start, stop, share = file.mine()
        totals = self._do(step, extent, start, stop, share if columns else share.reshape(-1))
        whole = file.everything()
        return whole if columns else whole.reshape(-1), totals

    def _do(self, step: RangeStep[T], extent: Extent[T], start: int, stop: int, out: npt.NDArray[Any]) -> Totals:
        def do() -> Totals:
            with named_errors(extent.table):
                return step(self.tables[extent.table], extent.given.get(), start, stop, out)

        totals = torch.from_numpy(on_all_ranks(do))
        dist.all_reduce(totals)  # of integers: exact, in any order
        return totals.numpy()


def _balanced(columns: list[tuple[str, int]], costs: list[int], num_workers: int) -> list[list[tuple[str, int]]]:
    """Columns for each worker, in order: the most expensive go first, each to whoever has the least to do."""
    shares: list[list[tuple[str, int]]] = [[] for _ in range(num_workers)]
    loads = [0] * num_workers
    for cost, column in sorted(zip(costs, columns, strict=True), key=lambda pair: (-pair[0], pair[1])):
        worker = loads.index(min(loads))
        shares[worker].append(column)
        loads[worker] += cost
    return [sorted(share) for share in shares]
