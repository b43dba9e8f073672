"""Who does the steps of a clustering: this process, the ranks of a training job, or the workers of an offline job.

A clustering is a few passes over columns and IDs. Each is written once (`recluster.py`, `adopt.py`), as a *step*: a
function of a module, which any process that has the table's `Clustering` can be asked to do for some columns or
for a range of items. An executor decides which process does what, and where arrays as long as the IDs are kept. All
executors give the same bits: columns are independent of each other, and sums over IDs are sums of integers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.fold import TableFold
from torchrec_cce.clustering.table import TableClustering
from torchrec_cce.errors import CCEError
from torchrec_cce.workers.engine import Shared
from torchrec_cce.workers.inline import InlineShared

T = TypeVar("T")
Result = TypeVar("Result")

Stage = Literal["k-means", "pairs", "members", "assignment", "digest"]
Totals = npt.NDArray[np.int64]

NOTHING = np.dtype((np.uint8, (0,)))
"""The item of extents that nothing is written for."""

Clustering = TableClustering | TableFold
"""A table that is clustered, from what its IDs' embeddings are; or one whose residents' rows are folded."""
ColumnStep = Callable[[Clustering, Sequence[int]], list[Result]]
"""Some columns of a table → a result for each."""
RangeStep = Callable[[Clustering, T, int, int, npt.NDArray[Any]], Totals]
"""Do the items `start … stop − 1` of a table: write to `out: [stop − start, …]`, and return the sums over them, which
are added up over all ranges. Arguments: the table, what all ranges share, `start`, `stop`, `out`."""


@dataclass(frozen=True, kw_only=True)
class Extent(Generic[T]):
    """All items of a table that a step is to do."""

    table: str
    length: int
    """The items are `0 … length − 1`: IDs, or embeddings."""
    given: Shared[T]
    """What the step needs to know beside the table."""
    item: np.dtype[Any] = NOTHING
    """What is written for each item, possibly a sub-array: `np.dtype((np.uint16, (4,)))` for four pointers."""


class Executor(ABC):
    """Does the steps of a clustering for some tables. All methods are called by one thread, in one order.

    Args:
        tables: name → clustering, in the order of all results.
    """

    fills_all_tables_at_once = False
    """Whether ranges of several tables are given to `fill` together. If not, what one table needs meanwhile (an answer
    for each of its embeddings) is gone before the next table begins."""

    def __init__(self, tables: Mapping[str, Clustering]) -> None:
        self.tables = tables

    @abstractmethod
    def each(self, stage: Stage, step: ColumnStep[Result]) -> dict[str, list[Result]]:
        """Do `step` for every column of every table: table → results in the order of the columns."""

    @abstractmethod
    def fill(self, stage: Stage, step: RangeStep[T], extents: Sequence[Extent[T]]) -> list[tuple[Any, Totals]]:
        """Do `step` for all items of each extent: the array that was filled, to be read only, and the sums."""

    def sum(self, stage: Stage, step: RangeStep[T], extents: Sequence[Extent[T]]) -> list[Totals]:
        """As `fill` of extents that nothing is written for."""
        return [totals for _, totals in self.fill(stage, step, extents)]

    @abstractmethod
    def per_table(self, stage: Stage, function: Callable[[str], Result]) -> dict[str, Result]:
        """`function` of every table's name, wherever whole arrays of this executor can be read. Results are small."""

    def share(self, value: T) -> Shared[T]:
        """Make `value` (picklable) available to all who do steps."""
        return InlineShared(value)


class InProcess(Executor):
    """Everything in this process and in memory; steps have threads of their own over the columns of a table."""

    def each(self, stage: Stage, step: ColumnStep[Result]) -> dict[str, list[Result]]:  # noqa: ARG002  told to others
        results = {}
        for name, clustering in self.tables.items():
            with named_errors(name):
                results[name] = step(clustering, range(clustering.num_columns))
        return results

    def fill(self, stage: Stage, step: RangeStep[T], extents: Sequence[Extent[T]]) -> list[tuple[Any, Totals]]:  # noqa: ARG002
        filled = []
        for extent in extents:
            out = np.empty(extent.length, extent.item)
            with named_errors(extent.table):
                totals = step(self.tables[extent.table], extent.given.get(), 0, extent.length, out)
            filled.append((out, totals))
        return filled

    def per_table(self, stage: Stage, function: Callable[[str], Result]) -> dict[str, Result]:  # noqa: ARG002
        return {name: function(name) for name in self.tables}


@contextmanager
def named_errors(table: str) -> Iterator[None]:
    """Put the table's name before the message of an error."""
    try:
        yield
    except CCEError as error:
        raise type(error)(f"table {table!r}: {error}") from error
