"""Whether the tables of a checkpoint use their helper words: a run says so, a checkpoint by itself shows it at best."""

import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torchrec import PoolingType

from torchrec_cce.errors import ConfigError, DataFileError, MapMismatchError
from torchrec_cce.jobs.recluster.source import BundleMap, RegistryMap
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.methods.cce import CCEConfig, CCEEmbeddingBagConfig, CCEEmbeddingConfig
from torchrec_cce.modules.parameter_store import TableRows, to_array
from torchrec_cce.modules.remap import MapStamp
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config_file import RUN_CONFIG, read_run_config


@dataclass(frozen=True, kw_only=True)
class HelperUse:
    """What is known before the tensors are read."""

    of_run: bool | None = None
    """Of all tables, by the configuration of a run; None for a checkpoint by itself."""
    of_tables: Mapping[str, bool] = field(default_factory=dict)
    """Table of a checkpoint by itself → what is said of it."""

    def of(self, table: str, states: Callable[[], Iterable[npt.NDArray[np.float32]]]) -> bool:
        """Of one table.

        Training changes the state of the rows that a batch reads, each in its own way, and a clustering makes that of
        all helper rows zero. So helper rows whose states differ are used. If all are alike, they are not used, or
        nothing was trained since the model was made or clustered: the weights do not tell, as a helper that is not used
        may be zero or what it was drawn as.

        Args:
            states: of the helper's rows, each [c, k, …].

        Raises:
            ConfigError: nothing is said of the table, and its states do not tell; or they tell another thing.
        """
        if self.of_run is not None:
            return self.of_run
        said = self.of_tables.get(table)
        is_trained = any(np.any(state != state[:1, :1]) for state in states())
        if said is None and not is_trained:
            raise ConfigError(
                f"table {table!r}: the optimizer's state is the same in all rows of its helper, or there is none: it "
                "has use_helper=False, or was not trained since it was made or clustered; say which, by "
                f"--without-helper {table} or --with-helper {table}"
            )
        if is_trained and said is False:
            raise ConfigError(
                f"table {table!r}: the optimizer's state says that its helper words were trained; leave "
                f"--without-helper {table} out"
            )
        return is_trained if said is None else said


