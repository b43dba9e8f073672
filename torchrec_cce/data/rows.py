"""`Rows`: what every reader yields, N consecutive rows of a log in numpy arrays."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError

if TYPE_CHECKING:
    from torchrec.datasets.utils import Batch


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """One categorical feature of N rows: a bag of raw IDs in each row."""

    values: npt.NDArray[np.int64]
    """[V] int64: the raw IDs of all bags, one bag after the other; the two's complement of an unsigned 64-bit ID."""
    lengths: npt.NDArray[np.int32] | None = None
    """[N] int32: the number of IDs in each bag; None = exactly one in every bag, so V = N."""

    def __post_init__(self) -> None:
        if self.values.dtype != np.int64 or self.values.ndim != 1:
            raise ConfigError(f"values is {self.values.dtype} {list(self.values.shape)}; it must be int64 [V]")
        if self.lengths is None:
            return
        if self.lengths.dtype != np.int32 or self.lengths.ndim != 1:
            raise ConfigError(f"lengths is {self.lengths.dtype} {list(self.lengths.shape)}; it must be int32 [N]")
        total = int(self.lengths.sum(dtype=np.int64))
        if total != len(self.values):
            raise ConfigError(f"lengths sum to {total}, but there are {len(self.values)} values")

    def __len__(self) -> int:
        return len(self.values if self.lengths is None else self.lengths)

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """[N + 1] int64: where each bag starts; computed once for the many slices that one chunk is cut into."""
        offsets = np.zeros(len(self) + 1, dtype=np.int64)
        np.cumsum(self.dense_lengths(), out=offsets[1:])
        return offsets

    def row_of(self, position: int) -> int:
        """The row whose bag holds the ID at this position of `values`."""
        return position if self.lengths is None else int(np.searchsorted(self.offsets, position, side="right")) - 1

    def slice(self, start: int, stop: int) -> "Column":
        """The bags of rows `start..stop`, `0 ≤ start ≤ stop ≤ N`, as views."""
        if self.lengths is None:
            return Column(values=self.values[start:stop])
        first, last = self.offsets[start], self.offsets[stop]
        return Column(values=self.values[first:last], lengths=self.lengths[start:stop])

    def take(self, rows: npt.NDArray[np.bool_]) -> "Column":
        """The bags of the rows that are True in `rows: [N] bool`, copied."""
        if self.lengths is None:
            return Column(values=self.values[rows])
        return Column(values=self.values[np.repeat(rows, self.lengths)], lengths=self.lengths[rows])

    def dense_lengths(self) -> npt.NDArray[np.int32]:
        """[N] int32, ones where `lengths` is None."""
        return np.ones(len(self.values), dtype=np.int32) if self.lengths is None else self.lengths


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """N consecutive rows of a log, or of what is read of it. `rows[a:b]` is a view; nothing here copies but `concat`,
    `thinned` and `to_batch`."""

    labels: npt.NDArray[np.float32]
    """[N] float32."""
    dense: npt.NDArray[np.float32]
    """[N, D] float32, D may be 0; as the model shall see them (already transformed)."""
    ids: Mapping[str, Column]
    """Feature name → its bags."""

    def __post_init__(self) -> None:
        if self.labels.dtype != np.float32 or self.labels.ndim != 1:
            raise ConfigError(f"labels is {self.labels.dtype} {list(self.labels.shape)}; it must be float32 [N]")
        if self.dense.dtype != np.float32 or self.dense.ndim != 2 or len(self.dense) != len(self.labels):
            raise ConfigError(
                f"dense is {self.dense.dtype} {list(self.dense.shape)}; it must be float32 [{len(self.labels)}, D]"
            )
        for feature, column in self.ids.items():
            if len(column) != len(self.labels):
                raise ConfigError(f"feature {feature!r} has {len(column)} rows, the labels have {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Rows":
        """Consecutive rows as views; the step must be 1."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ConfigError(f"step {step} is not 1: Rows are consecutive")
        stop = max(start, stop)
        return Rows(
            labels=self.labels[start:stop],
            dense=self.dense[start:stop],
            ids={feature: column.slice(start, stop) for feature, column in self.ids.items()},
        )


def concat(parts: Sequence[Rows]) -> Rows:
    """The rows of all `parts` in order; a single part is returned as it is.

    Raises:
        ConfigError: there is no part, or the parts differ in their features or in D.
    """
    if not parts:
        raise ConfigError("no rows to concatenate: an empty list does not say which features there are")
    head = parts[0]
    if len(parts) == 1:
        return head
    for part in parts[1:]:
        if part.ids.keys() != head.ids.keys() or part.dense.shape[1] != head.dense.shape[1]:
            raise ConfigError(
                f"rows with features {list(part.ids)} and {part.dense.shape[1]} dense columns cannot follow rows with "
                f"{list(head.ids)} and {head.dense.shape[1]}"
            )
    return Rows(
        labels=np.concatenate([part.labels for part in parts]),
        dense=np.concatenate([part.dense for part in parts]),
        ids={feature: _concat_columns([part.ids[feature] for part in parts]) for feature in head.ids},
    )


def _concat_columns(columns: Sequence[Column]) -> Column:
    values = np.concatenate([column.values for column in columns])
    if all(column.lengths is None for column in columns):
        return Column(values=values)
    return Column(values=values, lengths=np.concatenate([column.dense_lengths() for column in columns]))


def thinned(chunks: Iterable[Rows], *, every: int, first: int = 0) -> Iterator[Rows]:
    """Of a stream of rows, numbered from 0: the rows `first`, `first + every`, `first + 2·every`, ….

    They are the same however the stream was cut into chunks. A chunk that has none of them is left out, one that has
    no others is passed on as it is.

    Raises:
        ConfigError: `every < 1` or a negative `first`.
    """
    if every < 1 or first < 0:
        raise ConfigError(f"every={every} must be at least 1, first={first} at least 0")
    wait = first  # rows to pass over before the next one
    for chunk in chunks:
        taken = np.zeros(len(chunk), dtype=np.bool_)
        taken[wait::every] = True
        wait += len(range(wait, len(chunk), every)) * every - len(chunk)
        if not taken.any():
            continue
        if taken.all():
            yield chunk
            continue
        yield Rows(
            labels=chunk.labels[taken],
            dense=chunk.dense[taken],
            ids={feature: column.take(taken) for feature, column in chunk.ids.items()},
        )


def to_batch(rows: Rows, features: Sequence[str]) -> "Batch":
    """The TorchRec batch of `rows`: what a DLRM or a `TrainPipeline` takes.

    `labels` and `dense_features` share memory with `rows`; the IDs are copied once, since a KJT holds them end to end.

    Args:
        features: the keys of the KJT, in this order; features of `rows` that are not named are left out.

    Returns:
        `dense_features [N, D] float32`, `labels [N] float32`, and `sparse_features` with `values [V] int64`,
        `lengths [F·N] int32`.

    Raises:
        ConfigError: a feature that `rows` does not have.
    """
    # Here, because jobs read rows in processes that have no use for torch.
    import torch
    from torchrec.datasets.utils import Batch
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    missing = [feature for feature in features if feature not in rows.ids]
    if missing:
        raise ConfigError(f"features {missing} are not among those of the rows: {list(rows.ids)}")
    columns = [rows.ids[feature] for feature in features]
    values = torch.from_numpy(np.concatenate([column.values for column in columns] or [np.zeros(0, np.int64)]))
    offsets: torch.Tensor | None = None
    if all(column.lengths is None for column in columns):
        # By numpy: torch would share even this out among threads, which costs more than the work and far more on a busy
        # machine.
        lengths = torch.from_numpy(np.ones(len(values), dtype=np.int32))
        offsets = torch.from_numpy(np.arange(len(values) + 1, dtype=np.int32))
    else:
        lengths = torch.from_numpy(np.concatenate([column.dense_lengths() for column in columns]))
    sparse = KeyedJaggedTensor(
        keys=list(features),
        values=values,
        lengths=lengths,
        offsets=offsets,
        stride=len(rows),
        # Known here for free; a KJT would add up the lengths to find them.
        length_per_key=[len(column.values) for column in columns],
    )
    return Batch(
        dense_features=torch.from_numpy(rows.dense), sparse_features=sparse, labels=torch.from_numpy(rows.labels)
    )


def log_transform(dense: npt.NDArray[np.float32]) -> None:
    """DLRM's transform of count features, in place: `log(1 + max(x, 0))`."""
    np.maximum(dense, 0, out=dense)
    np.log1p(dense, out=dense)


def modulus(ids: npt.NDArray[np.int64], num_embeddings: int) -> npt.NDArray[np.int64]:
    """`id mod num_embeddings` of the unsigned reading of every raw ID.

    A raw ID is 64 bits. Its unsigned reading is the one under which a hexadecimal category is the number that is
    written in the log: `ffffffffffffffff mod 10 = 5`, while the signed reading, -1, would give 9.

    Args:
        ids: [N] int64, any value.
        num_embeddings: n, the size of the universe, 1 to 2^63 - 1.

    Returns:
        [N] int64 in `[0, n)`; `ids` itself where all of them lie there already.

    Raises:
        ConfigError: `num_embeddings` is not in its range.
    """
    if not 1 <= num_embeddings < 2**63:
        raise ConfigError(f"num_embeddings={num_embeddings} is not in 1..2^63 - 1")
    unsigned = ids.view(np.uint64)
    if unsigned.max(initial=0) < num_embeddings:
        return ids
    bounded: npt.NDArray[np.int64] = (unsigned % np.uint64(num_embeddings)).view(np.int64)
    return bounded


def bound(rows: Rows, num_embeddings: Mapping[str, int]) -> Rows:
    """`rows` with `modulus` applied to the features that `num_embeddings` names; the others stay as they are.

    Raises:
        ConfigError: a feature that `rows` does not have, or see `modulus`.
    """
    unknown = [feature for feature in num_embeddings if feature not in rows.ids]
    if unknown:
        raise ConfigError(f"features {unknown} are not among those of the rows: {list(rows.ids)}")
    bounded = dict(rows.ids)
    for feature, size in num_embeddings.items():
        column = bounded[feature]
        values = modulus(column.values, size)
        if values is not column.values:
            bounded[feature] = Column(values=values, lengths=column.lengths)
    return Rows(labels=rows.labels, dense=rows.dense, ids=bounded)
