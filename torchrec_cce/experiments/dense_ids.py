"""`DenseIDs`: the raw IDs of a log, numbered from 0 in order of first appearance. For experiments on real logs.

Everything is held in memory: 24 bytes for each distinct ID.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_cce.data.parquet import write_parquet
from torchrec_cce.data.rows import Column, Rows
from torchrec_cce.errors import InvalidIDError


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseIDs:
    """An encoder of raw IDs into `[0, num_embeddings)` for each feature."""

    raw: Mapping[str, npt.NDArray[np.int64]]
    """Feature → [n] int64: its distinct raw IDs, each at the place that is its dense ID."""

    @classmethod
    def collect(cls, chunks: Iterable[Rows]) -> "DenseIDs":
        """Number the raw IDs of all features in order of first appearance."""
        seen: dict[str, list[pa.Array]] = {}
        for rows in chunks:
            for feature, column in rows.ids.items():
                arrays = seen.setdefault(feature, [])
                arrays.append(pc.unique(pa.array(column.values)))
                # Merged only when the newcomers outweigh what is known, so that all merges together stay linear.
                if sum(map(len, arrays[1:])) > len(arrays[0]):
                    arrays[:] = [_merged(arrays)]
        return cls(raw={feature: _merged(arrays).to_numpy() for feature, arrays in seen.items()})

    @property
    def num_embeddings(self) -> dict[str, int]:
        """Feature → number of distinct raw IDs."""
        return {feature: len(raw) for feature, raw in self.raw.items()}

    def encode(self, rows: Rows) -> Rows:
        """`rows` with dense IDs in place of raw ones.

        Raises:
            InvalidIDError: a raw ID or a feature that was not collected.
        """
        ids = {feature: self._encode(feature, column) for feature, column in rows.ids.items()}
        return Rows(labels=rows.labels, dense=rows.dense, ids=ids)

    def _encode(self, feature: str, column: Column) -> Column:
        if feature not in self.raw:
            raise InvalidIDError(f"feature {feature!r} was not collected; these were: {list(self.raw)}")
        raw, dense = self._sorted[feature]
        place = np.searchsorted(raw, column.values)
        known = place < len(raw)
        known[known] = raw[place[known]] == column.values[known]
        if not known.all():
            raise InvalidIDError(
                f"feature {feature!r}: raw ID {column.values[np.argmin(known)]} was not collected; collect all logs "
                "that will be encoded"
            )
        return Column(values=dense[place], lengths=column.lengths)

    @cached_property
    def _sorted(self) -> dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Feature → its raw IDs in ascending order, and the dense ID of each."""
        orders = {feature: np.argsort(raw).astype(np.int64) for feature, raw in self.raw.items()}
        return {feature: (self.raw[feature][order], order) for feature, order in orders.items()}


def write_dense(
    logs: Mapping[str | os.PathLike[str], Callable[[], Iterable[Rows]]],
    *,
    dense: Sequence[str] = (),
    multi_hot: Collection[str] = (),
) -> DenseIDs:
    """Rewrite logs as Parquet files with dense IDs, numbered over all of them in the order given.

        write_dense({"train.parquet": lambda: read_criteo("log.tsv", max_rows=64000),
                     "test.parquet": lambda: read_criteo("log.tsv", skip_rows=64000)}, dense=DENSE_FEATURES)

    Args:
        logs: file to write → a function that opens the log; it is called twice, once to collect and once to encode.
        dense, multi_hot: see `write_parquet`.

    Returns:
        The encoder; `num_embeddings` are the sizes of the tables to train.

    Raises:
        ConfigError, DataFileError: from the readers and from `write_parquet`.
    """

    def everything() -> Iterator[Rows]:
        for open_log in logs.values():
            yield from open_log()

    encoder = DenseIDs.collect(everything())
    for path, open_log in logs.items():
        write_parquet(path, map(encoder.encode, open_log()), dense=dense, multi_hot=multi_hot)
    return encoder


def _merged(arrays: Sequence[pa.Array]) -> pa.Array:
    return arrays[0] if len(arrays) == 1 else pc.unique(pa.concat_arrays(arrays))
