"""The CCE tables of a checkpoint, each with its map and the names of its tensors, read without building a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torchrec import PoolingType

from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.jobs.checkpoint.helper_use import HelperUse
from torchrec_cce.jobs.recluster.cluster import TableSource
from torchrec_cce.jobs.recluster.work import BundleMap, Frequencies, RegistryMap, StoredResidents, StoredTable
from torchrec_cce.maps.pointer_format import MinPointerBits
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.residency import Residency
from torchrec_cce.maps.residency_files import read_residencies
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.methods.cce import CCEConfig, CCEEmbeddingBagConfig, CCEEmbeddingConfig
from torchrec_cce.methods.residents import ResidentConfig
from torchrec_cce.modules.map_stamp import MapStamp
from torchrec_cce.modules.recluster import TableRows, importances_of, squares_among, to_array
from torchrec_cce.modules.state_names import (
    codewords_weight,
    in_checkpoint,
    joined,
    optimizer_state,
    pooled_weight,
    quantized_rows,
    residents_weight,
    sequence_codewords_weight,
    sequence_residents_weight,
    sequence_weight,
    stamped_collection,
)
from torchrec_cce.sharding.checkpoint_index import METADATA
from torchrec_cce.sharding.digests import check_digests
from torchrec_cce.sharding.distributed_checkpoint import DistributedCheckpoint
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config_file import RUN_CONFIG, read_run_config

_ROWS = 1 << 16
"""Of residents, at a time."""
_POOLING = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointResidents:
    """The residents of a table in a checkpoint, and the keys of the tensors of their rows."""

    residency: Residency
    folder: Path
    """That has the residency."""
    rows: str
    """`[m, d]`, float32, float16 or int8."""
    step: str | None
    """What 1 stands for; None for rows of float32, where it is 1."""
    squares: str | None
    """`[m, …]`: what the optimizer has of the squared gradients of each row."""

    @property
    def copied(self) -> list[str]:
        """The keys of what is copied for workers."""
        return [self.rows] if self.squares is None else [self.rows, self.squares]


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointTable:
    """A CCE table in a checkpoint: its opened map and the keys of its tensors."""

    config: CCEConfig
    collection: str
    """The path of its collection in the model."""
    maps: BundleMap | RegistryMap
    snapshot: TableSnapshot
    """The map that its weights were trained with."""
    weight: str
    """The key of its weights."""
    states: Mapping[str, str]
    """Entry of the optimizer's state that has one value or vector a row → the key of that tensor."""
    residents: CheckpointResidents | None = None
    """None for a table that never has any."""

    @property
    def open_residents(self) -> CheckpointResidents | None:
        """Those that have rows, which a clustering folds; None where no phase is open."""
        return self.residents if self.residents is not None and self.residents.residency.is_open else None

    @property
    def name(self) -> str:
        name: str = self.config.name
        return name


