"""Reclustering of CCE tables wherever their weights live: read a table, cluster it, and hand over the result.

`torchrec_cce.clustering` is the algorithm on arrays; here it meets maps, configurations and optimizers. A table is a
parameter, which a `ParameterStore` reads and writes, or shards on several ranks (`torchrec_cce.sharding.tables`).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torchrec.optim.keyed import CombinedOptimizer, OptimizerWrapper

from torchrec_cce.clustering.column import SampleErrors
from torchrec_cce.clustering.executor import InProcess
from torchrec_cce.clustering.fold import ResidentRows, RowArray
from torchrec_cce.clustering.recluster import Reclustered
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import ClusteredTable
from torchrec_cce.clustering.task import ClusteringInputs, TableTask, recluster_maps
from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.residency import Residency
from torchrec_cce.methods.cce import CCEConfig

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TableRows:
    """A physical table and its optimizer's state, row by row."""

    weights: Array
    """[2·c·k, d/c] float32."""
    states: Mapping[str, Array]
    """Name → [2·c·k, …] float32: those entries of the optimizer's state that have one value or vector a row."""


class ResidentStore(Protocol):
    """Where the rows of residents live."""

    def learned(self, residency: Residency) -> ResidentRows:
        """What the residents of `residency` have learned."""
        ...

    def restart(self, parts: Iterable[tuple[int, Array]]) -> None:
        """Write rows, a part at a time with its first row, and set every row's state to zero."""
        ...

    def fill(self, parts: Iterable[tuple[int, Array]]) -> None:
        """Write rows that nobody has had since `restart`, whose state is still zero, as that does."""
        ...


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
            for name, value in _states_of(optimizer).get(parameter, {}).items()
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

    def learned(self, residency: Residency) -> ResidentRows:
        name = squares_among(self._states)
        squares = None if name is None else to_array(self._states[name])
        return resident_rows(residency, to_array(self._parameter), squares)

    def restart(self, parts: Iterable[tuple[int, Array]]) -> None:
        self.fill(parts)
        for value in self._states.values():
            value.zero_()

    def fill(self, parts: Iterable[tuple[int, Array]]) -> None:
        with torch.no_grad():
            for first, rows in parts:
                self._parameter[first : first + len(rows)] = torch.from_numpy(rows)


def _states_of(optimizer: torch.optim.Optimizer) -> Mapping[torch.Tensor, dict[str, Any]]:
    """Of each parameter. TorchRec's wrappers hold on to what a combined optimizer had when they were put around it."""
    if isinstance(optimizer, OptimizerWrapper):
        return _states_of(optimizer._optimizer)
    if isinstance(optimizer, CombinedOptimizer):
        return {p: state for _, part in optimizer.optimizers for p, state in _states_of(part).items()}
    return optimizer.state


def check_names(frequencies: Mapping[str, object], cce_tables: Collection[str]) -> None:
    """Raise ConfigError unless `frequencies` are those of some of `cce_tables`."""
    unknown = sorted(frequencies.keys() - set(cce_tables))
    if unknown:
        known = ", ".join(sorted(cce_tables))
        raise ConfigError(f"frequencies of {unknown}, which are not CCE tables; those are: {known or 'none'}")


def squares_among(states: Iterable[str]) -> str | None:
    """Which of an optimizer's states are the squared gradients that it has summed or averaged, if it keeps any.

    Args:
        states: names as PyTorch, TorchRec and FBGEMM have them.
    """
    by_kind = {name.rpartition(".")[2]: name for name in states}
    # Beside an `exp_avg_sq`, `momentum1` is something else.
    return next((by_kind[kind] for kind in ("exp_avg_sq", "sum", "momentum1") if kind in by_kind), None)


def resident_rows(residency: Residency, rows: RowArray, squares: Array | None) -> ResidentRows:
    """Rows that were learned, with the squared gradients of each, [m, …], as what says how much it matters."""
    importances = None if squares is None else importances_of(squares)
    return ResidentRows(residency=residency, rows=rows, importances=importances)


def importances_of(squares: Array) -> Array:
    """[m]: the mean of each row of [m, …]."""
    importances: Array = squares.reshape(len(squares), -1).mean(axis=1)
    return importances


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
    """Mean over IDs of the squared distance from the old embedding to its new codewords."""
    sample_errors: SampleErrors | None
    """The same over the sample that trained, beside what the old pointers can do; None for pointers that were given."""
    seconds: float

    @property
    def relative_error(self) -> float | None:
        """The error over the sample as a share of what it would be with one codeword for all: 0 for a perfect fit."""
        errors = self.sample_errors
        return None if errors is None or errors.total == 0 else errors.new / errors.total

    @classmethod
    def of_clustering(cls, new_map: PointerMap, done: Reclustered) -> "TableReport":
        return cls(
            generation=new_map.generation,
            entropies=done.entropies,
            share_changed=done.share_changed,
            objective=done.objective,
            sample_errors=done.sample_errors,
            seconds=done.seconds,
        )


def table_task(
    config: CCEConfig,
    pointer_map: PointerMap,
    rows: TableRows,
    *,
    seed: int,
    frequencies: npt.NDArray[np.integer] | None,
    settings: ReclusterConfig,
    residents: ResidentRows | None = None,
) -> TableTask:
    """A table to cluster, or whose `residents`' rows are to be folded.

    The seed is derived from `seed`, the table's name and the generation it makes, so that neither two tables nor two
    clusterings repeat one.

    Raises:
        ConfigError: `helper_init="residual"` for a table that does not use its helper.
    """
    if settings.helper_init == "residual" and not config.use_helper:
        raise ConfigError(
            f'table {config.name!r}: helper_init="residual" needs the helper, which is not used; pass "zero"'
        )
    shape = (config.num_columns, 2, config.num_rows)
    # Without helper, the mean over an ID's two rows is to be the state of the row that it reads.
    states = {
        name: state if config.use_helper else 2 * config.used_codewords(state) for name, state in rows.states.items()
    }
    return TableTask(
        inputs=ClusteringInputs(
            table=config.name,
            weights=config.used_codewords(rows.weights).reshape(*shape, -1),
            row_states={name: state.reshape(*shape, *state.shape[1:]) for name, state in states.items()},
            pointer_format=config.pointer_format,
            seed=derive_seed(seed, config.name, pointer_map.generation + 1),
            settings=settings,
        ),
        pointer_map=pointer_map,
        frequencies=frequencies,
        residents=residents,
    )


def recluster_rows(
    config: CCEConfig,
    pointer_map: PointerMap,
    rows: TableRows,
    *,
    seed: int,
    frequencies: npt.NDArray[np.integer] | None,
    settings: ReclusterConfig,
    residents: ResidentRows | None = None,
) -> tuple[PointerMap, TableRows, TableReport]:
    """Cluster one table in this process, or fold its residents' rows. Pure: nothing is written."""
    task = table_task(
        config, pointer_map, rows, seed=seed, frequencies=frequencies, settings=settings, residents=residents
    )
    new_map, done = recluster_maps([task], InProcess({task.table: task.clustering}))[task.table]
    return new_map, physical_rows(done), TableReport.of_clustering(new_map, done)


def physical_rows(done: ClusteredTable) -> TableRows:
    """A table and its states as they are stored: `[2·c·k, …]`."""
    return TableRows(
        weights=done.weights.reshape(-1, done.weights.shape[-1]),
        states={name: state.reshape(-1, *state.shape[3:]) for name, state in done.row_states.items()},
    )
