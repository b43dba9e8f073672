"""The version of a registry that a run starts from: found once, recorded, and the same when the start is repeated."""

import json
from pathlib import Path

from torchrec_cce.atomic import atomic_path
from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.journal import PublishedVersion
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.sharding.agreement import on_all_ranks, on_first_rank

START = "start.json"
"""In a run's folder: the version that it started from."""


def open_start(url: str, start: int | str, run_dir: Path) -> MapVersion:
    """Open the version that a new run starts from, on every rank.

    Args:
        start: its number, or `"current"`: what is current now, or was when this run was begun before.

    Raises:
        RegistryError: there is no such version, or the registry does not answer.
        MapFileError: the version is damaged.
        ConfigError: the run was begun before, from a version that the registry no longer has under this number.
    """
    registry = Registry(url)
    version = on_first_rank(lambda: _version(registry, start, run_dir))
    return on_all_ranks(lambda: registry.open(version))


def _version(registry: Registry, start: int | str, run_dir: Path) -> int:
    record = run_dir / START
    begun = json.loads(record.read_text()) if record.exists() else None
    wanted = begun["version"] if begun else None if start == "current" else int(start)
    entry: PublishedVersion = registry.state().find(wanted)
    if begun and begun["manifest_sha256"] != entry.manifest_sha256:
        raise ConfigError(
            f"{run_dir} was begun from version {entry.version} with manifest {begun['manifest_sha256'][:12]}; that of "
            f"{registry.url} is {entry.identity}. Choose another folder"
        )
    with atomic_path(record) as temporary:
        temporary.write_text(json.dumps({"version": entry.version, "manifest_sha256": entry.manifest_sha256}))
    return entry.version
