"""What a recluster job is asked for, what it finds before it begins, and a forecast of what it would take."""

import errno
import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass as serializable
from rich.filesize import decimal

from torchrec_cce.clustering.settings import HelperInit, ReclusterConfig
from torchrec_cce.errors import ConfigError, MapMismatchError, PublishConflictError, RegistryError
from torchrec_cce.files.cache import live_folder
from torchrec_cce.jobs.checkpoint.reader import CCECheckpoint, CheckpointTable
from torchrec_cce.jobs.recluster.estimate import Estimate, estimate
from torchrec_cce.jobs.recluster.thresholds import Thresholds
from torchrec_cce.maps.journal import PublishedVersion, RegistryState
from torchrec_cce.maps.manifest import Manifest
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.sealed import sha256_of
from torchrec_cce.sharding.checkpoint_index import METADATA
from torchrec_cce.sharding.digests import TENSORS, read_digests
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.config_file import RUN_CONFIG, read_run_config
from torchrec_cce.workers import EngineName


@dataclass(frozen=True, kw_only=True)
class ReclusterJob:
    """What is to be done. A seed or a setting that is None is that of the run, or the default if there is no run."""

    registry: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Options of the registry's object store, see `open_store`; they also go to the workers."""
    checkpoint: Path
    """The folder of a run, or a distributed checkpoint."""
    output: Path
    """A new folder of the same kind as `checkpoint`."""
    use_helper: Mapping[str, bool] = field(default_factory=dict)
    """Table → whether it uses its helper, for a checkpoint that lies by itself and does not tell; see `HelperUse`."""
    frequencies: Path | None = None
    """An `.npz` of CCE table → [n] int64; None takes the frequencies in the checkpoint, if it has any."""
    engine: EngineName = "local"
    num_workers: int | None = None
    memory_bytes: int = 4 << 30
    seed: int | None = None
    num_iterations: int | None = None
    points_per_centroid: int | None = None
    helper_init: HelperInit | None = None
    validation: Path | None = None
    """A log of the layout that the run was trained on."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    force: bool = False
    """Publish even if gates are closed."""


@dataclass(frozen=True, kw_only=True)
class ParentVersion:
    """The version that a checkpoint was trained with."""

    version: int
    child: PublishedVersion | None
    """The current version, if an earlier start of this job made it from this very checkpoint and did not finish."""


@dataclass(frozen=True, kw_only=True)
class DiskNeed:
    """Bytes that a job writes, at most."""

    output: int
    """Of the new checkpoint."""
    scratch: int
    """Beside the new checkpoint while the job runs, if no table has more IDs than embeddings."""
    registry: int
    """Of the new version."""


class ReclusterInput:
    """The checkpoint that a job clusters, and what follows from its files and the job alone.

    Raises:
        ConfigError: there is no checkpoint, or the job cannot be done with it.
    """

    def __init__(self, job: ReclusterJob) -> None:
        # Workers, perhaps on other nodes, have another working directory.
        job = self.job = replace(job, checkpoint=job.checkpoint.resolve(), output=job.output.resolve())
        if job.checkpoint in job.output.parents:
            raise ConfigError(f"{job.output} is inside the checkpoint {job.checkpoint}; choose a folder outside of it")
        self.checkpoint = CCECheckpoint.at(job.checkpoint, use_helper=job.use_helper)
        is_run = (job.checkpoint / RUN_CONFIG).exists()
        self.config: RunConfig | None = read_run_config(job.checkpoint) if is_run else None
        if job.validation is not None and self.config is None:
            raise ConfigError(f"{job.checkpoint}: only a run says how to build its model; leave `validation` out")
        self.seed = job.seed if job.seed is not None else 0 if self.config is None else self.config.seed
        self.registry = Registry(job.registry, **job.options)
        self.identity = self._identity()

    @property
    def source(self) -> str:
        """The checkpoint, as the manifest of the version names it."""
        return str(self.checkpoint.folder)

    @cached_property
    def settings(self) -> ReclusterConfig:
        base = ReclusterConfig() if self.config is None else self.config.recluster.settings()
        given = {name: getattr(self.job, name) for name in ("num_iterations", "points_per_centroid", "helper_init")}
        return replace(base, **{name: value for name, value in given.items() if value is not None})

    @cached_property
    def tables(self) -> list[CheckpointTable]:
        """See `CCECheckpoint.tables`. Raises ConfigError if there is nothing to learn."""
        tables = self.checkpoint.tables(self.registry)
        if all(table.residents is not None and table.open_residents is None for table in tables):
            raise ConfigError(
                f"{self.source}: no phase of residents is open, so that there are no rows to fold, and without rows "
                "and helper a clustering finds again what there is; resume the run, which begins the next phase if one "
                "is to come, or publish its codewords as they are (`torchrec-cce maps publish`)"
            )
        return tables

    @cached_property
    def disk_need(self) -> DiskNeed:
        """Bytes of what the job writes."""
        maps = [(table.config, table.snapshot.pointer_map) for table in self.tables]
        pointers = sum(m.num_ids * config.pointer_format.num_bytes for config, m in maps)
        vocabularies = sum(0 if m.vocabulary is None else m.vocabulary.nbytes for _, m in maps)
        weights = sum(self.checkpoint.bytes_of([table.weight]) for table in self.tables)
        states = sum(self.checkpoint.bytes_of(list(table.states.values())) for table in self.tables)
        counted = self.job.frequencies or any(table.snapshot.frequencies is not None for table in self.tables)
        frequencies = sum(8 * m.num_ids for _, m in maps) if counted else 0
        folded = [found.copied for table in self.tables if (found := table.open_residents) is not None]
        rows = 2 * self.checkpoint.bytes_of([key for keys in folded for key in keys])  # parts are there twice meanwhile
        return DiskNeed(
            output=self.checkpoint.num_bytes + pointers + weights + states,
            scratch=pointers + frequencies + rows,
            registry=pointers + vocabularies + weights + frequencies,
        )

    def check_room(self) -> None:
        """Raise OSError unless the output folder's disk has room, as far as that is known beforehand."""
        need = self.disk_need.output + self.disk_need.scratch
        there = next(folder for folder in self.job.output.parents if folder.exists())
        free = shutil.disk_usage(there).free
        if free < need:
            message = f"{os.strerror(errno.ENOSPC)}: {decimal(need)} are needed, {decimal(free)} are free"
            raise OSError(errno.ENOSPC, message, str(there))

    def parent(self) -> ParentVersion:
        """The version that is to be the parent of the new one.

        Raises:
            PublishConflictError: another one is current.
            MapMismatchError: the registry is of another model.
            RegistryError: nothing was published yet, or the store did not answer.
        """
        state = self.registry.state()
        if state.current is None:
            raise RegistryError(
                f"{self.registry.url}: nothing has been published yet; begin with the maps of this checkpoint "
                "(`torchrec-cce maps publish`)"
            )
        current = state.find(None)
        manifest = self.registry.manifest(current.version)
        if _digests(manifest) == self._digests:
            return ParentVersion(version=current.version, child=None)
        before = manifest.parent
        if manifest.provenance.checkpoint == self.source and before is not None and self._are_of(state, before):
            return ParentVersion(version=before, child=current)
        if manifest.tables.keys() != self._digests.keys():
            raise MapMismatchError(
                f"{self.source} has CCE tables {sorted(self._digests)}, {self.registry.url} {sorted(manifest.tables)}; "
                "it is the registry of another model"
            )
        newest_first = reversed(state.versions)
        mine = next((entry.identity for entry in newest_first if self._are_of(state, entry.version)), None)
        raise PublishConflictError(
            f"{self.registry.url}: {self.source} was trained with {mine or 'maps that are no version of it'}, but "
            f"current is {current.identity}; take a checkpoint that was trained with that, or roll back first"
        )

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        given = self.job.frequencies
        settings = asdict(self.settings)
        return {
            "checkpoint": sha256_of(self.checkpoint.folder / METADATA),
            "weights": self._weights(),
            "maps": [stamp.digest for stamps in self.checkpoint.stamps.values() for stamp in stamps],
            "use_helper": dict(self.job.use_helper),
            "frequencies": None if given is None else sha256_of(given),
            "seed": self.seed,
            **{name: settings[name] for name in ("num_iterations", "points_per_centroid", "backend", "helper_init")},
        }

    def _weights(self) -> dict[str, str]:
        """File of tensors → its SHA-256."""
        folder = self.checkpoint.folder
        digests = read_digests(folder)
        if digests is not None:
            return digests.weights
        return {path.name: sha256_of(path) for path in sorted(folder.glob(f"*{TENSORS}"))}

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {table.name: table.snapshot.pointer_map.digest for table in self.tables}

    def _are_of(self, state: RegistryState, version: int) -> bool:
        """Whether `version` can be opened and has the maps of the checkpoint."""
        there = version in {published.version for published in state.versions}
        return there and _digests(self.registry.manifest(version)) == self._digests


