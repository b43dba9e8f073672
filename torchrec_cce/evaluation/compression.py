"""What embeddings cost, pointers counted, and how much that is less than full tables."""

from collections.abc import Iterable
from dataclasses import dataclass

from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS

from torchrec_cce.config import CompositionalConfig
from torchrec_cce.modules.collection import CCECollection


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of all embedding tables of a model."""

    full_parameters: int
    """`Σ n·d`: what full tables would train."""
    parameters: int
    """Trained parameters."""
    full_bytes: int
    """Bytes of full tables."""
    table_bytes: int
    """Bytes of the trained tables; they live on the accelerator, if there is one."""
    pointer_bytes: int
    """Bytes of stored index pointers; they live in host memory."""
    largest_table: str
    """The table that would be the largest if all were full."""
    largest_factor: float
    """Its full parameters over its trained ones."""

    @property
    def parameter_factor(self) -> float:
        """Compression over all tables, as the paper measures it: without the pointers."""
        return self.full_parameters / self.parameters

    @property
    def byte_factor(self) -> float:
        """Compression of total bytes, pointers counted."""
        return self.full_bytes / (self.table_bytes + self.pointer_bytes)


def sizes_of(collections: Iterable[CCECollection]) -> Sizes:
    """The sizes of all tables in `collections`, with the maps that are attached now."""
    full: dict[str, int] = {}
    trained: dict[str, int] = {}
    full_bytes = table_bytes = pointer_bytes = 0
    for collection in collections:
        pointer_bytes += sum(collection.pointer_map(table).nbytes for table in collection.cce_tables())
        for table in collection.configs():
            physical = table.physical() if isinstance(table, CompositionalConfig) else table
            bytes_per_value = DATA_TYPE_NUM_BITS[table.data_type] // 8
            full[table.name] = table.num_embeddings * table.embedding_dim
            trained[table.name] = physical.num_embeddings * physical.embedding_dim
            full_bytes += full[table.name] * bytes_per_value
            table_bytes += trained[table.name] * bytes_per_value
    largest = max(full, key=lambda name: full[name])
    return Sizes(
        full_parameters=sum(full.values()),
        parameters=sum(trained.values()),
        full_bytes=full_bytes,
        table_bytes=table_bytes,
        pointer_bytes=pointer_bytes,
        largest_table=largest,
        largest_factor=full[largest] / trained[largest],
    )
