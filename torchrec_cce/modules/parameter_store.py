"""Where the rows of a stock table live, and the state that an optimizer keeps of them: here, in one parameter."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from torchrec_cce.clustering.fold import RowArray
from torchrec_cce.errors import ConfigError

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


class ResidentStore(Protocol):
    """Where the rows of residents live."""

    def read_rows(self) -> RowArray: ...

    def restart(self, parts: Iterable[tuple[int, Array]]) -> None:
        """Write rows, a part at a time with its first row, and set every row's state to zero."""
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

    def read_rows(self) -> RowArray:
        return to_array(self._parameter)

    def restart(self, parts: Iterable[tuple[int, Array]]) -> None:
        with torch.no_grad():
            for first, rows in parts:
                self._parameter[first : first + len(rows)] = torch.from_numpy(rows)
            for value in self._states.values():
                value.zero_()


def to_array(tensor: torch.Tensor) -> Array:
    """A float32 copy of `tensor` on the CPU."""
    array: Array = tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous().numpy()
    return array
