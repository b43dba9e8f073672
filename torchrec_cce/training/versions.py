"""The tables of a run as versions of its registry: those that it publishes, and those that it adopts."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_cce.errors import ConfigError, RegistryError
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.modules.recluster import TableReport
from torchrec_cce.modules.state_names import codewords_weight, in_checkpoint, joined, pooled_weight
from torchrec_cce.sharding.agreement import on_first_rank
from torchrec_cce.sharding.distributed_checkpoint import DistributedCheckpoint
from torchrec_cce.sharding.frequencies import ShardedFrequencies
from torchrec_cce.sharding.tables import ShardedMaps, check_on_all_ranks, collections_of
from torchrec_cce.sharding.watch import Adoption, VersionWatcher
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config import RunConfig, config_digest
from torchrec_cce.training.config_file import read_run_config


class RunVersions:
    """What a run and its registry tell each other. Every rank calls every method."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        *,
        check: Callable[[], object],
    ) -> None:
        self._config, self._run_dir, self._model, self._optimizer = config, run_dir, model, optimizer
        self._check = check
        self._collections = list(collections_of(model).values())
        self._watcher: VersionWatcher | None = None

    def watching(self, version: int | None) -> AbstractContextManager[object]:
        """A context in which the registry is watched, if the configuration says so.

        Args:
            version: the newest version that the run knows of.
        """
        url, digest = self._config.registry.url, config_digest(self._config)
        if url is not None and self._config.registry.watch_every is not None:
            self._watcher = VersionWatcher(
                Registry(url),
                version=version,
                is_own=lambda made: (made.checkpoint, made.config_digest) == (str(self._run_dir), digest),
            )
        return self._watcher or nullcontext()

    @property
    def known(self) -> int | None:
        """The registry's newest version that the run knows of, if it watches it: see `VersionWatcher.version`."""
        return None if self._watcher is None else self._watcher.version

    def maps(self) -> dict[str, PointerMap]:
        """CCE table → its map as it is now."""
        return {name: each.pointer_map(name) for each in self._collections for name in each.cce_tables()}

    def publish(self, reports: Mapping[str, TableReport], frequencies: ShardedFrequencies) -> dict[str, Any]:
        """Publish the tables as they are now. Training goes on if the registry does not answer.

        Returns:
            For the metrics: the `version`, or the `error`.
        """
        registry, digest = self._config.registry.url, config_digest(self._config)
        assert registry is not None
        tables = ShardedMaps(self._model).snapshot(reports, frequencies=frequencies.totals())
        try:
            published = on_first_rank(
                lambda: Registry(registry).publish(
                    tables,
                    parent=self.known,
                    checkpoint=str(self._run_dir),
                    config_digest=digest,
                    confirm=self._check,
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

    def adopt(self, frequencies: ShardedFrequencies) -> tuple[Adoption | None, ShardedFrequencies]:
        """Adopt the version that is current in the registry, once all ranks have it; see `VersionWatcher`.

        Returns:
            What it came to, and the frequencies by the positions of the maps that the model has then. If a host has no
            room for these frequencies, the model keeps its maps.
        """
        assert self._watcher is not None
        old, frequencies_then = self.maps(), frequencies

        def before(opened: MapVersion) -> None:
            nonlocal frequencies_then
            self._check_raw_ids(opened)
            check_on_all_ranks(self._model, opened.tables)
            new = {name: table.pointer_map for name, table in opened.tables.items()}
            frequencies_then = frequencies.moved(old, new)

        settings = self._config.recluster.settings()
        adopted = self._watcher.adopt_current(self._model, self._optimizer, before=before, settings=settings)
        has_changed = adopted is not None and adopted.error is None
        return adopted, frequencies_then if has_changed else frequencies

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
        MapFileError, DataFileError: a file is missing or damaged.
    """
    config = read_run_config(run_dir)
    folder = checkpoint.newest_whole(run_dir)
    weight = codewords_weight if config.embedding.method == "cce_residents" else pooled_weight
    entropies = checkpoint.read_position(folder).entropies
    tables = {}
    for collection in sorted(path.name for path in (folder / "maps").iterdir()):
        maps = checkpoint.read_maps(folder, collection)
        keys = {name: in_checkpoint(joined(collection, weight(name))) for name in maps}
        weights = DistributedCheckpoint(folder=folder).read(list(keys.values()))
        for name, table in maps.items():
            whole = weights[keys[name]].float().numpy()
            tables[name] = replace(table, weights=whole, entropies=entropies.get(name, ()))
    if not tables:
        raise ConfigError(f"{run_dir}: embedding.method={config.embedding.method!r} has no map to publish; cce has")
    return RunSnapshot(tables=tables, checkpoint=str(folder), config_digest=config_digest(config))
