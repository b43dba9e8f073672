"""`MapStamp`: which map weights were trained with."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from torchrec_cce.maps.pointer_map import PointerMap, identity

_DIGEST_BYTES = 32


class MapStamp(NamedTuple):
    """What weights carry of the map they were trained with: a row of the remap's extra state."""

    version: int | None
    """The registry's; None if the map was not published."""
    generation: int
    digest: str

    @classmethod
    def of(cls, pointer_map: PointerMap) -> "MapStamp":
        return cls(pointer_map.version, pointer_map.generation, pointer_map.digest)

    @staticmethod
    def to_tensor(stamps: Sequence["MapStamp"]) -> torch.Tensor:
        """`[maps, 34] int64`: version (0: not published), generation, bytes of the digest."""
        rows = [[stamp.version or 0, stamp.generation, *bytes.fromhex(stamp.digest)] for stamp in stamps]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2 + _DIGEST_BYTES)

    @staticmethod
    def from_tensor(state: torch.Tensor) -> list["MapStamp"]:
        rows = state.tolist()
        return [MapStamp(version or None, generation, bytes(digest).hex()) for version, generation, *digest in rows]

    @property
    def identity(self) -> str:
        return identity(*self)
