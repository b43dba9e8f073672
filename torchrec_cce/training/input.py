"""From a run's configuration to its batches."""

from collections.abc import Iterator
from typing import NamedTuple

from torchrec.datasets.utils import Batch

from torchrec_cce.data.batches import global_batches, prefetch, rank_part
from torchrec_cce.data.criteo import read_criteo
from torchrec_cce.data.parquet import read_parquet
from torchrec_cce.data.rows import Rows, concat, to_batch
from torchrec_cce.data.tsv import CATEGORICAL_FEATURES, DENSE_FEATURES
from torchrec_cce.data.universe import bound
from torchrec_cce.errors import ConfigError
from torchrec_cce.training.config import RunConfig, SplitConfig


class RankBatch(NamedTuple):
    """A rank's part of a global batch.

    TorchRec's row-wise sharding needs parts of one size on all ranks, and none that is empty. Where the global batch
    does not divide, some parts therefore end in one more row, a filler.
    """

    part: Batch
    rows: int
    """Rows of `part` that count: all but the filler."""
    global_rows: int
    """Rows that count on all ranks."""


def num_dense(config: RunConfig) -> int:
    """Dense features of the log."""
    return len(DENSE_FEATURES) if config.data.format == "criteo" else len(config.data.dense)


def read_batches(config: RunConfig, split: SplitConfig, *, rank: int, world_size: int) -> Iterator[RankBatch]:
    """The batches of a split in the order of the file, read and built in a background thread.

    Every rank reads the whole split and takes its part of each global batch, so that the global batches do not depend
    on the number of ranks.

    Raises:
        DataFileError: from the reader, one line. ConfigError: a table's feature is not in the log.
    """
    universes = config.universes()

    def parts() -> Iterator[RankBatch]:
        for rows in global_batches(_read(config, split, list(universes)), config.training.batch_size):
            mine = rank_part(rows, rank=rank, world_size=world_size)
            size = -(-len(rows) // world_size)
            # The filler is a row of the batch, so that no embedding is touched that would not have been.
            part = bound(mine if len(mine) == size else concat([mine, rows[:1]]), universes)
            yield RankBatch(to_batch(part, list(universes)), len(mine), len(rows))

    return prefetch(parts())


def _read(config: RunConfig, split: SplitConfig, features: list[str]) -> Iterator[Rows]:
    data = config.data
    if data.format == "criteo":
        unknown = [feature for feature in features if feature not in CATEGORICAL_FEATURES]
        if unknown:
            raise ConfigError(f"features {unknown} are not in Criteo's log, which has C1 to C26")
        return read_criteo(split.path, skip_rows=split.skip_rows, max_rows=split.max_rows)
    return read_parquet(
        split.path,
        label=data.label,
        ids={feature: data.columns.get(feature, feature) for feature in features},
        dense=data.dense,
        dense_transform=data.dense_transform,
        skip_rows=split.skip_rows,
        max_rows=split.max_rows,
    )
