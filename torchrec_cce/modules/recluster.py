"""Reclustering of CCE tables wherever their weights live: read a table, cluster it, and hand over the result.

`torchrec_cce.clustering` is the algorithm on arrays; here it meets maps, configurations and optimizers. A `RowStore`
hides where a table is: a parameter, or shards on several ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from torchrec_cce.clustering.recluster import ReclusterConfig, Reclustered, recluster_table
from torchrec_cce.config import CCEEmbeddingBagConfig
from torchrec_cce.errors import CCEError, ConfigError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.maps.pointer_map import PointerMap

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TableRows:
    """A physical table and its optimizer's state, row by row."""

    weights: Array
    """[2·c·k, d/c] float32."""
    states: Mapping[str, Array]
    """Name → [2·c·k, …] float32: those entries of the optimizer's state that have one value or vector a row."""


class RowStore(Protocol):
    """Where a physical table lives."""

    def read(self) -> TableRows: ...

    def write(self, rows: TableRows) -> None: ...


class ParameterStore:
    """A table that is one `nn.Parameter`, with the state that `optimizer` keeps for it."""

    def __init__(self, parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer | None, *, table: str) -> None:
        if parameter.is_meta:
            raise ConfigError(
                f"table {table!r} is on the meta device; materialise it (to_empty, reset_parameters) first"
            )
        self._parameter = parameter
        self._states: dict[str, torch.Tensor] = {}
        if optimizer is None:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if id(parameter) not in held:
            raise ConfigError(
                f"the optimizer does not hold the weights of table {table!r}; pass the one that trains it"
            )
        self._states = {
            name: value
            for name, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == len(parameter)
        }

    def read(self) -> TableRows:
        return TableRows(
            weights=to_array(self._parameter), states={name: to_array(value) for name, value in self._states.items()}
        )

    def write(self, rows: TableRows) -> None:
        with torch.no_grad():
            self._parameter.copy_(torch.from_numpy(rows.weights))
            for name, value in self._states.items():
                value.copy_(torch.from_numpy(rows.states[name]))


def to_array(tensor: torch.Tensor) -> Array:
    """A float32 copy of `tensor` on the CPU."""
    array: Array = tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous().numpy()
    return array


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
    seconds: float


def recluster_rows(
    config: CCEEmbeddingBagConfig,
    pointer_map: PointerMap,
    rows: TableRows,
    *,
    seed: int,
    frequencies: npt.NDArray[np.integer] | None,
    settings: ReclusterConfig,
) -> tuple[PointerMap, TableRows, TableReport]:
    """Cluster one table. Pure: nothing is written, and equal arguments give equal bits.

    The seed of this clustering is derived from `seed`, the table's name and the generation it makes, so that neither
    two tables nor two clusterings repeat one.
    """
    c, k = config.num_columns, config.num_rows
    seed = derive_seed(seed, config.name, pointer_map.generation + 1)
    helper_hash = pointer_map.next_helper_hash(seed)
    shape = (c, 2, k)
    try:
        done = recluster_table(
            weights=rows.weights.reshape(*shape, -1),
            num_ids=pointer_map.num_ids,
            old_codes=pointer_map.codes,
            new_helper_codes=lambda map_rows: helper_hash.numpy(pointer_map.raw_ids(map_rows)).T,
            row_states={name: state.reshape(*shape, *state.shape[1:]) for name, state in rows.states.items()},
            frequencies=frequencies,
            pointer_dtype=config.pointer_dtype,
            seed=seed,
            config=settings,
        )
    except CCEError as error:
        raise type(error)(f"table {config.name!r}: {error}") from error
    new_map = pointer_map.clustered(done.pointers, helper_hash)
    new_rows = TableRows(
        weights=done.weights.reshape(rows.weights.shape),
        states={name: state.reshape(rows.states[name].shape) for name, state in done.row_states.items()},
    )
    return new_map, new_rows, _report(new_map, done)


def _report(new_map: PointerMap, done: Reclustered) -> TableReport:
    return TableReport(
        generation=new_map.generation,
        entropies=done.entropies,
        share_changed=done.share_changed,
        objective=done.objective,
        seconds=done.seconds,
    )
