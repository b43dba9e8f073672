"""How much one map differs from another."""

from dataclasses import dataclass

import numpy as np

from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.pointer_map import PointerMap

_CHUNK = 65536


@dataclass(frozen=True, kw_only=True)
class Churn:
    """From an old map of a table to a new one."""

    share_changed: float
    """Of the codebook pointers of the raw IDs that both have, 0 to 1; 0 where they have none in common."""
    num_common: int
    """Raw IDs that both have."""
    num_added: int
    """Raw IDs that only the new map has."""
    num_removed: int
    """Raw IDs that only the old map has."""


def churn(old: PointerMap, new: PointerMap) -> Churn:
    """Compare two maps raw ID by raw ID, in bounded memory if they have no vocabulary.

    Raises:
        ConfigError: they have different numbers of columns.
    """
    if old.num_columns != new.num_columns:
        raise ConfigError(f"maps of {old.num_columns} and of {new.num_columns} columns cannot be compared")
    num_common = num_changed = 0
    for start in range(0, new.num_ids, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, new.num_ids))
        old_rows = old.rows(new.raw_ids(rows))
        both = old_rows >= 0
        num_common += int(np.count_nonzero(both))
        num_changed += int(np.count_nonzero(old.codebook_codes(old_rows[both]) != new.codebook_codes(rows[both])))
    return Churn(
        share_changed=num_changed / max(1, num_common * new.num_columns),
        num_common=num_common,
        num_added=new.num_ids - num_common,
        num_removed=old.num_ids - num_common,
    )
