"""Where the workers of a job find what is as large as the IDs of a table. Nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.maps.bundle import read_tables
from torchrec_cce.maps.manifest import MANIFEST, Manifest
from torchrec_cce.maps.pointer_map import PointerMap, identity
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.snapshot import TableSnapshot


@dataclass(frozen=True, kw_only=True)
class BundleMap:
    """Maps in a folder that `write_folder` made, as checkpoints have them; every worker sees it under this path.

    Its digests are not checked again: whoever starts the job has read the folder with `read_folder`.
    """

    folder: Path

    def open(self) -> Mapping[str, TableSnapshot]:
        """The snapshots by table, memory-mapped. Raises MapFileError if files are missing or damaged."""
        path = self.folder / MANIFEST
        return read_tables(self.folder, Manifest.from_json(path.read_bytes(), str(path)))


@dataclass(frozen=True, kw_only=True)
class RegistryMap:
    """Maps in a registry, which every node fetches once."""

    url: str
    version: int
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Of the object store, see `open_store`; credentials may be among them."""

    def open(self) -> Mapping[str, TableSnapshot]:
        """The snapshots by table, verified and memory-mapped. Raises as `Registry.open`."""
        return Registry(self.url, **self.options).open(self.version).tables


@dataclass(frozen=True, kw_only=True)
class StoredTable:
    """Where any process finds what is as large as the IDs of a table. Picklable and small."""

    table: str
    """Its name."""
    maps: BundleMap | RegistryMap
    map_digest: str
    """Of the map that the table was trained with."""
    frequencies: Path | Literal["snapshot"] | None = None
    """How often the ID of each position was seen: a `.npy` file of [n] numbers that every worker sees; the frequencies
    of the map's snapshot; or None to let every ID count once."""

    def find(self, opened: Mapping[str, TableSnapshot]) -> tuple[PointerMap, npt.NDArray[np.integer] | None]:
        """The map, among those of `maps`, and the frequencies, memory-mapped.

        Raises:
            MapMismatchError: the map is another, or there is none.
            ConfigError: there are no such frequencies.
        """
        if self.table not in opened:
            raise MapMismatchError(f"{self.maps} holds no map of table {self.table!r}, only of {sorted(opened)}")
        snapshot = opened[self.table]
        found = snapshot.pointer_map
        if found.digest != self.map_digest:
            raise MapMismatchError(
                f"table {self.table!r} was trained with the map of digest {self.map_digest[:12]}; {self.maps} "
                f"holds {identity(found.version, found.generation, found.digest)}"
            )
        if self.frequencies != "snapshot":
            return found, None if self.frequencies is None else _read_numbers(self.frequencies)
        if snapshot.frequencies is None:
            raise ConfigError(f"table {self.table!r}: {self.maps} holds no frequencies; pass a file of them, or none")
        return found, snapshot.frequencies


def _read_numbers(path: Path) -> npt.NDArray[np.integer]:
    try:
        numbers: npt.NDArray[np.integer] = np.load(path, mmap_mode="r")
    except ValueError as error:
        raise ConfigError(f"{path}: not a .npy file of numbers ({error})") from error
    return numbers
