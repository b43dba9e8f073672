"""The folder of a run: whose it is, and whether the run there is new or goes on."""

import json
from pathlib import Path
from typing import Literal

from torchrec_cce.errors import ConfigError
from torchrec_cce.files.atomic import write_json
from torchrec_cce.maps.journal import PublishedVersion
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.sharding.agreement import on_all_ranks, on_first_rank
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.config_file import RUN_CONFIG, read_run_config
from torchrec_cce.training.log import has_measured

Start = Literal["new", "resume", "either"]
"""A new run; one to go on with from its newest checkpoint; or the second if there is one, else the first."""


def claim(run_dir: Path, config: RunConfig, start: Start) -> bool:
    """Make `run_dir` the folder of this configuration, or check that it is. Returns whether to resume.

    Raises:
        ConfigError: it is that of another run, or of another configuration; or there is nothing to resume.
    """
    if start == "new" and (has_measured(run_dir) or checkpoint.exists(run_dir)):  # a start that failed is no run
        raise ConfigError(f"{run_dir} holds a run already; resume it or choose another folder")
    if start == "new" or (start == "either" and not (run_dir / RUN_CONFIG).exists()):
        (run_dir / START).unlink(missing_ok=True)
        write_json(run_dir / RUN_CONFIG, config.as_dict(), indent=2)
        return False
    asked, started = config.as_dict(), read_run_config(run_dir).as_dict()
    changed = [name for name in asked if asked[name] != started[name]]
    if changed:
        raise ConfigError(f"{run_dir} was started with other values in {changed}; resume with the same configuration")
    return start == "resume" or checkpoint.exists(run_dir)


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
    write_json(record, {"version": entry.version, "manifest_sha256": entry.manifest_sha256})
    return entry.version
