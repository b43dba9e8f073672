"""The manifest of a version: what its folder holds, and what it was made of. These classes are the format on disk.

`docs/map-format.md` explains it. A reader of a format reads earlier ones back to `OLDEST_FORMAT`; `FORMAT` counts up
with every change.
"""

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version as package_version
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field, FiniteFloat, TypeAdapter
from pydantic.dataclasses import dataclass

from torchrec_cce.maps.pointer_format import PointerType
from torchrec_cce.maps.pointer_map import Unseen
from torchrec_cce.maps.sealed import parse, seal

FORMAT = 3
"""Format 3 has pointers of 4 bits. A version without them is still written as format 2, which older readers read."""
OLDEST_FORMAT = 2
"""Format 1, of before the first release, had other hash functions."""
MANIFEST = "manifest.json"
"""The name of the manifest in a version's folder."""

_CONFIG = ConfigDict(extra="forbid")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.arrow")


def _plain_file_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of an Arrow file in this folder")
    return name


Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Word = Annotated[int, Field(ge=0, lt=2**64)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(_plain_file_name)]


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class FileEntry:
    """One Arrow IPC file of a version's folder."""

    name: FileName
    sha256: Sha256
    """Of all bytes of the file."""
    num_bytes: Count
    num_values: Count
    """Length of its array."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class HashFunctions:
    """`c` hash functions onto `0..num_rows - 1`; see `torchrec_cce.hashing`."""

    multipliers: tuple[Word, ...]
    offsets: tuple[Word, ...]


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class VocabularyEntry:
    """The table from 64-bit raw IDs to positions; see `torchrec_cce.maps.vocabulary`."""

    num_buckets: Positive
    seed: Word
    digest: Sha256
    file: FileEntry
    """`slots`: fixed_size_list<int64>[2], a raw ID and its position; position -1 is an empty slot."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class TableEntry:
    """One CCE table: its map, the codewords that the map points at, and how it was clustered."""

    num_embeddings: Positive
    """Raw IDs that the table has room for."""
    embedding_dim: Positive
    feature_names: tuple[str, ...]
    pooling: Literal["sum", "mean"]
    num_ids: Count
    """`n`: raw IDs of the map, each with its position."""
    num_columns: Positive
    num_rows: Positive
    """`k`: codewords in a codebook."""
    generation: Count
    """Clusterings so far."""
    unseen: Unseen
    codebook_hash: HashFunctions
    helper_hash: HashFunctions
    map_digest: Sha256
    """SHA-256 of everything that decides a lookup: what checkpoints of the weights carry."""
    pointers: FileEntry | None
    """`pointers`: fixed_size_list<uint8, uint16 or uint32>[c], or of pointers of 4 bits, two in a byte,
    fixed_size_list<uint8>[⌈c/2⌉]; None before the first clustering."""
    pointer_dtype: PointerType | None
    vocabulary: VocabularyEntry | None = None
    weights: FileEntry | None = None
    """`weights`: fixed_size_list<float32>[d/c], `2·c·k` rows: row `(2j + p)·k + code` is codeword `code` of column `j`,
    of the codebook (p = 0) or the helper table (p = 1). None where a checkpoint keeps them elsewhere."""
    frequencies: FileEntry | None = None
    """`frequencies`: int64, how often the raw ID of each position was seen."""
    entropies: tuple[FiniteFloat, ...] = ()
    """`H1 … Hc` of the pointers in nats; empty if not recorded."""
    objective: FiniteFloat | None = None
    """Of the clustering: mean over IDs of the squared distance from the old embedding to the new codewords."""
    churn: FiniteFloat | None = None
    """Share of the codebook pointers, over the raw IDs that the parent has too, that differ from the parent's."""

    def __post_init__(self) -> None:
        hashes = (self.codebook_hash, self.helper_hash)
        lengths = {len(part) for functions in hashes for part in (functions.multipliers, functions.offsets)}
        if lengths != {self.num_columns}:
            raise ValueError(f"num_columns={self.num_columns}, but hash functions for {sorted(lengths)} columns")
        if self.embedding_dim % self.num_columns:
            raise ValueError(f"num_columns={self.num_columns} does not divide embedding_dim={self.embedding_dim}")
        if self.num_rows > 2**32:
            raise ValueError(f"num_rows={self.num_rows} is not in 1..2^32")
        if (self.pointers is None) != (self.pointer_dtype is None):
            raise ValueError("pointers and pointer_dtype must both be there or both be null")
        if self.pointer_dtype == "uint4" and self.num_columns == 1:
            raise ValueError("pointer_dtype='uint4' is for two columns or more")
        sizes = {
            "pointers": (self.pointers, self.num_ids),
            "frequencies": (self.frequencies, self.num_ids),
            "weights": (self.weights, 2 * self.num_columns * self.num_rows),
        }
        for name, (entry, expected) in sizes.items():
            if entry is not None and entry.num_values != expected:
                raise ValueError(f"{name} has {entry.num_values} values, not {expected}")

    def files(self) -> Iterator[FileEntry]:
        """All files of the table."""
        vocabulary = None if self.vocabulary is None else self.vocabulary.file
        yield from (entry for entry in (self.pointers, vocabulary, self.weights, self.frequencies) if entry is not None)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Provenance:
    """Where a version came from."""

    code_version: str
    """Of torchrec_cce."""
    checkpoint: str | None = None
    """The training checkpoint that was clustered."""
    config_digest: Sha256 | None = None
    """SHA-256 of the configuration of the run or job."""

    @classmethod
    def of_this_code(cls, *, checkpoint: str | None = None, config_digest: str | None = None) -> "Provenance":
        """With the version of the package that runs."""
        return cls(code_version=package_version("torchrec-cce"), checkpoint=checkpoint, config_digest=config_digest)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Manifest:
    """One version: immutable, and written after all its files."""

    format: Literal[2, 3]
    version: Positive | None
    """Its number in the registry; None in a checkpoint."""
    parent: Positive | None = None
    """The version that was current when this one was made."""
    created: AwareDatetime
    """In UTC."""
    provenance: Provenance
    tables: dict[str, TableEntry]

    def __post_init__(self) -> None:
        if self.format < format_of(self.tables):
            raise ValueError(f"format={self.format} has no pointers of 4 bits; they came with format 3")
        names = [entry.name for entry in self.files()]
        if len(set(names)) < len(names):
            raise ValueError(f"files={sorted(names)} names one twice")

    def files(self) -> list[FileEntry]:
        """All files of the version but the manifest itself."""
        return [entry for table in self.tables.values() for entry in table.files()]

    def to_json(self) -> bytes:
        """The document; equal manifests give equal bytes."""
        content: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return seal(content)

    @classmethod
    def from_json(cls, document: bytes, name: str) -> "Manifest":
        """Read a manifest of this or an earlier format; `name` is that of the document, for messages.

        Raises:
            MapFileError: the document is damaged, no manifest, or of a format that this version does not read.
        """
        return parse(_ADAPTER, document, name, newest_format=FORMAT, oldest_format=OLDEST_FORMAT)


def format_of(tables: Mapping[str, TableEntry]) -> Literal[2, 3]:
    """The oldest format that has all that these tables have."""
    return 3 if any(table.pointer_dtype == "uint4" for table in tables.values()) else 2


_ADAPTER = TypeAdapter(Manifest)
