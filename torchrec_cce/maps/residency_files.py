"""The residents of tables as files of a folder, beside the maps of a checkpoint: the ages, the order of those who came
one after another, and a manifest of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_cce.errors import MapFileError
from torchrec_cce.maps.arrow_file import numbers, read_array, write_array
from torchrec_cce.maps.residency import Residency
from torchrec_cce.maps.sealed import seal, sha256_of, unseal

_MANIFEST = "residents.json"


def write_residencies(folder: Path, tables: Mapping[str, Residency]) -> None:
    """Write to a new folder. The manifest comes last."""
    folder.mkdir(parents=True)
    entries = {}
    for number, (name, residency) in enumerate(tables.items()):
        path = folder / f"{number:04d}.ages.arrow"
        entries[name] = _written(path, "ages", residency.ages) | {
            "num_ids": residency.num_ids,
            "phases": residency.phases,
            "is_open": residency.is_open,
        }
        if residency.order is not None:
            path = folder / f"{number:04d}.order.arrow"
            entries[name]["order"] = _written(path, "order", residency.order) | {"length": len(residency.order)}
    (folder / _MANIFEST).write_bytes(seal(entries))


def read_residencies(folder: Path, *, verify: bool = True) -> dict[str, Residency]:
    """Table → its residency, memory-mapped.

    Args:
        verify: whether to check all digests; whoever reads a folder again may leave it out.

    Raises:
        MapFileError: a file is missing or damaged.
    """
    path = folder / _MANIFEST
    try:
        entries = unseal(path.read_bytes(), str(path))
    except (OSError, MapFileError) as error:
        raise MapFileError(f"{path}: missing or damaged ({error}); copy the checkpoint again") from error
    return {name: _read(folder, entry, verify=verify) for name, entry in entries.items()}


def _written(path: Path, name: str, numbers: npt.NDArray[np.unsignedinteger]) -> dict[str, Any]:
    with path.open("wb") as sink:
        write_array(sink, name, pa.array(numbers))
    return {"file": path.name, "sha256": sha256_of(path)}


def _read(folder: Path, entry: Mapping[str, Any], *, verify: bool) -> Residency:
    ages = _array(folder, entry, "ages", pa.uint8(), int(entry["num_ids"]), verify=verify)
    of_order = entry.get("order")  # not written where all residents came at once
    order = None
    if of_order is not None:
        order = _array(folder, of_order, "order", pa.uint32(), int(of_order["length"]), verify=verify)
    return Residency(ages=ages, phases=int(entry["phases"]), is_open=bool(entry["is_open"]), order=order)


def _array(
    folder: Path, entry: Mapping[str, Any], name: str, kind: pa.DataType, length: int, *, verify: bool
) -> npt.NDArray[Any]:
    path = folder / Path(entry["file"]).name
    try:
        found = sha256_of(path) if verify else entry["sha256"]
    except OSError as error:
        raise MapFileError(f"{path}: missing ({error}); copy the checkpoint again") from error
    if found != entry["sha256"]:
        raise MapFileError(
            f"{path}: SHA-256 {found[:12]}, recorded is {entry['sha256'][:12]}; damaged, copy the checkpoint again"
        )
    return numbers(read_array(path, name, kind, length))