@dataclass(frozen=True, kw_only=True, eq=False)
class CCECheckpoint(DistributedCheckpoint):
    """A distributed checkpoint that has CCE tables, with the maps that belong to their weights.

    It lies in the folder of a run or by itself. If it lies by itself and without `maps/`, its maps are in a registry.
    """

    helper_use: HelperUse = field(default_factory=HelperUse)
    min_pointer_bits: MinPointerBits | None = None
    """Of new maps, as the run's configuration says; None for a checkpoint that lies by itself: as of those it has."""

    @classmethod
    def at(cls, path: Path, *, use_helper: Mapping[str, bool] | None = None) -> "CCECheckpoint":
        """The checkpoint `path`, or the newest one of the run `path`.

        Args:
            use_helper: table → whether it uses its helper, where the optimizer's states do not tell; see `HelperUse`.

        Raises:
            ConfigError: there is none; or `use_helper` is given for a run, whose configuration says it.
            DataFileError: a file is missing or damaged.
        """
        said = use_helper or {}
        if (path / RUN_CONFIG).exists():
            embedding = read_run_config(path).embedding
            of_run = embedding.use_helper
            if said:
                raise ConfigError(
                    f"{path}: the run's configuration says use_helper={str(of_run).lower()}; leave `use_helper` out"
                )
            return cls(
                folder=checkpoint.newest_whole(path),
                helper_use=HelperUse(of_run=of_run),
                min_pointer_bits=embedding.min_pointer_bits,
            )
        if not (path / METADATA).exists():
            raise ConfigError(
                f"{path}: neither the folder of a run ({RUN_CONFIG}) nor a distributed checkpoint ({METADATA})"
            )
        check_digests(path, None)
        return cls(folder=path, helper_use=HelperUse(of_tables=said))

    @cached_property
    def stamps(self) -> dict[str, list[MapStamp]]:
        """Path of a collection → the stamps of its maps, in the order of its tables.

        Raises:
            ConfigError: the model has no CCE table, or no model of this package is in the checkpoint.
        """
        collections = {key: path for key in self.tensors if (path := stamped_collection(key)) is not None}
        states = self.read(list(collections))
        stamps = {path: MapStamp.from_tensor(states[key]) for key, path in collections.items()}
        if not any(stamps.values()):
            raise ConfigError(f"{self.folder}: there is no CCE table in this checkpoint, and so nothing to cluster")
        return {path: each for path, each in stamps.items() if each}

    def residencies(self, path: str) -> dict[str, Residency]:
        """Table → its residency, of the collection at this path. Raises MapFileError if there is none, or damaged."""
        if path not in self._residencies:
            self._residencies[path] = read_residencies(checkpoint.residents_folder(self.folder, path))
        return self._residencies[path]

    @cached_property
    def _residencies(self) -> dict[str, dict[str, Residency]]:
        return {}

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
            ConfigError: it is unknown whether a table uses its helper, or `use_helper` names a table that is not here.
        """
        maps = self._bundles if self.has_maps else self._registered(registry)
        matched = [
            (name, path, source, snapshot)
            for path, stamps in self.stamps.items()
            for source, found in [maps(path)]
            for name, snapshot in self._matched(path, stamps, found)
        ]
        names = [name for name, *_ in matched]
        unknown = [name for name in self.helper_use.of_tables if name not in names]
        if unknown:
            raise ConfigError(f"{self.folder}: `use_helper` of {unknown}; the CCE tables are {names}")
        return [self._table(*each) for each in matched]

    def read_rows(self, table: CheckpointTable) -> TableRows:
        """The whole physical table and its optimizer's states. Raises DataFileError if a file is damaged."""
        tensors = self.read([table.weight, *table.states.values()])
        return TableRows(
            weights=to_array(tensors[table.weight]),
            states={name: to_array(tensors[key]) for name, key in table.states.items()},
        )

    def source(self, table: CheckpointTable, folder: Path, frequencies: Frequencies = None) -> TableSource:
        """The table to cluster, or whose residents' rows are to be folded. Raises as `read_rows`.

        Args:
            folder: where the rows of residents go, which every worker sees under this path.

        Raises:
            OSError: there is no room in `folder`.
        """
        stored = StoredTable(
            maps=table.maps,
            map_digest=table.snapshot.pointer_map.digest,
            frequencies=frequencies,
            residents=self._unpacked(table, folder),
        )
        return TableSource(config=table.config, rows=self.read_rows(table), stored=stored)

    def _unpacked(self, table: CheckpointTable, folder: Path) -> StoredResidents | None:
        """The residents of an open phase, with their rows in a file of their own."""
        found = table.open_residents
        if found is None:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{len(list(folder.iterdir())):04d}.rows"
        rows = self.copy_rows(found.rows, path)
        return StoredResidents(
            folder=found.folder,
            rows=path,
            shape=rows.shape,
            dtype=rows.dtype.name,
            step=1.0 if found.step is None else float(self.read([found.step])[found.step]),
            importances=None if found.squares is None else self._importances(found.squares, path),
        )

    def _importances(self, squares: str, rows: Path) -> Path:
        """A file beside `rows` of the importance of each row."""
        copy, path = rows.with_suffix(".squares"), rows.with_suffix(".importances")
        values = self.copy_rows(squares, copy)
        with path.open("xb") as file:
            for start in range(0, len(values), _ROWS):
                file.write(importances_of(values[start : start + _ROWS]).data)
        copy.unlink()
        return path

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
        # The version's frequencies were counted up to its own clustering, not up to these weights.
        tables = {name: replace(table, frequencies=None) for name, table in opened.tables.items()}
        return lambda _: (source, tables)

    def _matched(
        self, path: str, stamps: Sequence[MapStamp], maps: Mapping[str, TableSnapshot]
    ) -> Iterator[tuple[str, TableSnapshot]]:
        """The tables of a collection in its order, found by the digests that are stamped on its weights."""
        mine = {name: table for name, table in maps.items() if self._weight_name(path, name, table) is not None}
        by_digest = {table.pointer_map.digest: name for name, table in mine.items()}
        lost = [stamp for stamp in stamps if stamp.digest not in by_digest]
        if lost:
            known = {stamp.digest for stamp in stamps}
            maps_here = {name: table.pointer_map for name, table in mine.items()}
            others = (f"{name!r}: {m.identity}" for name, m in maps_here.items() if m.digest not in known)
            there = ", ".join(others) or "no map of such tables"
            raise MapMismatchError(
                f"{self.folder}: weights in {path or 'the model'!r} were trained with the map {lost[0].identity}; "
                f"there is {there}. Take the checkpoint and the maps that belong together"
            )
        for stamp in stamps:
            name = by_digest[stamp.digest]
            yield name, mine[name]

    def _table(self, name: str, path: str, maps: BundleMap | RegistryMap, snapshot: TableSnapshot) -> CheckpointTable:
        weight = self._weight_name(path, name, snapshot)
        assert weight is not None
        pointer_map, tensors = snapshot.pointer_map, self.tensors
        num_columns, num_rows = pointer_map.num_columns, pointer_map.num_rows
        size = (2 * num_columns * num_rows, snapshot.embedding_dim // num_columns)
        found = tensors[in_checkpoint(weight)].size
        if tuple(found) != size:
            raise MapMismatchError(
                f"{self.folder}: table {name!r} has weights {list(found)}; its map, {pointer_map.identity}, is "
                f"of codewords {list(size)}"
            )
        stem = optimizer_state(weight, "")
        states = {
            key.removeprefix(stem): key
            for key, entry in tensors.items()
            if key.startswith(stem) and tuple(entry.size[:1]) == size[:1]
        }

        def helper_states() -> Iterator[npt.NDArray[np.float32]]:
            for tensor in self.read(list(states.values())).values():
                yield to_array(tensor).reshape(num_columns, 2, num_rows, *tensor.shape[1:])[:, 1]

        is_pooled = weight in (joined(path, each(name)) for each in (pooled_weight, codewords_weight))
        frozen = codewords_weight(name), sequence_codewords_weight(name, size[1])
        has_residents = weight in (joined(path, each) for each in frozen)
        if has_residents and self.helper_use.of_tables.get(name):
            raise ConfigError(f"table {name!r}: it has residents and no helper; leave the table out of `use_helper`")
        config = _config(
            name,
            snapshot,
            pooled=is_pooled,
            use_helper=not has_residents and self.helper_use.of(name, helper_states),
            residents=ResidentConfig() if has_residents else None,
            min_pointer_bits=self.min_pointer_bits or pointer_map.min_pointer_bits,
        )
        return CheckpointTable(
            config=config,
            collection=path,
            maps=maps,
            snapshot=snapshot,
            weight=in_checkpoint(weight),
            states=states,
            residents=self._residents(config, path) if has_residents else None,
        )

    def _residents(self, config: CCEConfig, path: str) -> CheckpointResidents:
        folder = checkpoint.residents_folder(self.folder, path)
        is_pooled = isinstance(config, CCEEmbeddingBagConfig)
        weight = joined(path, (residents_weight if is_pooled else sequence_residents_weight)(config.resident_table))
        stock = in_checkpoint(weight)
        quantized = in_checkpoint(joined(path, quantized_rows(config.resident_table)))
        states = optimizer_state(weight, "")
        is_stock = stock in self.tensors
        return CheckpointResidents(
            residency=self.residencies(path)[config.name],
            folder=folder,
            rows=stock if is_stock else f"{quantized}.rows",
            step=None if is_stock else f"{quantized}.step",
            squares=squares_among(key for key in self.tensors if key.startswith(states))
            if is_stock
            else f"{quantized}.state",
        )

    def _weight_name(self, path: str, table: str, snapshot: TableSnapshot) -> str | None:
        """What the model calls a table's weights in a pooled or an unpooled collection; None if there are neither."""
        width = snapshot.embedding_dim // snapshot.pointer_map.num_columns
        sequences = sequence_weight(table, width), sequence_codewords_weight(table, width)
        names = pooled_weight(table), codewords_weight(table), *sequences
        return next((name for each in names if in_checkpoint(name := joined(path, each)) in self.tensors), None)


def _config(name: str, snapshot: TableSnapshot, *, pooled: bool, **others: Any) -> CCEConfig:
    """What a clustering needs to know of a table's configuration."""
    fields: dict[str, Any] = {
        "name": name,
        "num_embeddings": snapshot.num_embeddings,
        "embedding_dim": snapshot.embedding_dim,
        "feature_names": list(snapshot.feature_names),
        "num_rows": snapshot.pointer_map.num_rows,
        "num_columns": snapshot.pointer_map.num_columns,
        **others,
    }
    return (
        CCEEmbeddingBagConfig(**fields, pooling=_POOLING[snapshot.pooling]) if pooled else CCEEmbeddingConfig(**fields)
    )
