"""What the remap reads of a KeyedJaggedTensor: where each feature is, raw IDs, and batches that vary by feature."""

from collections.abc import Sequence

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cce.errors import ConfigError, InvalidIDError


def check_not_traced() -> None:
    """Raise ConfigError in `torch.jit.trace`."""
    if torch.jit.is_tracing():
        raise ConfigError(
            "torch.jit.trace cannot follow the remap, which finds rows outside of torch, and would record memory that "
            "nobody has written to. Remap first and trace what comes after: its inputs are the values and lengths of "
            "collection.remap(features), under the keys collection.remap.row_keys"
        )


def positions_of(keys: Sequence[str], needed: Sequence[str]) -> dict[str, int]:
    """Key → its number.

    Raises:
        ConfigError: a key is there twice, or one that is needed is not.
    """
    positions = {key: i for i, key in enumerate(keys)}
    if len(positions) < len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ConfigError(f"the input has the keys {twice} more than once; keys must be unique")
    missing = [feature for feature in needed if feature not in positions]
    if missing:
        raise ConfigError(f"the input has no features {missing}; it has {list(keys)}")
    return positions


def int64_on_cpu(features: KeyedJaggedTensor) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """[N] int64: all raw IDs. Raises InvalidIDError if they are no integers of 32 or 64 bits."""
    values = features.values()
    if values.dtype not in (torch.int64, torch.int32):
        shown = values[:1].tolist()
        raise InvalidIDError(
            f"features {features.keys()}: values are {values.dtype} (the first is {shown[0] if shown else 'none'}); "
            f"raw IDs are int64 or int32"
        )
    return values.to(device="cpu", dtype=torch.int64).contiguous().numpy()  # type: ignore[no-any-return]


def variable_batch(features: KeyedJaggedTensor, columns: list[int], row_keys: list[str]) -> dict[str, object]:
    """The arguments that carry a variable batch size per feature (VBE) over to the column keys."""
    if not features.variable_stride_per_key():
        return {"stride": features.stride()}
    strides = features.stride_per_key_per_rank()
    arguments: dict[str, object] = {"stride_per_key_per_rank": [list(strides[source]) for source in columns]}
    inverse = features.inverse_indices_or_none()
    if inverse is not None:
        names, indices = inverse
        keys = features.keys()
        order = [names.index(keys[source]) for source in columns]
        arguments["inverse_indices"] = (row_keys, indices[order])
    return arguments
