"""Reclustering one table: old tables and codes in, new tables and pointers out. A pure function."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.column import ColumnReclusterer
from torchrec_cce.clustering.entropy import pointer_entropies
from torchrec_cce.clustering.sample import training_sample
from torchrec_cce.errors import ClusteringError, ConfigError
from torchrec_cce.hashing import derive_seed

HelperInit = Literal["zero", "residual"]
OldCodes = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
HelperCodes = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class ReclusterConfig:
    """How a table is clustered again."""

    points_per_centroid: int = 256
    """k-means trains on at most this many IDs a centroid."""
    num_iterations: int = 50
    """Lloyd iterations of k-means."""
    helper_init: HelperInit = "zero"
    """New helper rows: `"zero"`, or `"residual"`: what the codebook misses, in the mean over the IDs of a row."""
    chunk_size: int = 65536
    """IDs handled at a time: memory and speed. Never changes the result."""
    num_threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Threads, over the columns of a table. Never changes the result."""

    def __post_init__(self) -> None:
        for name in ("points_per_centroid", "num_iterations", "chunk_size", "num_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not at least 1")
        if self.helper_init not in get_args(HelperInit):
            raise ConfigError(f"helper_init={self.helper_init!r} is not one of {get_args(HelperInit)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Reclustered:
    """A table after its clustering."""

    pointers: npt.NDArray[np.unsignedinteger]
    """[n, c], the new codebook row of every ID in every column."""
    weights: npt.NDArray[np.float32]
    """[c, 2, k, w]: the new codebooks (rows past the number of distinct embeddings are zero), the new helper tables."""
    row_states: dict[str, npt.NDArray[np.float32]]
    """Each [c, 2, k, …]. A codebook row has the mean over its members of the mean state of the two old rows that made
    the member's embedding, and 0 without members; helper rows have 0."""
    entropies: tuple[float, ...]
    """H1 … Hc of the pointers, in nats; see `pointer_entropies`."""
    objective: float
    """Mean over the IDs, weighted by their frequencies if there are any, of the squared distance, summed over columns,
    from the old embedding to its new centroid."""
    share_changed: float
    """Share, 0 to 1, of the (ID, column) pointers that differ from the old codebook codes."""
    seconds: float
    """Wall-clock time that it took."""


def recluster_table(
    *,
    weights: npt.NDArray[np.float32],
    num_ids: int,
    old_codes: OldCodes,
    new_helper_codes: HelperCodes,
    row_states: Mapping[str, npt.NDArray[np.float32]] | None = None,
    frequencies: npt.NDArray[np.number] | None = None,
    pointer_dtype: npt.DTypeLike,
    seed: int,
    config: ReclusterConfig | None = None,
) -> Reclustered:
    """Cluster a table's column embeddings `T_j[id] = codebook_j[h_j(id)] + helper_j[h'_j(id)]` (CCE's cluster step).

    In each column, k-means on a sample of the embeddings gives the new codebook, and every ID points at its nearest
    centroid. All of it is computed from the old tables and codes; nothing that is passed in is written. The result is a
    function of the arguments and the machine's arithmetic: the same bits for any chunk size and number of threads.

    Args:
        weights: [c, 2, k, w] float32: for each column the codebook, then the helper table.
        num_ids: `n`, at least 1; the IDs are `0 … n − 1`.
        old_codes: ids [N] int64 → [c, 2, N] int64, the old `h` and `h'`. Called from the calling thread only.
        new_helper_codes: ids [N] int64 → [c, N] int64, the fresh `h'`; called only for `helper_init="residual"`.
        row_states: optimizer states by name, each [c, 2, k, …] float32.
        frequencies: [n], how often each ID occurs, at least 0. IDs train k-means in proportion; one with 0 does not
            train, and gets its pointers like all others. Without them every ID counts once.
        pointer_dtype: an unsigned dtype that holds `k − 1`.
        seed: a new one for every clustering.
        config: the default `ReclusterConfig()` if None.

    Raises:
        ConfigError: shapes, dtypes or frequencies that cannot work, or codes outside `0 … k − 1`.
        ClusteringError: NaN or infinite weights or states; the message says how many and where.
    """
    started = time.perf_counter()
    config = config or ReclusterConfig()
    states = dict(row_states or {})
    _check_tables(weights, states)
    num_columns, _, num_rows, _ = weights.shape
    dtype = _check_pointer_dtype(pointer_dtype, num_rows)
    if num_ids < 1:
        raise ConfigError(f"num_ids={num_ids} is not at least 1")
    importances = None if frequencies is None else _check_frequencies(frequencies, num_ids)
    total_importance = float(num_ids) if importances is None else float(importances.sum())

    def codes_of(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return _check_codes("old_codes", old_codes(ids), (num_columns, 2, len(ids)), num_rows)

    sample, sample_weights = training_sample(
        num_ids,
        config.points_per_centroid * num_rows,
        frequencies=importances,
        seed=derive_seed(seed, "sample"),
    )
    sample_codes = np.empty((num_columns, 2, len(sample)), dtype)
    for start, stop in _chunks(len(sample), config.chunk_size):
        sample_codes[:, :, start:stop] = codes_of(sample[start:stop])

    residual = config.helper_init == "residual"
    pointers = np.empty((num_ids, num_columns), dtype)
    with ThreadPoolExecutor(min(config.num_threads, num_columns)) as pool:

        def train(column: int) -> ColumnReclusterer:
            return ColumnReclusterer(
                weights[column],
                {name: state[column] for name, state in states.items()},
                sample_codes=sample_codes[column],
                sample_weights=sample_weights,
                num_ids=num_ids,
                total_importance=total_importance,
                residual_helper=residual,
                num_iterations=config.num_iterations,
                seed=derive_seed(seed, "kmeans", column),
                num_threads=max(1, config.num_threads // num_columns),
            )

        columns = list(pool.map(train, range(num_columns)))
        for start, stop in _chunks(num_ids, config.chunk_size):
            ids = np.arange(start, stop)
            codes = codes_of(ids)
            helpers: npt.NDArray[np.int64] | list[None] = [None] * num_columns
            if residual:
                helpers = _check_codes("new_helper_codes", new_helper_codes(ids), (num_columns, len(ids)), num_rows)
            part = None if importances is None else importances[start:stop]
            taken = pool.map(lambda *each: each[0].take(*each[1:]), columns, codes, helpers, [part] * num_columns)
            for column, new in enumerate(taken):
                pointers[start:stop, column] = new
    results = [column.result() for column in columns]
    return Reclustered(
        pointers=pointers,
        weights=np.stack([result.weights for result in results]),
        row_states={name: np.stack([result.row_states[name] for result in results]) for name in states},
        entropies=pointer_entropies(pointers, num_rows),
        objective=sum(result.distance_sum for result in results) / total_importance,
        share_changed=sum(result.num_changed for result in results) / pointers.size,
        seconds=time.perf_counter() - started,
    )


def _chunks(length: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, length)) for start in range(0, length, size))


def _check_tables(weights: npt.NDArray[np.float32], states: Mapping[str, npt.NDArray[np.float32]]) -> None:
    if weights.ndim != 4 or weights.shape[1] != 2 or weights.size == 0:
        raise ConfigError(f"weights have shape {list(weights.shape)}, not [c, 2, k, w]")
    for name, table in (("weights", weights), *((f"row_states[{name!r}]", state) for name, state in states.items())):
        if table.shape[:3] != weights.shape[:3] or table.dtype != np.float32:
            expected = ", ".join(map(str, weights.shape[:3]))
            raise ConfigError(f"{name} are {table.dtype} {list(table.shape)}, not float32 [{expected}, …]")
        finite = np.isfinite(table)
        if not finite.all():
            column, term, row = (int(axis[0]) for axis in np.nonzero(~finite)[:3])
            raise ClusteringError(
                f"{finite.size - np.count_nonzero(finite)} of {finite.size} values of {name} are NaN or infinite, the "
                f"first in column {column}, {('codebook', 'helper')[term]} row {row}; nothing was clustered"
            )


def _check_pointer_dtype(pointer_dtype: npt.DTypeLike, num_rows: int) -> np.dtype[np.unsignedinteger]:
    dtype: np.dtype[Any] = np.dtype(pointer_dtype)
    if not np.issubdtype(dtype, np.unsignedinteger):
        raise ConfigError(f"pointer_dtype={dtype} is not an unsigned integer type")
    if num_rows - 1 > np.iinfo(dtype).max:
        raise ConfigError(
            f"k={num_rows} rows do not fit {dtype} pointers (at most {np.iinfo(dtype).max + 1}); "
            f"pass pointer_dtype={np.min_scalar_type(num_rows - 1).name!r}"
        )
    return dtype


def _check_frequencies(frequencies: npt.NDArray[np.number], num_ids: int) -> npt.NDArray[np.float64]:
    if frequencies.shape != (num_ids,):
        raise ConfigError(f"frequencies have shape {list(frequencies.shape)}, not [{num_ids}], one for each ID")
    importances = frequencies.astype(np.float64)
    bad = np.count_nonzero(~np.isfinite(importances) | (importances < 0))
    if bad:
        raise ConfigError(f"{bad} of {num_ids} frequencies are negative, NaN or infinite; pass counts ≥ 0")
    if not importances.any():
        raise ConfigError(f"all {num_ids} frequencies are zero; pass None to let every ID count once")
    return importances


def _check_codes(
    name: str, codes: npt.NDArray[np.int64], shape: tuple[int, ...], num_rows: int
) -> npt.NDArray[np.int64]:
    """Checked because the compiled loops do not: a code out of range would write past a table."""
    if codes.shape != shape or codes.dtype != np.int64:
        raise ConfigError(f"{name} returned {codes.dtype} {list(codes.shape)}, not int64 {list(shape)}")
    if codes.size and (codes.min() < 0 or codes.max() >= num_rows):
        raise ConfigError(f"{name} returned codes {codes.min()}..{codes.max()}, outside 0..{num_rows - 1}")
    return np.ascontiguousarray(codes)
