"""`MapStamp`: which map weights were trained with; and `WeightStamps`, where a collection keeps those of its tables."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from torchrec_cce.errors import MapMismatchError
from torchrec_cce.maps.pointer_map import PointerMap, identity

_DIGEST_BYTES = 32
NAMELESS = "00" * _DIGEST_BYTES
"""In place of the digest of a table's name, in checkpoints of before names were stamped."""


class MapStamp(NamedTuple):
    """What weights carry of the map they were trained with: a row of the remap's extra state."""

    version: int | None
    """The registry's; None if the map was not published."""
    generation: int
    digest: str
    table: str
    """SHA-256 of the table's name, or `NAMELESS`."""

    @classmethod
    def of(cls, table: str, pointer_map: PointerMap) -> "MapStamp":
        return cls(pointer_map.version, pointer_map.generation, pointer_map.digest, _name_digest(table))

    @staticmethod
    def to_tensor(stamps: Sequence["MapStamp"]) -> torch.Tensor:
        """`[maps, 34] int64`: version (0: not published), generation, and 32 numbers of two bytes each.

        The low bytes are the digest of the map; the high ones, which were zero before names were stamped, that of the
        table's name. So old and new stamps have one shape, by which checkpoints are read in place.
        """
        rows = [
            [
                stamp.version or 0,
                stamp.generation,
                *(
                    low | high << 8
                    for low, high in zip(bytes.fromhex(stamp.digest), bytes.fromhex(stamp.table), strict=True)
                ),
            ]
            for stamp in stamps
        ]
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 2 + _DIGEST_BYTES)

    @staticmethod
    def from_tensor(state: torch.Tensor) -> list["MapStamp"]:
        """Raises MapMismatchError if `state` holds no stamps."""
        if state.dim() != 2 or state.dtype != torch.int64 or (len(state) and state.size(1) < 2):
            raise MapMismatchError(f"the weights have {state.dtype} {list(state.shape)} in place of the stamps of maps")
        return [
            MapStamp(
                version or None,
                generation,
                bytes(number & 0xFF for number in numbers).hex(),
                bytes(number >> 8 & 0xFF for number in numbers).hex(),
            )
            for version, generation, *numbers in state.tolist()
        ]

    @property
    def is_named(self) -> bool:
        """Whether it says which table it is of."""
        return self.table != NAMELESS

    @property
    def identity(self) -> str:
        return identity(self.version, self.generation, self.digest)


def stamps_by_table(state: torch.Tensor, tables: Sequence[str]) -> dict[str, MapStamp]:
    """Table → its stamp in `state`, by the names of tables; tables that are not in `state` are left out.

    Old stamps have no names, and are those of `tables` in their order.

    Raises:
        MapMismatchError: there are no names, and another number of stamps than tables.
    """
    stamps = MapStamp.from_tensor(state)
    if not all(stamp.is_named for stamp in stamps):
        if len(stamps) != len(tables):
            raise MapMismatchError(f"the checkpoint has maps of {len(stamps)} CCE tables, the module has {len(tables)}")
        return dict(zip(tables, stamps, strict=True))
    by_name = {stamp.table: stamp for stamp in stamps}
    return {table: by_name[name] for table in tables if (name := _name_digest(table)) in by_name}


def check_stamped(state: torch.Tensor | None, tables: Sequence[str], loaded: Sequence[str]) -> None:
    """Raise MapMismatchError if weights of a table come without the stamp of a map.

    Args:
        state: the stamps of a checkpoint, if it has any.
        tables: all that have a map.
        loaded: those that the checkpoint has weights of.
    """
    missing = set() if state is None else set(loaded) - stamps_by_table(state, tables).keys()
    if missing:
        raise MapMismatchError(
            f"table {min(missing)!r}: the checkpoint has its weights, but no stamp of the map that they were trained "
            "with: it was no CCE table there. Leave its weights out, with strict=False"
        )


def _name_digest(table: str) -> str:
    return hashlib.sha256(table.encode()).hexdigest()


class WeightStamps:
    """The stamps of the tables of a collection, in one tensor for good.

    A state dict has this very tensor, as it has the very weights: what writes into weights in place, as
    `torch.distributed.checkpoint.load` does, writes here, too, and `were_overwritten` tells.

    Args:
        tables: their names.
    """

    def __init__(self, tables: Sequence[str]) -> None:
        self._tables = list(tables)
        # By numpy: neither the default device nor a mode of torch has a say.
        self._numbers = np.zeros((len(tables), 2 + _DIGEST_BYTES), np.int64)
        self._written = self._numbers.copy()
        self.tensor = torch.from_numpy(self._numbers)

    def write(self, table: str, stamp: MapStamp) -> None:
        """From now on, the weights of `table` are those of this map; of others, what was loaded stays."""
        rows = stamps_by_table(self.tensor, self._tables) if self.were_overwritten else {}
        for name, found in rows.items():  # in a checkpoint they may have been in another order
            self._numbers[self._tables.index(name)] = MapStamp.to_tensor([found]).numpy()
        row = self._tables.index(table)
        self._numbers[row] = self._written[row] = MapStamp.to_tensor([stamp]).numpy()

    @property
    def were_overwritten(self) -> bool:
        """Whether somebody else has written into the tensor."""
        return bool(self._numbers.tobytes() != self._written.tobytes())  # the fastest way, for every forward

    def loaded(self) -> dict[str, MapStamp]:
        """Table → what is in the tensor. Raises as `stamps_by_table`."""
        return stamps_by_table(self.tensor, self._tables)

    def __getstate__(self) -> dict[str, Any]:
        """Numbers, not a tensor: that would lie in memory which two processes share, and one of them write to it."""
        return {"tables": self._tables, "numbers": self._numbers.copy(), "written": self._written}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._tables, self._numbers, self._written = state["tables"], state["numbers"], state["written"].copy()
        self.tensor = torch.from_numpy(self._numbers)
