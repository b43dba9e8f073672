"""The index-pointer map of one CCE table: which codebook and helper word each raw ID reads in each column."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.hashing import UniversalHash, derive_seed, term_hash


@dataclass(frozen=True, kw_only=True, eq=False)
class PointerMap:
    """An immutable map from raw IDs `0..num_ids - 1` to codes in `0..num_rows - 1`, `c` columns of codebook and helper.

    Before the first clustering nothing is stored: both codes are hashes. A clustering gives every ID its learned
    codebook pointers and the table a fresh helper hash. Not a tensor and not a parameter, so that no wrapper
    that copies or synchronises a model's state ever copies a map; threads, deep copies and processes share it.
    """

    num_ids: int
    """`n`: raw IDs."""
    codebook_hash: UniversalHash
    """Codebook pointers before the first clustering. Its `num_rows` is `k`, its `num_columns` is `c`."""
    helper_hash: UniversalHash
    """Helper pointers: never stored, drawn afresh at every clustering."""
    stored: pa.FixedSizeListArray | None = None
    """[n] lists of `c` uint8, uint16 or uint32: the learned codebook pointers, or None before the first clustering."""
    version: int = 0
    """Clusterings so far."""

    def __post_init__(self) -> None:
        if self.stored is None:
            return
        if len(self.stored) != self.num_ids or self.stored.type.list_size != self.num_columns or self.stored.null_count:
            raise ConfigError(
                f"pointers of type {self.stored.type}, length {len(self.stored)} with {self.stored.null_count} nulls "
                f"are not those of {self.num_ids} IDs in {self.num_columns} columns"
            )

    @classmethod
    def hashed(cls, *, num_ids: int, num_columns: int, num_rows: int, seed: int) -> "PointerMap":
        """The map a table starts from: independent random hashes for codebook and helper."""
        return cls(
            num_ids=num_ids,
            codebook_hash=term_hash(seed, 0, num_columns=num_columns, num_rows=num_rows),
            helper_hash=term_hash(seed, 1, num_columns=num_columns, num_rows=num_rows),
        )

    def next_helper_hash(self, seed: int) -> UniversalHash:
        """The helper hash for the clustering that follows this version."""
        fresh = derive_seed(seed, "version", self.version + 1)
        return term_hash(fresh, 1, num_columns=self.num_columns, num_rows=self.num_rows)

    def clustered(self, pointers: npt.NDArray[np.unsignedinteger], helper_hash: UniversalHash) -> "PointerMap":
        """The next version: `pointers: [n, c]` uint8/16/32, and the helper hash that goes with them."""
        if pointers.size and int(pointers.max()) >= self.num_rows:
            raise ConfigError(f"pointer {int(pointers.max())} is not in 0..{self.num_rows - 1}")
        flat = pa.array(np.ascontiguousarray(pointers).reshape(-1))
        return PointerMap(
            num_ids=self.num_ids,
            codebook_hash=self.codebook_hash,
            helper_hash=helper_hash,
            stored=pa.FixedSizeListArray.from_arrays(flat, self.num_columns),
            version=self.version + 1,
        )

    @property
    def num_columns(self) -> int:
        return self.helper_hash.num_columns

    @property
    def num_rows(self) -> int:
        return self.helper_hash.num_rows

    @property
    def pointers(self) -> pa.FixedSizeListArray:
        """[n] lists of `c` codebook pointers. Before the first clustering they are computed at each call (uint32)."""
        if self.stored is not None:
            return self.stored
        hashed = self.codebook_hash.numpy(np.arange(self.num_ids)).astype(np.uint32)
        return pa.FixedSizeListArray.from_arrays(pa.array(hashed.reshape(-1)), self.num_columns)

    @cached_property
    def stored_view(self) -> npt.NDArray[np.unsignedinteger]:
        """[n, c] numpy view of the stored pointers, without a copy. Only for a clustered map."""
        assert self.stored is not None
        values = self.stored.values.to_numpy(zero_copy_only=True)
        start = self.stored.offset * self.num_columns
        view: npt.NDArray[np.unsignedinteger] = values[start : start + self.num_ids * self.num_columns]
        return view.reshape(self.num_ids, self.num_columns)

    @property
    def nbytes(self) -> int:
        """Bytes of stored pointers: 0 before the first clustering, then `n·c` pointers."""
        return 0 if self.stored is None else self.stored_view.nbytes

    def codes(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Codebook and helper codes of valid `ids: [N] int64`, as `[c, 2, N] int64`."""
        codebook = self.codebook_hash.numpy(ids) if self.stored is None else self.stored_view[ids].astype(np.int64)
        return np.stack([codebook.T, self.helper_hash.numpy(ids).T], axis=1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides a lookup: sizes, hash functions and pointers, not the version."""
        content = hashlib.sha256(json.dumps(self.header(), sort_keys=True).encode())
        if self.stored is not None:
            content.update(self.stored_view.reshape(-1).view(np.uint8).data)
        return content.hexdigest()

    @property
    def identity(self) -> str:
        """For messages: `version 3 (digest 1a2b3c4d…)`."""
        return f"version {self.version} (digest {self.digest[:12]})"

    def header(self) -> dict[str, Any]:
        """The map without its pointers, as JSON values."""
        return {
            "num_ids": self.num_ids,
            "num_rows": self.num_rows,
            "num_columns": self.num_columns,
            "pointer_dtype": None if self.stored is None else str(self.stored_view.dtype),
            **{
                name: {"multipliers": functions.multipliers.tolist(), "offsets": functions.offsets.tolist()}
                for name, functions in (("codebook_hash", self.codebook_hash), ("helper_hash", self.helper_hash))
            },
        }

    def check_sizes(self, *, table: str, num_ids: int, num_columns: int, num_rows: int) -> None:
        """Raise MapMismatchError unless this map has the sizes of `table`."""
        found = (self.num_ids, self.num_columns, self.num_rows)
        if found != (num_ids, num_columns, num_rows):
            raise MapMismatchError(
                f"table {table!r} has {num_ids} IDs, {num_columns} columns, {num_rows} rows; "
                f"the map is of {found[0]} IDs, {found[1]} columns, {found[2]} rows"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "PointerMap":
        return self
