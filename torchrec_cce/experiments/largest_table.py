"""The largest table of a run, as its method makes it: what entropies and the width of pointers are of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchrec import EmbeddingBagConfig

from torchrec_cce.methods.registry import METHODS, tables_under_cap
from torchrec_cce.methods.table import CompressedConfig


@dataclass(frozen=True, kw_only=True)
class LargestTable:
    """A table with learned pointers."""

    name: str
    num_ids: int
    num_columns: int
    """`c`."""
    num_rows: int
    """`k`."""
    pointer_bits: int
    """Of one stored pointer."""


def largest_table(config: Mapping[str, Any]) -> LargestTable | None:
    """The largest table of a run's configuration; None if it has no learned pointers, or none is named."""
    sizes = {name: int(table["num_embeddings"]) for name, table in config.get("tables", {}).items()}
    section = config.get("embedding", {})
    if not sizes or section.get("method") not in METHODS or section["method"] == "full":
        return None
    name = max(sizes, key=lambda table: sizes[table])
    (table,) = tables_under_cap(
        [EmbeddingBagConfig(name=name, num_embeddings=sizes[name], embedding_dim=section["dim"], feature_names=[name])],
        method=section["method"],
        max_parameters=section["max_parameters"],
        num_columns=section.get("num_columns", 4),
        num_terms=section.get("num_terms"),
        use_helper=section.get("use_helper", True),
    )
    if not isinstance(table, CompressedConfig) or table.pointer_bits is None:
        return None
    return LargestTable(
        name=name,
        num_ids=sizes[name],
        num_columns=table.num_columns,
        num_rows=table.num_rows,
        pointer_bits=table.pointer_bits,
    )