def _digests(manifest: Manifest) -> dict[str, str]:
    return {name: table.map_digest for name, table in manifest.tables.items()}


@serializable(frozen=True, kw_only=True)
class Forecast:
    """What a job would do and need."""

    checkpoint: str
    output: str
    registry: str
    parent: int
    num_ids: dict[str, int]
    """Table → positions of its map."""
    use_helper: dict[str, bool]
    """Table → whether its helper is used."""
    residents: dict[str, int]
    """Table with an open phase → IDs whose rows are folded."""
    clustering: Estimate
    """Computed without the frequencies of IDs."""
    disk: DiskNeed
    thresholds: Thresholds

    def to_json(self) -> str:
        """One line."""
        return _FORECAST.dump_json(self).decode()


_FORECAST = TypeAdapter(Forecast)


def foresee(job: ReclusterJob) -> Forecast:
    """Check everything that can be checked, and measure a little of the work. Nothing stays that was written.

    Raises:
        The errors of `recluster` that come before it begins to write.
    """
    given = ReclusterInput(job)
    parent = given.parent()
    given.check_room()
    live_folder().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=live_folder()) as folder:
        clustering = estimate(
            [given.checkpoint.source(table, Path(folder)) for table in given.tables],
            given.settings,
            num_workers=job.num_workers or os.cpu_count() or 1,
            memory_bytes=job.memory_bytes,
        )
    return Forecast(
        checkpoint=given.source,
        output=str(given.job.output),
        registry=given.registry.url,
        parent=parent.version,
        num_ids={table.name: table.snapshot.pointer_map.num_ids for table in given.tables},
        use_helper={table.name: table.config.use_helper for table in given.tables},
        residents={
            table.name: found.residency.slots.num_slots
            for table in given.tables
            if (found := table.open_residents) is not None
        },
        clustering=clustering,
        disk=given.disk_need,
        thresholds=job.thresholds,
    )


