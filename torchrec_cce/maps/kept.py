"""Which maps this process has written to files or read from some: the others are gone when it ends."""

from collections.abc import Mapping

from torchrec_cce.maps.snapshot import TableSnapshot

_DIGESTS: set[str] = set()


def note_kept(tables: Mapping[str, TableSnapshot]) -> None:
    """The maps of `tables` are in files."""
    _DIGESTS.update(table.pointer_map.digest for table in tables.values())


def is_kept(digest: str) -> bool:
    """Whether the map of this digest was noted."""
    return digest in _DIGESTS
