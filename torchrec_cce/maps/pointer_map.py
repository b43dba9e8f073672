"""The index-pointer map of one CCE table: which codeword of the codebook and of the helper each raw ID reads in each
column. What a raw ID gets, known to the map or not, is decided here alone: see `PointerMap.resolve`.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.hashing import HASH_NAME, UniversalHash, derive_seed, term_hash
from torchrec_cce.kernels.packed import as_packed, as_uint64s, gather_rows, gather_words, hashed_words, pack
from torchrec_cce.kernels.rows import clustered_rows, hashed_rows, partly_clustered_rows
from torchrec_cce.maps.arrow_file import list_array, numbers
from torchrec_cce.maps.pointer_format import Codes, MinPointerBits, PointerFormat
from torchrec_cce.maps.vocabulary import Vocabulary

Unseen = Literal["error", "hash", "first_row"]
"""What a raw ID gets that the map does not know: an error; the hashed codewords that an unclustered map would give it;
or the codewords of the ID at position 0."""

_CHUNK = 65536


class Resolved(NamedTuple):
    """What some raw IDs get from a map, by its rule: see `PointerMap.resolve`."""

    ids: npt.NDArray[np.int64]
    """[N] the raw IDs that hashes are taken of: the given ones, but for those that another takes the place of."""
    positions: npt.NDArray[np.int64]
    """[N] their positions: whose stored pointers they get; -1 where hashes take the place of stored pointers."""
    unseen: npt.NDArray[np.bool_] | None = None
    """[N] which of them the map does not know; None if it knows all."""
    bad: int = -1
    """Index of the first that the map does not know where `unseen="error"`, or -1. If there is one, none of the codes
    that were made of these IDs may be used."""

    @property
    def num_unseen(self) -> int:
        """How many the map does not know, and has something for."""
        return 0 if self.unseen is None or self.bad >= 0 else int(np.count_nonzero(self.unseen))


@dataclass(frozen=True, kw_only=True, eq=False)
class PointerMap:
    """An immutable map from raw IDs to codes in `0..num_rows - 1`, `c` columns of codebook and helper.

    The map has `num_ids` positions, one a raw ID: raw IDs are `0..num_ids - 1` themselves, or any 64-bit keys to which
    a vocabulary gives their positions. Before the first clustering nothing is stored: both codes are hashes of the raw
    ID. A clustering gives every position its learned codebook pointers and the table a fresh helper hash. A map is
    neither a tensor nor a parameter, so that no wrapper that copies or synchronises a model's state ever copies it;
    threads, deep copies and processes share it.
    """

    num_ids: int
    """`n`: positions, of as many raw IDs."""
    codebook_hash: UniversalHash
    """Codebook pointers before the first clustering. Its `num_rows` is `k`, its `num_columns` is `c`."""
    helper_hash: UniversalHash
    """Helper pointers: never stored, drawn afresh at every clustering."""
    stored: pa.FixedSizeListArray | None = None
    """[n] lists, as a `PointerFormat` has them: the learned codebook pointers, or None before the first clustering."""
    generation: int = 0
    """Clusterings so far."""
    vocabulary: Vocabulary | None = None
    """The positions of arbitrary 64-bit raw IDs; None where a raw ID is its position."""
    unseen: Unseen = "error"
    """What raw IDs without a position get."""
    version: int | None = None
    """The registry's version that this map was opened from; None if it was not. No part of the digest."""

    def __post_init__(self) -> None:
        if self.unseen not in get_args(Unseen):
            raise ConfigError(f"unseen={self.unseen!r} is not one of {', '.join(get_args(Unseen))}")
        if self.vocabulary is not None and self.vocabulary.num_ids != self.num_ids:
            raise ConfigError(f"a vocabulary of {self.vocabulary.num_ids} keys is not that of {self.num_ids} IDs")
        if self.unseen == "first_row" and self.num_ids == 0:
            raise ConfigError('unseen="first_row" needs a map with at least one raw ID; this one has none')
        if self.stored is None:
            return
        is_known = PointerFormat.of_type(self.stored.type, num_columns=self.num_columns) is not None
        if len(self.stored) != self.num_ids or not is_known or self.stored.null_count:
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
            positions = self.positions(keys)
            pointers = np.empty(len(keys), self.pointer_format.item)
            for start in range(0, len(keys), _CHUNK):
                part = slice(start, start + _CHUNK)
                pointers[part] = self.pointer_format.encode(self._stored_or_hashed(keys[part], positions[part]))
            grown = list_array(pointers)
        return replace(
            self, num_ids=vocabulary.num_ids, stored=grown, vocabulary=vocabulary, unseen=unseen, version=None
        )

    def next_helper_hash(self, seed: int) -> UniversalHash:
        """The helper hash for the clustering that follows this generation."""
        fresh = derive_seed(seed, "version", self.generation + 1)
        return term_hash(fresh, 1, num_columns=self.num_columns, num_rows=self.num_rows)

    def clustered(self, pointers: npt.NDArray[np.unsignedinteger], helper_hash: UniversalHash) -> "PointerMap":
        """The next generation: `pointers: [n, c]` uint8/16/32, or as a `PointerFormat` has them; their helper hash."""
        stored, generation = list_array(pointers), self.generation + 1
        new = replace(self, helper_hash=helper_hash, stored=stored, generation=generation, version=None)
        if pointers.size and int(new.learned_codes.max()) >= self.num_rows:
            raise ConfigError(f"pointer {int(new.learned_codes.max())} is not in 0..{self.num_rows - 1}")
        return new

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
        """[n] lists of `c` codebook pointers. Those of 4 bits (to uint8) and of no clustering (uint32) are computed."""
        if self.stored is not None:
            return list_array(self.learned_codes[:])
        return list_array(self.codebook_codes(np.arange(self.num_ids)).astype(np.uint32))

    @cached_property
    def pointer_format(self) -> PointerFormat:
        """How the stored pointers are stored. Only for a clustered map."""
        found = None if self.stored is None else PointerFormat.of_type(self.stored.type, num_columns=self.num_columns)
        assert found is not None
        return found

    @property
    def min_pointer_bits(self) -> MinPointerBits:
        """4 for a map whose stored pointers are of 4 bits, else 8: of what is made of it."""
        return 4 if self.stored is not None and self.pointer_format.nibbles else 8

    @property
    def word_format(self) -> PointerFormat:
        """How 64-bit words hold its codes, which may be stored in more bits than they need."""
        return PointerFormat.that_holds(self.num_rows, num_columns=self.num_columns, min_bits=self.min_pointer_bits)

    @cached_property
    def stored_view(self) -> npt.NDArray[np.unsignedinteger]:
        """[n, c] numpy view of the stored pointers; [n, ⌈c/2⌉] if two are in a byte. Only for a clustered map."""
        assert self.stored is not None
        values, width = numbers(self.stored.values), self.stored.type.list_size
        start = self.stored.offset * width
        view: npt.NDArray[np.unsignedinteger] = values[start : start + self.num_ids * width]
        return view.reshape(self.num_ids, width)

    @property
    def learned_codes(self) -> Codes:
        """The stored pointers to be read as [n, c] codes, without a copy. Only for a clustered map."""
        return self.pointer_format.codes(self.stored_view)

    @cached_property
    def packed(self) -> npt.NDArray[np.unsignedinteger]:
        """[n] or [n, w]: the stored pointers of each ID as one or more machine words, not copied; see `as_packed`."""
        return as_packed(self.stored_view)

    @property
    def nbytes(self) -> int:
        """Bytes in host memory: the stored pointers (0 before the first clustering) and the vocabulary."""
        pointers = 0 if self.stored is None else self.stored_view.nbytes
        return pointers + (0 if self.vocabulary is None else self.vocabulary.nbytes)

    def raw_ids(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The raw IDs at valid `positions: [N] int64`."""
        return positions if self.vocabulary is None else self.vocabulary.key_of_position[positions]

    @cached_property
    def first_id(self) -> int:
        """The raw ID at position 0."""
        return 0 if self.vocabulary is None else self.vocabulary.first_key()

    def positions(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The positions of raw `ids: [N] int64`, -1 for those that the map does not know."""
        if self.vocabulary is not None:
            return self.vocabulary.positions(ids)
        return np.where((ids >= 0) & (ids < self.num_ids), ids, -1)

    def resolve(self, ids: npt.NDArray[np.int64]) -> Resolved:
        """What raw `ids: [N] int64` get: the one rule that all codes follow, as rows, as words or as numbers.

        - An ID that the map knows gets the pointers stored at its position; before the first clustering, hashes of it.
        - One that it does not know gets what `unseen` says: under "error" it is `bad`, under "hash" it gets hashes of
          itself, under "first_row" it is taken for the ID at position 0.
        - The helper codes are hashes of the raw ID, or of the ID that it is taken for.
        """
        positions = self.positions(ids)
        unseen = positions < 0
        if not unseen.any():
            return Resolved(ids, positions)
        if self.unseen == "error":
            return Resolved(ids, positions, unseen, bad=int(np.argmax(unseen)))
        if self.unseen == "first_row":
            ids, positions = np.where(unseen, self.first_id, ids), np.where(unseen, 0, positions)
        return Resolved(ids, positions, unseen)

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> Resolved:
        """Write the rows of a physical table that raw `ids: [N] int64` read, and return what the IDs are to the map.

        Args:
            out: [c, N, 2] int64, of codebook and helper, or [c, N, 1] of the codebook alone. Code `x` of column `j` is
                row `2j·k + x` in the codebook, and `(2j + 1)·k + x` in the helper.
        """
        both = out.shape[2] == 2
        codebook, helper, k, nibbles = self.codebook_hash, self.helper_hash, self.num_rows, self.min_pointer_bits == 4
        # Where a raw ID is its position, and any other is an error, one pass does it all, the check included.
        if not self.takes_any_id and self.stored is not None:
            bad = clustered_rows(ids, self.stored_view, helper.multipliers, helper.offsets, k, out, nibbles)
            return Resolved(ids, ids, bad=bad)
        if not self.takes_any_id and both:
            return Resolved(ids, ids, bad=hashed_rows(ids, self.num_ids, *self._both_hashes, k, out))

        found = self.resolve(ids)
        if found.bad >= 0:
            return found
        if self.stored is None and both:
            hashed_rows(found.ids, 0, *self._both_hashes, k, out)  # knows no ID, but `resolve` does
        else:
            stored = np.empty((0, self.num_columns), np.uint8) if self.stored is None else self.stored_view
            functions = codebook.multipliers, codebook.offsets, helper.multipliers, helper.offsets
            partly_clustered_rows(found.ids, found.positions, stored, *functions, k, out, nibbles)
        return found

    def uint64s(
        self, ids: npt.NDArray[np.int64], form: PointerFormat, *, helper: bool
    ) -> tuple[list[npt.NDArray[np.uint64]], Resolved]:
        """The codes of raw `ids: [N] int64` in 64-bit words, as `pack` makes them, and what the IDs are to the map.

        Args:
            form: of the codes of an ID in its words.
            helper: whether as many words of the helper codes follow those of the codebook codes, [N] uint64 each.
        """
        # As in `rows_into`: the gather checks the IDs.
        one_pass = not self.takes_any_id and self.stored is not None
        found = Resolved(ids, ids) if one_pass else self.resolve(ids)
        if self.stored is None:
            words = hashed_words(found.ids, self.codebook_hash, form.bits)
        else:
            packed, outside = self._gathered(found.positions)
            is_stored = form == self.pointer_format
            words = as_uint64s(packed, form.item) if is_stored else pack(form.encode(self._codes_in(packed)))
            if found.unseen is None:
                found = found._replace(bad=outside)
            elif self.unseen == "hash":
                hashes = hashed_words(found.ids[found.unseen], self.codebook_hash, form.bits)
                for word, hashed in zip(words, hashes, strict=True):
                    word[found.unseen] = hashed
        if helper:
            words += hashed_words(found.ids, self.helper_hash, form.bits)
        return words, found

    def codes_of_any(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Codebook and helper codes of any raw `ids: [N] int64`, as `[c, 2, N] int64`; see `resolve`.

        Where `unseen` is an error, those of IDs that the map does not know are hashed, as by `with_vocabulary`.
        """
        found = self.resolve(ids)
        codebook = self._stored_or_hashed(found.ids, found.positions)
        return np.stack([codebook.T, self.helper_hash.numpy(found.ids).T], axis=1)

    def codes(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Codebook and helper codes at valid `positions: [N] int64`, as `[c, 2, N] int64`."""
        codebook = self.codebook_codes(positions).astype(np.int64)
        return np.stack([codebook.T, self.helper_hash.numpy(self.raw_ids(positions)).T], axis=1)

    def codebook_codes(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
        """Codebook codes at valid `positions: [N] int64`, as `[N, c]` of any integer type."""
        if self.stored is None:
            return self.codebook_hash.numpy(self.raw_ids(positions))
        return self._codes_in(self._gathered(positions)[0])

    def _stored_or_hashed(self, ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[N, c] codebook codes of `ids: [N]`: those at their positions, hashed where there is none (-1)."""
        if self.stored is None:
            return self.codebook_hash.numpy(ids)
        codes = self.codebook_codes(positions).astype(np.int64)  # a gather gives 0 where there is no position
        unseen = positions < 0
        codes[unseen] = self.codebook_hash.numpy(ids[unseen])
        return codes

    def _gathered(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.unsignedinteger], int]:
        """The packed pointers at `positions: [N]`, and the index of the first that is not one of the map's, or -1."""
        out = np.empty((len(positions), *self.packed.shape[1:]), self.packed.dtype)
        return out, (gather_words if self.packed.ndim == 1 else gather_rows)(self.packed, positions, out)

    def _codes_in(self, packed: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
        """[N, c]: the codes in what `_gathered` gave."""
        form = self.pointer_format
        return form.decode(packed.view(form.dtype).reshape(len(packed), form.width))

    @cached_property
    def _both_hashes(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Multipliers and offsets of both hashes, [2·c] each, column by column, codebook before helper."""
        pair = (self.codebook_hash, self.helper_hash)
        multipliers = np.stack([functions.multipliers for functions in pair], axis=1).reshape(-1)
        return multipliers, np.stack([functions.offsets for functions in pair], axis=1).reshape(-1)

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
            "pointer_dtype": None if self.stored is None else self.pointer_format.name,
            "unseen": self.unseen,
            "vocabulary": None if self.vocabulary is None else self.vocabulary.digest,
            **{
                name: {"multipliers": functions.multipliers.tolist(), "offsets": functions.offsets.tolist()}
                for name, functions in (("codebook_hash", self.codebook_hash), ("helper_hash", self.helper_hash))
            },
        }

    def check_sizes(self, *, table: str, num_ids: int, num_columns: int, num_rows: int) -> None:
        """Raise MapMismatchError unless this map has the sizes of `table`.

        A map with a vocabulary may have fewer IDs than the table has room for: vocabularies grow with every version.
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
