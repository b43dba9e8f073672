"""The paper's modulus pre-hash: it bounds a feature's universe before anything else sees its IDs."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from torchrec_cce.data.rows import Column, Rows
from torchrec_cce.errors import ConfigError


def modulus(ids: npt.NDArray[np.int64], num_embeddings: int) -> npt.NDArray[np.int64]:
    """`id mod num_embeddings` of the unsigned reading of every raw ID.

    A raw ID is 64 bits. Its unsigned reading is the one under which a hexadecimal category is the number that is
    written in the log: `ffffffffffffffff mod 10 = 5`, while the signed reading, -1, would give 9.

    Args:
        ids: [N] int64, any value.
        num_embeddings: n, the size of the universe, 1 to 2^63 - 1.

    Returns:
        [N] int64 in `[0, n)`; `ids` itself where all of them lie there already.

    Raises:
        ConfigError: `num_embeddings` is not in its range.
    """
    if not 1 <= num_embeddings < 2**63:
        raise ConfigError(f"num_embeddings={num_embeddings} is not in 1..2^63 - 1")
    unsigned = ids.view(np.uint64)
    if unsigned.max(initial=0) < num_embeddings:
        return ids
    bounded: npt.NDArray[np.int64] = (unsigned % np.uint64(num_embeddings)).view(np.int64)
    return bounded


def bound(rows: Rows, num_embeddings: Mapping[str, int]) -> Rows:
    """`rows` with `modulus` applied to the features that `num_embeddings` names; the others stay as they are.

    Raises:
        ConfigError: a feature that `rows` does not have, or see `modulus`.
    """
    unknown = [feature for feature in num_embeddings if feature not in rows.ids]
    if unknown:
        raise ConfigError(f"features {unknown} are not among those of the rows: {list(rows.ids)}")
    bounded = dict(rows.ids)
    for feature, size in num_embeddings.items():
        column = bounded[feature]
        values = modulus(column.values, size)
        if values is not column.values:
            bounded[feature] = Column(values=values, lengths=column.lengths)
    return Rows(labels=rows.labels, dense=rows.dense, ids=bounded)
