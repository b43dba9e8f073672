"""One pointer map as one Arrow IPC file: uncompressed, so that reading it is a memory map and costs no copy.

The schema's metadata holds the map's header, version and digest as JSON; the only column is `pointers`, lists of `c`
unsigned integers, without rows for a map that was never clustered.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from torchrec_cce.atomic import atomic_path
from torchrec_cce.errors import MapFileError
from torchrec_cce.hashing import UniversalHash
from torchrec_cce.maps.pointer_map import PointerMap

_KEY = b"torchrec_cce.pointer_map"


def write_pointer_map(path: str | Path, pointer_map: PointerMap) -> None:
    """Write `pointer_map` to `path`, which appears complete or not at all."""
    header = {**pointer_map.header(), "version": pointer_map.version, "digest": pointer_map.digest}
    empty = pa.array([], pa.list_(pa.uint8(), pointer_map.num_columns))
    pointers = empty if pointer_map.stored is None else pointer_map.stored
    schema = pa.schema([pa.field("pointers", pointers.type, nullable=False)], {_KEY: json.dumps(header).encode()})
    batch = pa.record_batch([pointers], schema=schema)
    with atomic_path(Path(path)) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
        writer.write_batch(batch)


def read_pointer_map(path: str | Path, *, verify: bool = True) -> PointerMap:
    """Memory-map the map at `path`.

    Args:
        path: a file that `write_pointer_map` made.
        verify: read all pointers once and compare their digest with the recorded one.

    Raises:
        FileNotFoundError: there is no such file.
        MapFileError: the file is cut short, not a pointer map, or its digest is not the recorded one.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        metadata = reader.schema.metadata or {}
        if _KEY not in metadata:
            raise MapFileError(f"{path}: an Arrow file, but not a pointer map")
        header = json.loads(metadata[_KEY])
        pointers = reader.get_batch(0).column(0)
        hashes = {
            name: UniversalHash(
                multipliers=np.array(header[name]["multipliers"], dtype=np.uint64),
                offsets=np.array(header[name]["offsets"], dtype=np.uint64),
                num_rows=header["num_rows"],
            )
            for name in ("codebook_hash", "helper_hash")
        }
        pointer_map = PointerMap(
            num_ids=header["num_ids"],
            stored=None if header["pointer_dtype"] is None else pointers,
            version=header["version"],
            **hashes,
        )
        recorded = header["digest"]
    except (pa.ArrowException, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        if isinstance(error, MapFileError):
            raise
        raise MapFileError(f"{path}: not a complete pointer map ({error}); copy or publish it again") from error
    if verify and pointer_map.digest != recorded:
        raise MapFileError(
            f"{path}: its content has digest {pointer_map.digest[:12]}, recorded is {recorded[:12]}; "
            f"the file is damaged, copy or publish it again"
        )
    return pointer_map
