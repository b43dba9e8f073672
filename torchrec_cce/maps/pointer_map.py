"""The index-pointer map of one CCE table: which codebook and helper word each raw ID reads in each column."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_cce.errors import ConfigError, InvalidIDError, MapMismatchError
from torchrec_cce.hashing import HASH_NAME, UniversalHash, derive_seed, term_hash
from torchrec_cce.kernels.gather import gather_rows, gather_words
from torchrec_cce.kernels.packed import as_words
from torchrec_cce.maps.arrow_file import list_array, numbers
from torchrec_cce.maps.vocabulary import Vocabulary

Unseen = Literal["error", "hash", "first_row"]
"""What a raw ID gets that the map does not know: an error; the hashed words that an unclustered map would give it; or
the words of the ID in row 0."""

_CHUNK = 65536


class Resolved(NamedTuple):
    """Raw IDs, after what a map's `unseen` says of those that it does not know."""

    ids: npt.NDArray[np.int64]
    """[N] those that hashes are taken of."""
    rows: npt.NDArray[np.int64]
    """[N] their rows; -1 where hashed pointers take the place of stored ones, or there is to be an error."""
    unseen: npt.NDArray[np.bool_] | None
    """[N] which of them the map does not know; None if it knows all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PointerMap:
    """An immutable map from raw IDs to codes in `0..num_rows - 1`, `c` columns of codebook and helper.

    The map has `num_ids` rows, one a raw ID: raw IDs are `0..num_ids - 1` themselves, or any 64-bit keys to which a
    vocabulary gives their rows. Before the first clustering nothing is stored: both codes are hashes of the raw ID. A
    clustering gives every row its learned codebook pointers and the table a fresh helper hash. Not a tensor and not a
    parameter, so that no wrapper that copies or synchronises a model's state ever copies a map; threads, deep copies
    and processes share it.
    """

    num_ids: int
    """`n`: rows, of as many raw IDs."""
    codebook_hash: UniversalHash
    """Codebook pointers before the first clustering. Its `num_rows` is `k`, its `num_columns` is `c`."""
    helper_hash: UniversalHash
    """Helper pointers: never stored, drawn afresh at every clustering."""
    stored: pa.FixedSizeListArray | None = None
    """[n] lists of `c` uint8, uint16 or uint32: the learned codebook pointers, or None before the first clustering."""
    generation: int = 0
    """Clusterings so far."""
    vocabulary: Vocabulary | None = None
    """The rows of arbitrary 64-bit raw IDs; None where a raw ID is its row."""
    unseen: Unseen = "error"
    """What raw IDs without a row get."""
    version: int | None = None
    """The registry's version that this map was opened from; None if it was not. No part of the digest."""

    def __post_init__(self) -> None:
        if self.unseen not in get_args(Unseen):
            raise ConfigError(f"unseen={self.unseen!r} is not one of {', '.join(get_args(Unseen))}")
        if self.vocabulary is not None and self.vocabulary.num_ids != self.num_ids:
            raise ConfigError(f"a vocabulary of {self.vocabulary.num_ids} keys is not that of {self.num_ids} IDs")
        if self.unseen == "first_row" and self.num_ids == 0:
            raise ConfigError('unseen="first_row" needs a map with at least one row; this one has none')
        if self.stored is None:
            return
        if len(self.stored) != self.num_ids or self.stored.type.list_size != self.num_columns or self.stored.null_count:
            raise ConfigError(
                f"pointers of type {self.stored.type}, length {len(self.stored)} with {self.stored.null_count} nulls "
                f"are not those of {self.num_ids} IDs in {self.num_columns} columns"
            )

    @classmethod
    def hashed(
        cls,
        *,
        num_ids: int,
        num_columns: int,
        num_rows: int,
        seed: int,
        vocabulary: Vocabulary | None = None,
        unseen: Unseen = "error",
    ) -> "PointerMap":
        """The map a table starts from: independent random hashes for codebook and helper."""
        return cls(
            num_ids=num_ids,
            codebook_hash=term_hash(seed, 0, num_columns=num_columns, num_rows=num_rows),
            helper_hash=term_hash(seed, 1, num_columns=num_columns, num_rows=num_rows),
            vocabulary=vocabulary,
            unseen=unseen,
        )

    def with_vocabulary(self, vocabulary: Vocabulary, *, unseen: Unseen = "hash") -> "PointerMap":
        """This map for the raw IDs of `vocabulary`: no embedding changes.

        A raw ID that had learned pointers keeps them. One that is new gets those that `unseen="hash"` gave it before.
        """
        grown = None
        if self.stored is not None:
            keys = vocabulary.keys()
            rows = self.rows(keys)
            pointers = np.empty((len(keys), self.num_columns), self.stored_view.dtype)
            for start in range(0, len(keys), _CHUNK):
                part = slice(start, start + _CHUNK)
                pointers[part] = self._stored_or_hashed(keys[part], rows[part])
            grown = list_array(pointers)
        return replace(
            self, num_ids=vocabulary.num_ids, stored=grown, vocabulary=vocabulary, unseen=unseen, version=None
        )

    def next_helper_hash(self, seed: int) -> UniversalHash:
        """The helper hash for the clustering that follows this generation."""
        fresh = derive_seed(seed, "version", self.generation + 1)
        return term_hash(fresh, 1, num_columns=self.num_columns, num_rows=self.num_rows)

    def clustered(self, pointers: npt.NDArray[np.unsignedinteger], helper_hash: UniversalHash) -> "PointerMap":
        """The next generation: `pointers: [n, c]` uint8/16/32, and the helper hash that goes with them."""
        if pointers.size and int(pointers.max()) >= self.num_rows:
            raise ConfigError(f"pointer {int(pointers.max())} is not in 0..{self.num_rows - 1}")
        return replace(
            self,
            helper_hash=helper_hash,
            stored=list_array(pointers),
            generation=self.generation + 1,
            version=None,
        )

    @property
    def takes_any_id(self) -> bool:
        """Whether any 64-bit raw ID may be looked up; if not, only `0..num_ids - 1`."""
        return self.vocabulary is not None or self.unseen != "error"

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
        return list_array(self.codebook_codes(np.arange(self.num_ids)).astype(np.uint32))

    @cached_property
    def stored_view(self) -> npt.NDArray[np.unsignedinteger]:
        """[n, c] numpy view of the stored pointers, without a copy. Only for a clustered map."""
        assert self.stored is not None
        values = numbers(self.stored.values)
        start = self.stored.offset * self.num_columns
        view: npt.NDArray[np.unsignedinteger] = values[start : start + self.num_ids * self.num_columns]
        return view.reshape(self.num_ids, self.num_columns)

    @cached_property
    def words(self) -> npt.NDArray[np.unsignedinteger]:
        """[n] or [n, w]: the stored pointers of a row as one or more machine words, without a copy; see `as_words`."""
        return as_words(self.stored_view)

    @property
    def nbytes(self) -> int:
        """Bytes in host memory: `n·c` stored pointers (0 before the first clustering) and the vocabulary."""
        pointers = 0 if self.stored is None else self.stored_view.nbytes
        return pointers + (0 if self.vocabulary is None else self.vocabulary.nbytes)

    def raw_ids(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The raw IDs of valid `rows: [N] int64`."""
        return rows if self.vocabulary is None else self.vocabulary.key_of_row[rows]

    @cached_property
    def first_id(self) -> int:
        """The raw ID of row 0."""
        if self.vocabulary is None:
            return 0
        slots = self.vocabulary.slots_view
        return int(slots[np.argmax(slots[:, 1] == 0), 0])

    def rows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows of raw `ids: [N] int64`, -1 for those that the map does not know."""
        if self.vocabulary is not None:
            return self.vocabulary.rows(ids)
        return np.where((ids >= 0) & (ids < self.num_ids), ids, -1)

    def resolve(self, ids: npt.NDArray[np.int64]) -> Resolved:
        """The rows of any raw `ids: [N] int64`, by the map's own policy for those that it does not know."""
        rows = self.rows(ids)
        unseen = rows < 0
        if not unseen.any():
            return Resolved(ids, rows, None)
        if self.unseen == "first_row":
            ids, rows = np.where(unseen, self.first_id, ids), np.where(unseen, 0, rows)
        return Resolved(ids, rows, unseen)

    def codes_of_any(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Codebook and helper codes of any raw `ids: [N] int64`, as `[c, 2, N] int64`; see `resolve`.

        Where `unseen` is an error, those of IDs that the map does not know are hashed, as by `with_vocabulary`.
        """
        ids, rows, _ = self.resolve(ids)
        return np.stack([self._stored_or_hashed(ids, rows).T, self.helper_hash.numpy(ids).T], axis=1)

    def _stored_or_hashed(self, ids: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[N, c] codebook codes of `ids: [N]`: those of their rows, hashed where there is none (-1)."""
        if self.stored is None:
            return self.codebook_hash.numpy(ids)
        codes = self.codebook_codes(rows).astype(np.int64)  # a gather gives 0 where there is no row
        unseen = rows < 0
        codes[unseen] = self.codebook_hash.numpy(ids[unseen])
        return codes

    def gather(
        self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.unsignedinteger] | None = None
    ) -> npt.NDArray[np.unsignedinteger]:
        """The stored pointers of raw `ids: [N] int64`, as words: [N] or [N, w]; see `as_words`. For a clustered map.

        One thread, at the speed of memory; it releases the GIL, so that callers slice work over threads.

        Args:
            out: of that shape and dtype, to write to and return; None = a new array. Reusing one saves page faults.

        Raises:
            InvalidIDError: an ID that the map does not know; names the first.
        """
        shape, dtype = (len(ids), *self.words.shape[1:]), self.words.dtype
        if out is None:
            out = np.empty(shape, dtype)
        elif out.shape != shape or out.dtype != dtype:
            raise ConfigError(f"out is {out.dtype} {list(out.shape)}; it must be {dtype} {list(shape)}")
        bad = self._gather_into(out, ids if self.vocabulary is None else self.vocabulary.rows(ids))
        if bad >= 0:
            raise InvalidIDError(
                f"raw ID {ids[bad]} (position {bad} of {len(ids)}) is not among the {self.num_ids} of the map"
            )
        return out

    def codes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Codebook and helper codes of valid `rows: [N] int64`, as `[c, 2, N] int64`."""
        codebook = self.codebook_codes(rows).astype(np.int64)
        return np.stack([codebook.T, self.helper_hash.numpy(self.raw_ids(rows)).T], axis=1)

    def codebook_codes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
        """Codebook codes of valid `rows: [N] int64`, as `[N, c]` of any integer type."""
        if self.stored is None:
            return self.codebook_hash.numpy(self.raw_ids(rows))
        out = np.empty((len(rows), *self.words.shape[1:]), self.words.dtype)
        self._gather_into(out, rows)
        return out.view(self.stored_view.dtype).reshape(len(rows), self.num_columns)

    def _gather_into(self, out: npt.NDArray[np.unsignedinteger], rows: npt.NDArray[np.int64]) -> int:
        """Write the words of `rows` to `out`; the position of the first that is not a row, or -1."""
        return (gather_words if self.words.ndim == 1 else gather_rows)(self.words, rows, out)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides a lookup: sizes, hash functions, vocabulary and pointers."""
        content = hashlib.sha256(json.dumps(self.header(), sort_keys=True).encode())
        if self.stored is not None:
            content.update(self.stored_view.reshape(-1).view(np.uint8).data)
        return content.hexdigest()

    def vouched(self, digest: str) -> "PointerMap":
        """Itself, with the digest that a verified manifest gives it: no second pass over the pointers."""
        self.__dict__["digest"] = digest  # where `cached_property` keeps it
        return self

    def published_as(self, version: int) -> "PointerMap":
        """The same map, of which the registry's version is known."""
        return replace(self, version=version).vouched(self.digest)

    @property
    def identity(self) -> str:
        """For messages: `version 7, generation 3 (digest 1a2b3c4d…)`."""
        return identity(self.version, self.generation, self.digest)

    def header(self) -> dict[str, Any]:
        """The map without its arrays, as JSON values."""
        return {
            "num_ids": self.num_ids,
            "num_rows": self.num_rows,
            "num_columns": self.num_columns,
            "hash": HASH_NAME,
            "pointer_dtype": None if self.stored is None else str(self.stored_view.dtype),
            "unseen": self.unseen,
            "vocabulary": None if self.vocabulary is None else self.vocabulary.digest,
            **{
                name: {"multipliers": functions.multipliers.tolist(), "offsets": functions.offsets.tolist()}
                for name, functions in (("codebook_hash", self.codebook_hash), ("helper_hash", self.helper_hash))
            },
        }

    def check_sizes(self, *, table: str, num_ids: int, num_columns: int, num_rows: int) -> None:
        """Raise MapMismatchError unless this map has the sizes of `table`.

        A map with a vocabulary may have fewer rows than the table has room for: vocabularies grow with every version.
        """
        fits = self.num_ids == num_ids or (self.vocabulary is not None and self.num_ids <= num_ids)
        if not fits or (self.num_columns, self.num_rows) != (num_columns, num_rows):
            raise MapMismatchError(
                f"table {table!r} has {num_ids} IDs, {num_columns} columns, {num_rows} rows; the map, {self.identity}, "
                f"is of {self.num_ids} IDs, {self.num_columns} columns, {self.num_rows} rows"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "PointerMap":
        return self


def identity(version: int | None, generation: int, digest: str) -> str:
    """For messages: which map is meant."""
    published = "not published" if version is None else f"version {version}"
    return f"{published}, generation {generation} (digest {digest[:12]})"