_SUFFIX = ".npy"
_HEADER_BYTES = 1 << 16
"""The most that a `.npy` file has before its numbers."""


def unpack_frequencies(archive: Path, folder: Path, num_ids: Mapping[str, int]) -> dict[str, Path]:
    """Write each array of `archive` to a `.npy` file in the new `folder`, in bounded memory.

    Args:
        archive: table → [n] int64.
        num_ids: table → n, of all tables that there are.

    Returns:
        table → its file, for each table in the archive.

    Raises:
        ConfigError: there is no such archive, it names an unknown table, or an array is not [n] int64.
    """
    folder.mkdir(parents=True)
    files = {}
    try:
        with zipfile.ZipFile(archive) as opened:
            names = [name.removesuffix(_SUFFIX) for name in opened.namelist()]
            unknown = sorted(set(names) - set(num_ids))
            if unknown:
                raise ConfigError(f"{archive}: frequencies of {unknown}; the CCE tables are {sorted(num_ids)}")
            # Before a byte is unpacked: an archive gives no more than it says, but that may be a thousand times itself.
            for name, member in zip(names, opened.infolist(), strict=True):
                most = num_ids[name] * np.dtype(np.int64).itemsize + _HEADER_BYTES
                if member.file_size > most or names.count(name) > 1:
                    raise ConfigError(
                        f"{archive}: {name!r} would be {member.file_size} bytes, {names.count(name)} times; int64 "
                        f"[{num_ids[name]}] is at most {most}, once"
                    )
            for number, name in enumerate(names):
                files[name] = folder / f"{number:04d}{_SUFFIX}"
                with opened.open(name + _SUFFIX) as packed, files[name].open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
                _check(archive, name, files[name], num_ids[name])
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, FileNotFoundError, KeyError) as error:
        raise ConfigError(f"{archive}: not an .npz archive of frequencies ({error})") from error
    return files


def _check(archive: Path, name: str, file: Path, num_ids: int) -> None:
    try:
        array = np.load(file, mmap_mode="r")
    except ValueError as error:
        raise ConfigError(f"{archive}: {name!r} is not an array of numbers ({error})") from error
    if array.shape != (num_ids,) or array.dtype != np.int64:
        raise ConfigError(
            f"{archive}: frequencies of {name!r} are {array.dtype} {list(array.shape)}, not int64 [{num_ids}], one a "
            "position of its map"
        )
