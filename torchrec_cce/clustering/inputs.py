"""One table's clustering as plain arrays, which workers without torch can be given."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import TableClustering
from torchrec_cce.errors import CCEError
from torchrec_cce.hashing import UniversalHash
from torchrec_cce.maps.pointer_map import PointerMap

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ClusteringInputs:
    """What a clustering is a function of, but for what is as large as the IDs: map and frequencies."""

    table: str
    weights: Array
    """[c, 2, k, w] float32; the helper is zero where it is not used."""
    row_states: Mapping[str, Array]
    """Each [c, 2, k, …] float32."""
    pointer_dtype: np.dtype[np.unsignedinteger]
    seed: int
    """Of this table and this generation alone."""
    settings: ReclusterConfig

    def clustering(self, pointer_map: PointerMap, frequencies: npt.NDArray[np.integer] | None) -> TableClustering:
        """The clustering. Raises what it raises, with the table's name."""
        helper_hash = self.helper_hash(pointer_map)
        with self.named_errors():
            return TableClustering(
                weights=self.weights,
                num_ids=pointer_map.num_ids,
                old_codes=pointer_map.codes,
                new_helper_codes=lambda rows: helper_hash.numpy(pointer_map.raw_ids(rows)).T,
                row_states=self.row_states,
                frequencies=frequencies,
                pointer_dtype=self.pointer_dtype,
                seed=self.seed,
                config=self.settings,
            )

    def helper_hash(self, pointer_map: PointerMap) -> UniversalHash:
        """Of the map that is made of this one."""
        return pointer_map.next_helper_hash(self.seed)

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        with named_errors(self.table):
            yield


@contextmanager
def named_errors(table: str) -> Iterator[None]:
    """Put the table's name before the message of an error."""
    try:
        yield
    except CCEError as error:
        raise type(error)(f"table {table!r}: {error}") from error