METADATA = ".metadata"
"""What `torch.distributed.checkpoint` calls its index."""
_EXTRA_STATE = re.compile(r"model\.(?:(?P<path>.+)\.)?remap\._extra_state")
_POOLING = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointTable:
    """A CCE table in a checkpoint: its map, opened, and the names of its tensors."""

    config: CCEConfig
    collection: str
    """The path of its collection in the model."""
    maps: BundleMap | RegistryMap
    snapshot: TableSnapshot
    """The map that its weights were trained with."""
    weight: str
    states: Mapping[str, str]
    """Name of an entry in the optimizer's state that has one value or vector a row → name of its tensor."""

    @property
    def name(self) -> str:
        name: str = self.config.name
        return name


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A distributed checkpoint `{"model": …, "optimizer": …}`, whatever the ranks and the sharding that it is of.

    In a run folder, or one by itself; there, maps that do not lie beside it in `maps/` are those of a registry.
    """

    folder: Path
    helper_use: HelperUse = field(default_factory=HelperUse)

    @classmethod
    def at(cls, path: Path, *, use_helper: Mapping[str, bool] | None = None) -> "Checkpoint":
        """The checkpoint `path`, or the newest one of the run `path`.

        Args:
            use_helper: of some tables, if their optimizer's states do not tell; see `HelperUse`.

        Raises:
            ConfigError: there is none, or it is a run, which says by itself whether the helper is used.
        """
        said = use_helper or {}
        if (path / RUN_CONFIG).exists():
            of_run = read_run_config(path).embedding.use_helper
            if said:
                raise ConfigError(
                    f"{path}: the run says use_helper={str(of_run).lower()}; leave --with-helper and --without-helper "
                    "out"
                )
            return cls(folder=checkpoint.newest(path), helper_use=HelperUse(of_run=of_run))
        if not (path / METADATA).exists():
            raise ConfigError(
                f"{path}: neither the folder of a run ({RUN_CONFIG}) nor a distributed checkpoint ({METADATA})"
            )
        return cls(folder=path, helper_use=HelperUse(of_tables=said))

    @cached_property
    def metadata(self) -> Metadata:
        """Raises DataFileError if it is damaged."""
        path = self.folder / METADATA
        try:
            found = FileSystemReader(self.folder).read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError) as error:
            raise DataFileError(
                f"{path}: damaged, or of another version of PyTorch ({error}); copy it again"
            ) from error
        if not isinstance(found, Metadata):
            raise DataFileError(f"{path}: holds a {type(found).__name__}, not the index of a distributed checkpoint")
        return found

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def bytes_of(self, keys: Sequence[str]) -> int:
        """Of some whole tensors."""
        tensors = [self._tensors()[key] for key in keys]
        return sum(tensor.size.numel() * tensor.properties.dtype.itemsize for tensor in tensors)

    @cached_property
    def stamps(self) -> dict[str, list[MapStamp]]:
        """Path of a collection → the stamps of its maps, in the order of its tables.

        Raises:
            ConfigError: the model has no CCE table, or no model of this package is in the checkpoint.
        """
        keys = {key: match["path"] or "" for key in self._tensors() if (match := _EXTRA_STATE.fullmatch(key))}
        states = self.read(list(keys))
        stamps = {path: MapStamp.from_tensor(states[key]) for key, path in keys.items()}
        if not any(stamps.values()):
            raise ConfigError(f"{self.folder}: there is no CCE table in this checkpoint, and so nothing to cluster")
        return {path: each for path, each in stamps.items() if each}

    @property
    def has_maps(self) -> bool:
        """Whether the maps lie beside the weights."""
        return (self.folder / "maps").is_dir()

    def tables(self, registry: Registry) -> list[CheckpointTable]:
        """The CCE tables, with the maps that their weights were trained with.

        Args:
            registry: where the maps are if they are not beside the checkpoint.

        Raises:
            MapMismatchError: the maps are not those that the weights were trained with; the message names both.
            MapFileError, RegistryError: the maps cannot be opened.
            ConfigError: whether a table uses its helper is not known; or it was said of a table that there is not.
        """
        maps = self._bundles if self.has_maps else self._registered(registry)
        bound = [
            (name, path, source, snapshot)
            for path, stamps in self.stamps.items()
            for source, found in [maps(path)]
            for name, snapshot in self._bound(path, stamps, found)
        ]
        names = [name for name, *_ in bound]
        unknown = [name for name in self.helper_use.of_tables if name not in names]
        if unknown:
            raise ConfigError(
                f"{self.folder}: --with-helper or --without-helper of {unknown}; the CCE tables are {names}"
            )
        return [self._table(*each) for each in bound]

    def read_rows(self, table: CheckpointTable) -> TableRows:
        """The whole physical table and its optimizer's states. Raises DataFileError if a file is damaged."""
        tensors = self.read([table.weight, *table.states.values()])
        return TableRows(
            weights=to_array(tensors[table.weight]),
            states={name: to_array(tensors[key]) for name, key in table.states.items()},
        )

    def read(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Whole tensors, in their own types; nothing else is loaded. Raises DataFileError if a file is damaged."""
        tensors = self._tensors()
        whole = {key: torch.empty(tensors[key].size, dtype=tensors[key].properties.dtype) for key in keys}
        if whole:
            try:
                load(whole, checkpoint_id=str(self.folder), no_dist=True)
            except (CheckpointException, BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise DataFileError(f"{self.folder}: a file is missing or damaged ({reason}); copy it again") from error
        return whole

    def _tensors(self) -> dict[str, TensorStorageMetadata]:
        entries = self.metadata.state_dict_metadata
        return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def _bundles(self, path: str) -> tuple[BundleMap, Mapping[str, TableSnapshot]]:
        folder = checkpoint.maps_folder(self.folder, path)
        return BundleMap(folder=folder), checkpoint.read_maps(self.folder, path)

    def _registered(self, registry: Registry) -> Callable[[str], tuple[RegistryMap, Mapping[str, TableSnapshot]]]:
        """The maps of the version that the weights name, or of the current one if they name none."""
        stated = {stamp.version for stamps in self.stamps.values() for stamp in stamps}
        if len(stated) > 1:
            raise MapMismatchError(f"{self.folder}: its maps are of several versions, {sorted(v or 0 for v in stated)}")
        opened = registry.open(*stated)
        source = RegistryMap(url=registry.url, version=opened.version, options=registry.options)
        # What was counted for that version was not counted for these weights.
        tables = {name: replace(table, frequencies=None) for name, table in opened.tables.items()}
        return lambda _: (source, tables)

    def _bound(
        self, path: str, stamps: Sequence[MapStamp], maps: Mapping[str, TableSnapshot]
    ) -> Iterator[tuple[str, TableSnapshot]]:
        """The tables of a collection, in its order, by the digests that its weights carry."""
        mine = {name: one for name, one in maps.items() if self._weight_key(path, name, one) is not None}
        by_digest = {one.pointer_map.digest: name for name, one in mine.items()}
        lost = [stamp for stamp in stamps if stamp.digest not in by_digest]
        if lost:
            known = {stamp.digest for stamp in stamps}
            others = {name: one.pointer_map for name, one in mine.items() if one.pointer_map.digest not in known}
            there = ", ".join(f"{name!r}: {one.identity}" for name, one in others.items()) or "no map of such tables"
            raise MapMismatchError(
                f"{self.folder}: weights in {path or 'the model'!r} were trained with the map {lost[0].identity}; "
                f"there is {there}. Take the checkpoint and the maps that belong together"
            )
        for stamp in stamps:
            name = by_digest[stamp.digest]
            yield name, mine[name]

    def _table(self, name: str, path: str, maps: BundleMap | RegistryMap, snapshot: TableSnapshot) -> CheckpointTable:
        weight = self._weight_key(path, name, snapshot)
        assert weight is not None
        one, tensors = snapshot.pointer_map, self._tensors()
        size = (2 * one.num_columns * one.num_rows, snapshot.embedding_dim // one.num_columns)
        if tuple(tensors[weight].size) != size:
            raise MapMismatchError(
                f"{self.folder}: table {name!r} has weights {list(tensors[weight].size)}; its map, {one.identity}, is "
                f"of words {list(size)}"
            )
        stem = f"optimizer.state.{weight.removeprefix('model.')}."
        states = {
            key.removeprefix(stem): key
            for key, entry in tensors.items()
            if key.startswith(stem) and tuple(entry.size[:1]) == size[:1]
        }

        def helper_states() -> Iterator[npt.NDArray[np.float32]]:
            for tensor in self.read(list(states.values())).values():
                yield to_array(tensor).reshape(one.num_columns, 2, one.num_rows, *tensor.shape[1:])[:, 1]

        use_helper = self.helper_use.of(name, helper_states)
        return CheckpointTable(
            config=_config(name, snapshot, pooled=".embedding_bags." in weight, use_helper=use_helper),
            collection=path,
            maps=maps,
            snapshot=snapshot,
            weight=weight,
            states=states,
        )

    def _weight_key(self, path: str, name: str, snapshot: TableSnapshot) -> str | None:
        """The tensor that a pooled or an unpooled collection calls a table's weights; None if there is neither."""
        stem = ".".join(filter(None, ["model", path]))
        width = snapshot.embedding_dim // snapshot.pointer_map.num_columns
        names = [f"{stem}.ebc.embedding_bags.{name}.weight", f"{stem}.ecs.{width}.embeddings.{name}.weight"]
        return next((key for key in names if key in self._tensors()), None)


def _config(name: str, snapshot: TableSnapshot, *, pooled: bool, use_helper: bool) -> CCEConfig:
    """What a clustering needs to know of a table's configuration."""
    fields: dict[str, Any] = {
        "name": name,
        "num_embeddings": snapshot.num_embeddings,
        "embedding_dim": snapshot.embedding_dim,
        "feature_names": list(snapshot.feature_names),
        "num_rows": snapshot.pointer_map.num_rows,
        "num_columns": snapshot.pointer_map.num_columns,
        "use_helper": use_helper,
    }
    return (
        CCEEmbeddingBagConfig(**fields, pooling=_POOLING[snapshot.pooling]) if pooled else CCEEmbeddingConfig(**fields)
    )
