"""The vocabulary of a map: which position each of its arbitrary 64-bit raw IDs has."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.kernels.hash_table import (
    BUCKET,
    count_blocks,
    keys_by_position,
    lookup_positions,
    place,
    scatter_blocks,
    sort_block,
)
from torchrec_cce.maps.arrow_file import numbers

_SLOT_TYPE = pa.list_(pa.int64(), 2)
# The most slots that a probe walks. A run of r taken slots begins at a random key with a probability below exp(-0.11 r)
# at load 0.6: fewer than one in 10^15 vocabularies of 10^9 random keys meet this one, and 10^7 keys reach about 100.
_MAX_RUN = 512
_MAX_SEEDS = 8
_LINE_BYTES = 64
# A block of buckets is sorted in a core's cache: 2^12 buckets are 256 KiB. With more than 2^12 blocks the scattered
# writes cost more than larger blocks do.
_MIN_BLOCK_BITS, _MAX_BLOCKS_BITS = 12, 12


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """An immutable map from `n` distinct 64-bit keys to the positions `0..n - 1`: an open-addressing hash table of load
    0.6.

    A key is an int64, or a uint64 as its two's complement; no value is reserved. The slots are canonical: they follow
    from the keys, their positions and the seed (see `torchrec_cce.kernels.hash_table`). Lookups are fastest where the
    slots start at a multiple of 64 bytes.

    Raises:
        ConfigError: the slots are not those of such a table. Their content is not read; its digest vouches for it.
    """

    slots: pa.FixedSizeListArray
    """[S] lists {key, position} of int64; position -1 marks an empty slot, which the last one is. At most 27 bytes a
    key if there are many."""
    num_ids: int
    """`n`: keys."""
    num_buckets: int
    """Buckets of 4 slots. The slots after them hold the keys that the last ones have no room for."""
    seed: int
    """Of the hash: 0 to 2^63 - 1."""

    def __post_init__(self) -> None:
        if self.slots.type != _SLOT_TYPE:
            raise ConfigError(f"slots are of type {self.slots.type}; they must be {_SLOT_TYPE}")
        values = self.slots.flatten()  # of this slice alone
        if self.slots.null_count or values.null_count:
            nulls = self.slots.null_count + values.null_count
            raise ConfigError(f"slots hold {nulls} nulls; an empty slot has position -1")
        size = len(self.slots)
        if not (0 <= self.num_ids < size and 1 <= self.num_buckets <= size / BUCKET and size % BUCKET == 0):
            raise ConfigError(
                f"{size} slots cannot be those of num_ids={self.num_ids} and num_buckets={self.num_buckets}: their "
                f"number is a multiple of {BUCKET}, at least {BUCKET} a bucket, and greater than num_ids"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} is not in 0..2^63 - 1")
        if self.slots_view[-1, 1] != -1:
            raise ConfigError(f"the last slot has position {self.slots_view[-1, 1]}; it must be empty, position -1")

    @classmethod
    def build(cls, keys: npt.NDArray[np.int64], *, num_threads: int | None = None) -> "Vocabulary":
        """The vocabulary in which `keys[i]` has position `i`, the same for any number of threads.

        Needs 16 bytes a key besides the result.

        Args:
            keys: [n] int64 or uint64, all different; n may be 0.
            num_threads: None = one a core.

        Raises:
            ConfigError: `keys` has another shape or type or holds a key twice, `num_threads < 1`, or the keys were
                chosen so that too many lie in a row under every seed that is tried.
        """
        keys = _as_keys(keys)
        num_threads = (os.cpu_count() or 1) if num_threads is None else num_threads
        if num_threads < 1:
            raise ConfigError(f"num_threads={num_threads} must be at least 1")
        num_buckets = max(1, -(-len(keys) * 5 // (3 * BUCKET)))  # a load of 0.6
        for attempt in range(_MAX_SEEDS):
            seed = derive_seed("vocabulary", attempt)
            slots = _placed(keys, num_buckets, seed, num_threads)
            if slots is not None:
                flat = pa.array(slots.reshape(-1))
                lists = pa.FixedSizeListArray.from_arrays(flat, type=_SLOT_TYPE)
                return cls(slots=lists, num_ids=len(keys), num_buckets=num_buckets, seed=seed)
            _refuse_duplicates(keys)
        raise ConfigError(
            f"under each of {_MAX_SEEDS} seeds more than {_MAX_RUN} of the {len(keys)} keys lie in a row; that happens "
            "only to keys that were chosen for it, so leave out those that come from outside"
        )

    @cached_property
    def slots_view(self) -> npt.NDArray[np.int64]:
        """[S, 2] int64 numpy view of the slots, without a copy."""
        values = numbers(self.slots.values)
        start = 2 * self.slots.offset
        view: npt.NDArray[np.int64] = values[start : start + 2 * len(self.slots)]
        return view.reshape(-1, 2)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return self.slots_view.nbytes

    def positions(self, keys: npt.NDArray[np.int64], out: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
        """The position of each of `keys: [N] int64 or uint64`, -1 for a key that is not in the vocabulary.

        Args:
            keys: any values, repeated or not.
            out: [N] int64 to write to and return, not overlapping `keys`; None = a new array. Reusing one saves the
                page faults of fresh memory.

        Raises:
            ConfigError: `keys` or `out` has another shape or type, or they overlap.
        """
        keys = _as_keys(keys)
        if out is None:
            out = np.empty(len(keys), np.int64)
        elif out.shape != keys.shape or out.dtype != np.int64 or np.may_share_memory(keys, out):
            raise ConfigError(
                f"out is {out.dtype} {list(out.shape)}; it must be int64 [{len(keys)}] and not overlap keys"
            )
        lookup_positions(keys, self.slots_view, self.num_buckets, self.seed, out)
        return out

    def keys(self, out: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
        """[n] int64: the key of each position.

        Args:
            out: [n] int64, to write to and return, for example a memory-mapped file; None = a new array.

        Raises:
            ConfigError: the slots do not hold `n` keys with positions in 0..n - 1: they are damaged.
        """
        keys = np.zeros(self.num_ids, np.int64) if out is None else out
        if not keys_by_position(self.slots_view, keys):
            raise ConfigError(
                f"the slots do not hold the positions 0..{self.num_ids - 1}; compare the digest, build them again"
            )
        return keys

    @cached_property
    def key_of_position(self) -> npt.NDArray[np.int64]:
        """[n] int64: `keys`, computed once and kept."""
        return self.keys()

    def first_key(self) -> int:
        """The key with position 0, found without the others. Only for a vocabulary that has a key."""
        return int(self.slots_view[np.argmax(self.slots_view[:, 1] == 0), 0])

    @property
    def has_key_of_position(self) -> bool:
        """Whether it was asked for `key_of_position` before, or was given it."""
        return "key_of_position" in self.__dict__

    def reading_keys(self, keys: npt.NDArray[np.int64]) -> None:
        """Take `key_of_position` from `keys: [n] int64`, for example a file that several processes map."""
        self.__dict__["key_of_position"] = keys  # where `cached_property` keeps it

    def header(self) -> dict[str, Any]:
        """The vocabulary without its slots, as JSON values."""
        return {"num_ids": self.num_ids, "num_buckets": self.num_buckets, "seed": self.seed}

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides a lookup: the header and the slots."""
        content = hashlib.sha256(json.dumps(self.header(), sort_keys=True).encode())
        content.update(self.slots_view.reshape(-1).view(np.uint8).data)
        return content.hexdigest()

    def vouched(self, digest: str) -> "Vocabulary":
        """Itself, with the digest that a verified manifest gives it: no second pass over the slots."""
        self.__dict__["digest"] = digest  # where `cached_property` keeps it
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Vocabulary":
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the slots once, without the view of them."""
        return {name: value for name, value in self.__dict__.items() if name != "slots_view"}


def _as_keys(keys: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """[N] int64, a view wherever it can be one."""
    if keys.ndim != 1 or keys.dtype not in (np.int64, np.uint64):
        raise ConfigError(f"keys are {keys.dtype} {list(keys.shape)}; they must be int64 or uint64 [N]")
    contiguous: npt.NDArray[np.int64] = np.ascontiguousarray(keys).view(np.int64)
    return contiguous


def _placed(keys: npt.NDArray[np.int64], num_buckets: int, seed: int, num_threads: int) -> npt.NDArray[np.int64] | None:
    """The slots [S, 2], or None if two keys are equal or too many lie in a row.

    Threads sort the keys into blocks of slots and then each block; one pass over the sorted keys fills the slots.
    """
    shift = max(_MIN_BLOCK_BITS, num_buckets.bit_length() - _MAX_BLOCKS_BITS)
    width = 1 << shift
    num_blocks = -(-num_buckets // width)
    parts = np.array_split(keys, num_threads)
    first_positions = np.cumsum([0, *map(len, parts)])
    counts = np.zeros((num_threads, num_blocks), np.int64)
    pairs = np.empty((len(keys), 2), np.int64)
    with ThreadPoolExecutor(num_threads) as pool:

        def count(part: int) -> None:
            count_blocks(parts[part], num_buckets, seed, shift, counts[part])

        def scatter(part: int) -> None:
            scatter_blocks(parts[part], first_positions[part], num_buckets, seed, shift, cursors[part], pairs)

        def sort(block: int) -> bool:
            first = block * width
            inside = pairs[starts[block] : starts[block + 1]]
            return sort_block(inside, num_buckets, first, min(width, num_buckets - first), _MAX_RUN)

        list(pool.map(count, range(num_threads)))
        starts = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
        cursors = starts[:-1] + np.cumsum(counts, axis=0) - counts  # of a block, the parts lie in order
        list(pool.map(scatter, range(num_threads)))
        if not all(pool.map(sort, range(num_blocks))):
            return None
    slots = _aligned_slots(BUCKET * num_buckets + _MAX_RUN)
    size = place(pairs, num_buckets, seed, _MAX_RUN, slots)
    return None if size < 0 else slots[:size]


def _aligned_slots(count: int) -> npt.NDArray[np.int64]:
    """[count, 2] int64, uninitialised; a bucket is one cache line. numpy asks for huge pages, Arrow would not."""
    words = _LINE_BYTES // 8
    buffer = np.empty(2 * count + words, np.int64)
    start = -(buffer.ctypes.data // 8) % words
    return buffer[start : start + 2 * count].reshape(count, 2)


def _refuse_duplicates(keys: npt.NDArray[np.int64]) -> None:
    ordered = np.sort(keys)
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        key = ordered[np.argmax(repeated)]
        first, second = np.flatnonzero(keys == key)[:2]
        raise ConfigError(f"key {key} is given for the positions {first} and {second}; every key must be given once")
