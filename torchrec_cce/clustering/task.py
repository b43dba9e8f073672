"""Where clustering and maps meet: a table with its map, ready to be clustered, and the map that comes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.executor import Clustering, Executor, named_errors
from torchrec_cce.clustering.fold import ResidentRows, TableFold
from torchrec_cce.clustering.recluster import Pointers, Reclustered, recluster_tables
from torchrec_cce.clustering.resident_adoption import ResidentAdoption
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import OldCodes, TableClustering
from torchrec_cce.hashing import UniversalHash
from torchrec_cce.maps.pointer_format import PointerFormat
from torchrec_cce.maps.pointer_map import PointerMap

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ClusteringInputs:
    """What a clustering is a function of, but for what is as large as the IDs: map and frequencies.

    Plain arrays, which workers without torch can be given.
    """

    table: str
    weights: Array
    """[c, 2, k, w] float32; the helper is zero where it is not used."""
    row_states: Mapping[str, Array]
    """Each [c, 2, k, …] float32."""
    pointer_format: PointerFormat
    """Of the new map's pointers."""
    seed: int
    """Of this table and this generation alone."""
    settings: ReclusterConfig

    def fold(self, pointer_map: PointerMap, residents: ResidentRows) -> TableFold:
        """The fold of the residents' rows of a table. Raises what `TableFold` raises, with the table's name."""
        with named_errors(self.table):
            return TableFold(codes=pointer_map.codebook_codes, **self._of_fold(pointer_map, residents))

    def adoption_in_a_phase(
        self, old: PointerMap, new: PointerMap, residents: ResidentRows, given: Array
    ) -> ResidentAdoption:
        """As `adoption`, where residents have rows. Raises what `ResidentAdoption` raises, with the table's name.

        Args:
            residents: by positions of `new`.
            given: [c, k, w], the codebook that came with `new`.
        """

        def codes(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            found: npt.NDArray[np.int64] = old.codes_of_any(new.raw_ids(positions))[:, 0].T
            return found

        with named_errors(self.table):
            return ResidentAdoption(codes=codes, given=given, **self._of_fold(old, residents))

    def _of_fold(self, pointer_map: PointerMap, residents: ResidentRows) -> dict[str, Any]:
        return {
            "codebook": self.weights[:, 0],
            "residents": residents,
            "is_first": pointer_map.stored is None,
            "row_states": self.row_states,
            "pointer_dtype": self.pointer_format.dtype,
            "seed": self.seed,
            "config": self.settings,
        }

    def clustering(self, pointer_map: PointerMap, frequencies: npt.NDArray[np.integer] | None) -> TableClustering:
        """The clustering of the IDs of `pointer_map`. Raises what `TableClustering` raises, with the table's name."""
        return self._of(pointer_map, pointer_map.next_helper_hash(self.seed), pointer_map.codes, frequencies)

    def adoption(
        self, old: PointerMap, new: PointerMap, frequencies: npt.NDArray[np.integer] | None
    ) -> TableClustering:
        """A clustering of the IDs of `new`, which have the embeddings that `old` gives them. Raises as `clustering`.

        Args:
            frequencies: [n], one for each position of `new`.
        """
        return self._of(new, new.helper_hash, lambda at: old.codes_of_any(new.raw_ids(at)), frequencies)

    def _of(
        self,
        ids_of: PointerMap,
        helper_hash: UniversalHash,
        old_codes: OldCodes,
        frequencies: npt.NDArray[np.integer] | None,
    ) -> TableClustering:
        with named_errors(self.table):
            return TableClustering(
                weights=self.weights,
                num_ids=ids_of.num_ids,
                old_codes=old_codes,
                new_helper_codes=lambda positions: helper_hash.numpy(ids_of.raw_ids(positions)).T,
                row_states=self.row_states,
                frequencies=frequencies,
                pointer_dtype=self.pointer_format.dtype,
                seed=self.seed,
                config=self.settings,
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class TableTask:
    """One table to cluster. Equal tasks give equal bits, whoever works on them."""

    inputs: ClusteringInputs
    pointer_map: PointerMap
    frequencies: npt.NDArray[np.integer] | None
    residents: ResidentRows | None = None
    """Whose rows are folded, where a phase is open."""

    @property
    def table(self) -> str:
        return self.inputs.table

    @cached_property
    def clustering(self) -> Clustering:
        """The clustering of the table, or its fold. Raises what it raises, with the table's name."""
        if self.residents is not None:
            return self.inputs.fold(self.pointer_map, self.residents)
        return self.inputs.clustering(self.pointer_map, self.frequencies)

    @property
    def helper_hash(self) -> UniversalHash:
        """Of the map that is made."""
        return self.pointer_map.next_helper_hash(self.inputs.seed)


def recluster_maps(tasks: Sequence[TableTask], executor: Executor) -> dict[str, tuple[PointerMap, Reclustered]]:
    """Cluster tables: table → its new map, of which the digest is known, and its new codewords.

    Args:
        executor: of the clusterings of `tasks`.
    """
    by_name = {task.table: task for task in tasks}
    made: dict[str, PointerMap] = {}

    def new_map(table: str, pointers: Pointers) -> PointerMap:
        if table not in made:
            made[table] = by_name[table].pointer_map.clustered(pointers, by_name[table].helper_hash)
        return made[table]

    done = recluster_tables(
        executor,
        lambda table, pointers: new_map(table, pointers).digest,
        formats={task.table: task.inputs.pointer_format for task in tasks},
    )
    return {name: (new_map(name, table.pointers).vouched(table.digest), table) for name, table in done.items()}
