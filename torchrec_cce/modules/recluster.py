"""Reclustering of CCE tables wherever their weights live: read a table, cluster it, and hand over the result.

`torchrec_cce.clustering` is the algorithm on arrays; here it meets maps, configurations and optimizers. A `RowStore`
hides where a table is: a parameter, or shards on several ranks.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.column import SampleErrors
from torchrec_cce.clustering.inputs import ClusteringInputs, named_errors
from torchrec_cce.clustering.recluster import recluster_table
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import ClusteredTable, TableClustering
from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import UniversalHash, derive_seed
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.modules.parameter_store import Array, TableRows


@dataclass(frozen=True, kw_only=True)
class TableReport:
    """What one clustering did to one table."""

    generation: int
    """Of the map it made: clusterings so far."""
    entropies: tuple[float, ...]
    """`H1 … Hc` of the new pointers, in nats (Appendix G)."""
    share_changed: float
    """Share of the `n·c` codebook pointers that differ from the version before."""
    objective: float
    """Mean over IDs of the squared distance from the old embedding to its new codebook words."""
    sample_errors: SampleErrors | None
    """The same over the sample that trained, beside what the old pointers can do; None for pointers that were given."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TableTask:
    """One table to cluster. Equal tasks give equal bits, whoever works on them.

    The seed is derived from `seed`, the table's name and the generation it makes, so that neither two tables nor two
    clusterings repeat one.
    """

    config: CCEConfig
    pointer_map: PointerMap
    rows: TableRows
    seed: int
    frequencies: npt.NDArray[np.integer] | None
    settings: ReclusterConfig

    @cached_property
    def inputs(self) -> ClusteringInputs:
        """The table's arrays, as a clustering takes them."""
        shape = (self.config.num_columns, 2, self.config.num_rows)
        with self.named_errors():
            if self.settings.helper_init == "residual" and not self.config.use_helper:
                raise ConfigError('helper_init="residual" needs the helper, which is not used; pass "zero"')
        return ClusteringInputs(
            table=self.config.name,
            weights=self.config.used_codewords(self.rows.weights).reshape(*shape, -1),
            row_states={name: state.reshape(*shape, *state.shape[1:]) for name, state in self._states()},
            pointer_dtype=self.config.pointer_dtype,
            seed=derive_seed(self.seed, self.config.name, self.pointer_map.generation + 1),
            settings=self.settings,
        )

    @cached_property
    def clustering(self) -> TableClustering:
        """The clustering of the table's arrays. Raises what it raises, with the table's name."""
        return self.inputs.clustering(self.pointer_map, self.frequencies)

    @cached_property
    def helper_hash(self) -> UniversalHash:
        """Of the map that is made."""
        return self.inputs.helper_hash(self.pointer_map)

    def new_rows(self, done: ClusteredTable) -> TableRows:
        """The physical table and its state, in the shapes that they had."""
        return TableRows(
            weights=done.weights.reshape(self.rows.weights.shape),
            states={name: state.reshape(self.rows.states[name].shape) for name, state in done.row_states.items()},
        )

    def named_errors(self) -> AbstractContextManager[None]:
        return named_errors(self.config.name)

    def _states(self) -> Iterator[tuple[str, Array]]:
        for name, state in self.rows.states.items():
            # Without helper, the mean over an ID's two rows is to be the state of the one that it reads.
            yield name, state if self.config.use_helper else 2 * self.config.used_codewords(state)


def recluster_rows(
    config: CCEConfig,
    pointer_map: PointerMap,
    rows: TableRows,
    *,
    seed: int,
    frequencies: npt.NDArray[np.integer] | None,
    settings: ReclusterConfig,
) -> tuple[PointerMap, TableRows, TableReport]:
    """Cluster one table in this process. Pure: nothing is written."""
    task = TableTask(
        config=config, pointer_map=pointer_map, rows=rows, seed=seed, frequencies=frequencies, settings=settings
    )
    clustering = task.clustering
    with task.named_errors():
        done = recluster_table(clustering)
    new_map = task.pointer_map.clustered(done.pointers, task.helper_hash)
    report = report_of(new_map, done, sample_errors=done.sample_errors, entropies=done.entropies, seconds=done.seconds)
    return new_map, task.new_rows(done), report


def report_of(
    new_map: PointerMap,
    done: ClusteredTable,
    *,
    sample_errors: SampleErrors | None,
    entropies: tuple[float, ...],
    seconds: float,
) -> TableReport:
    """What is told of a clustering."""
    return TableReport(
        generation=new_map.generation,
        entropies=entropies,
        share_changed=done.share_changed,
        objective=done.objective,
        sample_errors=sample_errors,
        seconds=seconds,
    )
