"""From a run's configuration to its batches."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torchrec.datasets.utils import Batch

from torchrec_cce.data.batches import global_batches, prefetch, rank_part
from torchrec_cce.data.criteo import criteo_files, read_criteo
from torchrec_cce.data.parquet import parquet_files, read_parquet
from torchrec_cce.data.remapped import RemappedLog
from torchrec_cce.data.rows import Rows, bound, concat, thinned, to_batch
from torchrec_cce.data.tsv import CATEGORICAL_FEATURES, DENSE_FEATURES
from torchrec_cce.errors import ConfigError
from torchrec_cce.modules.remap import Remap
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.data_config import SplitConfig


class RankBatch(NamedTuple):
    """A rank's part of a global batch.

    TorchRec's row-wise sharding needs parts of the same size on all ranks, and no empty part. Where the global batch
    cannot be divided evenly, some parts therefore end in one more row, a filler.
    """

    part: Batch
    rows: int
    """Rows of `part` without the filler."""
    global_rows: int
    """Rows of all ranks without fillers."""


def num_dense(config: RunConfig) -> int:
    """Dense features of the log."""
    return len(DENSE_FEATURES) if config.data.format == "criteo" else len(config.data.dense)


def check_files(config: RunConfig, remap: Remap | None = None) -> None:
    """Check that every file of a run is there, that remapped data fits the model, and that there are rows to evaluate
    on, before training begins. Rows to pass over are passed over for it, once.

    Args:
        remap: that of the model; without it, remapped data and rows are not looked at.

    Raises:
        DataFileError: a file is missing.
        DataFileError, MapMismatchError, ConfigError: a file does not fit the model; see `RemappedLog.check`.
        ConfigError: a split to evaluate on has no rows.
    """
    data = config.data
    for split in filter(None, (data.train, data.validation, data.test)):
        if data.format == "criteo":
            criteo_files(split.path)
        elif data.format == "parquet":
            parquet_files(split.path)
        elif remap is not None:
            _remapped(config, remap).check(split.path)
    if remap is not None:
        for name in ("validation", "test"):
            split = getattr(data, name)
            if split is not None and not any(len(rows) for rows in _chunks(config, split, remap)):
                raise ConfigError(f"data.{name}: {split}: no rows to evaluate on")


def read_batches(
    config: RunConfig, split: SplitConfig, *, remap: Remap, rank: int, world_size: int, as_words: bool = False
) -> Iterator[RankBatch]:
    """The batches of a split in the order of its files, read and built in a background thread.

    Every rank reads the whole split and takes its part of each global batch. The global batches therefore depend on
    `split` and the files alone, and not on the number of ranks.

    Args:
        remap: that of the model, with its present maps.
        as_words: whether remapped data stay words, which the model's collection takes.

    Raises:
        DataFileError: one line, from the reader.
        ConfigError: a table's feature is not in the log.
    """
    finish: Callable[[Rows], Rows]
    keys: Sequence[str]
    chunks = _chunks(config, split, remap)
    if config.data.format == "remapped":
        log, form = _remapped(config, remap), remap.word_form if as_words else None
        finish, keys = (log.to_rows, remap.row_keys) if form is None else (log.to_words, form.keys)
    else:
        keys = list(config.universes())
        finish = partial(bound, num_embeddings=_bounded(config, remap))

    def parts() -> Iterator[RankBatch]:
        for rows in global_batches(chunks, config.training.batch_size):
            mine = rank_part(rows, rank=rank, world_size=world_size)
            size = -(-len(rows) // world_size)
            # The filler is a row of the batch, so that the step touches no other embedding.
            part = finish(mine if len(mine) == size else concat([mine, rows[:1]]))
            yield RankBatch(to_batch(part, keys), len(mine), len(rows))

    return prefetch(parts())


def _chunks(config: RunConfig, split: SplitConfig, remap: Remap) -> Iterator[Rows]:
    """The rows of a split in the order of its files, as its reader finds them."""
    if config.data.format == "remapped":
        packed = _remapped(config, remap).read(split.path, skip_rows=split.skip_rows, max_rows=split.max_rows)
        return thinned(packed, every=split.every, first=split.first)
    return _read(config, split, list(config.universes()))


def _bounded(config: RunConfig, remap: Remap) -> dict[str, int]:
    """Feature → universe, for the features whose raw IDs must be brought into it, as their maps do not take any ID."""
    free = {name for name in remap.cce_tables() if remap.pointer_map(name).takes_any_id}
    features = {feature for table, feature in remap.table_features if table not in free}
    return {feature: size for feature, size in config.universes().items() if feature in features}


def _remapped(config: RunConfig, remap: Remap) -> RemappedLog:
    data = config.data
    return RemappedLog(
        remap,
        label=data.label,
        columns=data.columns,
        universes=config.universes(),
        dense=data.dense,
        dense_transform=data.dense_transform,
    )


def _read(config: RunConfig, split: SplitConfig, features: list[str]) -> Iterator[Rows]:
    data = config.data
    if data.format == "criteo":
        unknown = [feature for feature in features if feature not in CATEGORICAL_FEATURES]
        if unknown:
            raise ConfigError(f"features {unknown} are not in Criteo's log, which has C1 to C26")
        return read_criteo(
            split.path, skip_rows=split.skip_rows, max_rows=split.max_rows, every=split.every, first=split.first
        )
    rows = read_parquet(
        split.path,
        label=data.label,
        ids={feature: data.columns.get(feature, feature) for feature in features},
        dense=data.dense,
        dense_transform=data.dense_transform,
        skip_rows=split.skip_rows,
        max_rows=split.max_rows,
    )
    return thinned(rows, every=split.every, first=split.first)
