"""The tables of a run as versions of its registry: those that it publishes, and those that it moves to."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_cce.errors import ConfigError, RegistryError
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.modules.recluster import TableReport
from torchrec_cce.sharding.agreement import on_first_rank
from torchrec_cce.sharding.frequencies import ShardedFrequencies
from torchrec_cce.sharding.tables import ShardedMaps, check_on_all_ranks, collections_of
from torchrec_cce.sharding.watch import Adoption, VersionWatcher
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config import RunConfig, config_digest
from torchrec_cce.training.config_file import read_run_config

_log = logging.getLogger(__name__)


class RunVersions:
    """What a run and its registry tell each other. Every rank calls every method."""

    def __init__(
        self, config: RunConfig, run_dir: Path, model: DistributedModelParallel, optimizer: CombinedOptimizer
    ) -> None:
        self._config, self._run_dir, self._model, self._optimizer = config, run_dir, model, optimizer
        self._collections = list(collections_of(model).values())
        self._watcher: VersionWatcher | None = None

    def watching(self, version: int | None) -> AbstractContextManager[object]:
        """While entered, the registry is watched, if the run is to follow it.

        Args:
            version: that the run knows of.
        """
        url, digest = self._config.registry.url, config_digest(self._config)
        if url is not None and self._config.registry.watch_every is not None:
            self._watcher = VersionWatcher(
                Registry(url),
                version=version,
                is_own=lambda one: (one.checkpoint, one.config_digest) == (str(self._run_dir), digest),
            )
        return self._watcher or nullcontext()

    @property
    def known(self) -> int | None:
        """The registry's newest version that the run knows of, if it watches it: see `VersionWatcher.version`."""
        return None if self._watcher is None else self._watcher.version

    def maps(self) -> dict[str, PointerMap]:
        """CCE table → its map as it is now."""
        return {name: one.pointer_map(name) for one in self._collections for name in one.cce_tables()}

    def publish(self, reports: Mapping[str, TableReport], frequencies: ShardedFrequencies) -> dict[str, Any]:
        """Publish the tables as they are now. A registry that does not answer stops no training.

        Returns:
            For the metrics: the `version`, or the `error`.
        """
        registry, digest = self._config.registry.url, config_digest(self._config)
        assert registry is not None
        tables = ShardedMaps(self._model).snapshot(reports, frequencies=frequencies.totals())
        try:
            published = on_first_rank(
                lambda: Registry(registry).publish(
                    tables, parent=self.known, checkpoint=str(self._run_dir), config_digest=digest
                )
            )
        except RegistryError as error:
            return {"error": str(error)}
        if self._watcher is not None:
            self._watcher.published(published.version)
        for collection in self._collections:
            for name in collection.cce_tables():
                collection.attach_pointer_map(name, collection.pointer_map(name).published_as(published.version))
        return {"version": published.version}

    def follow(self, frequencies: ShardedFrequencies) -> tuple[Adoption | None, ShardedFrequencies]:
        """Adopt the version that is current in the registry, once all ranks have it; see `VersionWatcher`.

        Returns:
            What it came to, and the frequencies by the rows of the maps that there are then. If a host has no room for
            these, the model stays where it is.
        """
        assert self._watcher is not None
        old, moved_frequencies = self.maps(), frequencies

        def before(opened: MapVersion) -> None:
            nonlocal moved_frequencies
            self._check_raw_ids(opened)
            check_on_all_ranks(self._model, opened.tables)
            new = {name: table.pointer_map for name, table in opened.tables.items()}
            moved_frequencies = frequencies.moved(old, new)

        settings = self._config.recluster.settings()
        moved = self._watcher.adopt_current(self._model, self._optimizer, before=before, settings=settings)
        has_moved = moved is not None and moved.error is None
        return moved, moved_frequencies if has_moved else frequencies

    def _check_raw_ids(self, opened: MapVersion) -> None:
        """Raise ConfigError if a version takes other raw IDs than the run reads."""
        maps = self.maps()
        for name in maps.keys() & opened.tables.keys():
            if maps[name].takes_any_id != opened.tables[name].pointer_map.takes_any_id:
                raise ConfigError(
                    f"table {name!r} takes any raw ID, by a vocabulary or a policy, in only one of the version and "
                    "this run, which cannot change how it reads IDs; start a run from that version"
                )


@dataclass(frozen=True, kw_only=True)
class RunSnapshot:
    """The CCE tables of a run's newest checkpoint, and where they come from."""

    tables: dict[str, TableSnapshot]
    checkpoint: str
    config_digest: str
    """SHA-256 of the run's configuration."""


def snapshot_of_run(run_dir: Path) -> RunSnapshot:
    """Read maps, weights, frequencies and entropies of a run's newest checkpoint, whatever ranks wrote it.

    Raises:
        ConfigError: there is no run or no checkpoint, or the model has no CCE table.
        MapFileError: a map is missing or damaged.
    """
    config = read_run_config(run_dir)
    folder = checkpoint.newest(run_dir)
    entropies = checkpoint.read_position(folder).entropies
    tables = {}
    for collection in sorted(path.name for path in (folder / "maps").iterdir()):
        maps = checkpoint.read_maps(folder, collection)
        weights = _weights(folder, {name: f"{collection}.ebc.embedding_bags.{name}.weight" for name in maps})
        for name, table in maps.items():
            tables[name] = replace(table, weights=weights[name], entropies=entropies.get(name, ()))
    if not tables:
        raise ConfigError(f"{run_dir}: embedding.method={config.embedding.method!r} has no map to publish; cce has")
    return RunSnapshot(tables=tables, checkpoint=str(folder), config_digest=config_digest(config))


def _weights(folder: Path, names: dict[str, str]) -> dict[str, npt.NDArray[np.float32]]:
    """Table → its whole weights, from a distributed checkpoint of any sharding."""
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    # The checkpoint was written by this package: what stands under these names is tensors.
    whole = {f"model.{name}": torch.empty(saved[f"model.{name}"].size) for name in names.values()}  # type: ignore[union-attr]
    if whole:
        load_distributed(whole, checkpoint_id=str(folder), no_dist=True)
    return {table: whole[f"model.{name}"].numpy() for table, name in names.items()}
