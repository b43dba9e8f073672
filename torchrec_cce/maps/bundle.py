"""The files of a version: written from snapshots front to back, and memory-mapped back into snapshots.

A bundle is a folder, or whatever else takes named files; the manifest is written last.
"""

import hashlib
import stat
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_cce.errors import ConfigError, MapFileError
from torchrec_cce.hashing import UniversalHash
from torchrec_cce.maps.arrow_file import Sink, list_array, numbers, read_array, write_array
from torchrec_cce.maps.kept import note_kept
from torchrec_cce.maps.manifest import (
    MANIFEST,
    FileEntry,
    HashFunctions,
    Manifest,
    Provenance,
    TableEntry,
    VocabularyEntry,
    format_of,
)
from torchrec_cce.maps.pointer_format import PointerFormat
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.sealed import sha256_of
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.vocabulary import Vocabulary

_CHUNK = 1 << 18

OpenFile = Callable[[str], AbstractContextManager[Sink]]
"""From a file's name to something to write it to; it is there when the context ends well."""


def write_bundle(
    open_file: OpenFile,
    tables: Mapping[str, TableSnapshot],
    *,
    provenance: Provenance,
    version: int | None = None,
    parent: int | None = None,
    churn: Mapping[str, float] | None = None,
) -> Manifest:
    """Write all files of `tables`, then the manifest. Memory stays below some 10 MiB beyond the snapshots."""
    entries = {
        name: _write_table(open_file, f"{number:04d}", table, (churn or {}).get(name))
        for number, (name, table) in enumerate(tables.items())
    }
    manifest = Manifest(
        format=format_of(entries),
        version=version,
        parent=parent,
        created=datetime.now(timezone.utc),
        provenance=provenance,
        tables=entries,
    )
    with open_file(MANIFEST) as sink:
        sink.write(memoryview(manifest.to_json()))
    return manifest


def write_folder(folder: Path, tables: Mapping[str, TableSnapshot], *, provenance: Provenance) -> Manifest:
    """Write a bundle to a new local folder."""
    folder.mkdir(parents=True)
    manifest = write_bundle(lambda name: (folder / name).open("wb"), tables, provenance=provenance)
    note_kept(tables)
    return manifest


def read_folder(folder: Path) -> tuple[Manifest, dict[str, TableSnapshot]]:
    """Read a bundle with all its digests checked.

    Raises:
        FileNotFoundError: there is no manifest.
        MapFileError: a file is missing or damaged.
    """
    path = folder / MANIFEST
    manifest = Manifest.from_json(path.read_bytes(), str(path))
    for entry in manifest.files():
        check_file(folder / entry.name, entry)
    tables = read_tables(folder, manifest)
    check_content(tables, None, str(folder))
    return manifest, tables


def read_tables(folder: Path, manifest: Manifest) -> dict[str, TableSnapshot]:
    """Memory-map the tables of a bundle whose files have been checked: no array is copied.

    Raises:
        MapFileError: a file is not what the manifest says.
    """
    try:
        tables = {name: _read_table(folder, entry, manifest.version) for name, entry in manifest.tables.items()}
    except ConfigError as error:
        raise MapFileError(f"{folder}: {error}; copy or publish it again") from error
    note_kept(tables)
    return tables


def check_file(path: Path, entry: FileEntry) -> None:
    """Read all of a file and compare it with its entry.

    Raises:
        MapFileError: it is missing, cut short or damaged.
    """
    try:
        found_stat = path.stat()
        num_bytes = found_stat.st_size
        # Neither a pipe, which would be waited for, nor a file that is longer than it should be, is read.
        is_readable = stat.S_ISREG(found_stat.st_mode) and num_bytes == entry.num_bytes
        found = sha256_of(path) if is_readable else "not read"
    except FileNotFoundError as error:
        raise MapFileError(f"{path}: no such file, but the manifest names it; copy or publish it again") from error
    if (found, num_bytes) != (entry.sha256, entry.num_bytes):
        raise MapFileError(
            f"{path}: {num_bytes} bytes with SHA-256 {found[:12]}, recorded are {entry.num_bytes} with "
            f"{entry.sha256[:12]}; the file is damaged, copy or publish it again"
        )


def check_content(tables: Mapping[str, TableSnapshot], manifest: Manifest | None, name: str) -> None:
    """Look at what decides lookups, which compiled loops take without a check: every code and every position.

    Args:
        manifest: whose digests of maps and vocabularies are compared too; None where files were just compared.
        name: of the folder, for messages.

    Raises:
        MapFileError: a code is not that of a codeword, a position not that of an ID, or a map has another digest.
    """
    for table, snapshot in tables.items():
        pointer_map, vocabulary = snapshot.pointer_map, snapshot.pointer_map.vocabulary
        if pointer_map.stored is not None and 1 << pointer_map.pointer_format.bits > pointer_map.num_rows:
            _check_range(f"{name}: table {table!r}: pointers", pointer_map.learned_codes, 0, pointer_map.num_rows)
        if vocabulary is not None:
            _check_range(f"{name}: table {table!r}: positions", vocabulary.slots_view[:, 1], -1, vocabulary.num_ids)
        if manifest is None:
            continue
        entry = manifest.tables[table]
        anew = None if vocabulary is None else replace(vocabulary)  # copies that nobody has vouched for
        digests = [(replace(pointer_map, vocabulary=anew).digest, entry.map_digest)]
        if anew is not None and entry.vocabulary is not None:
            digests.append((anew.digest, entry.vocabulary.digest))
        for found, recorded in digests:
            if found != recorded:
                raise MapFileError(
                    f"{name}: table {table!r}: the digest of its map or vocabulary is {found[:12]}, recorded is "
                    f"{recorded[:12]}; whoever wrote the manifest was wrong, publish another version"
                )


def _check_range(what: str, numbers: Any, first: int, end: int) -> None:
    """Raise MapFileError if some of `numbers: [n, …]` are not in first..end - 1."""
    for start in range(0, numbers.shape[0], _CHUNK):
        part = numbers[start : start + _CHUNK]
        smallest, largest = int(part.min()), int(part.max())
        if smallest < first or largest >= end:
            raise MapFileError(
                f"{what} of {smallest if smallest < first else largest}, which is not in {first}..{end - 1}; whoever "
                "wrote them was wrong, publish another version"
            )


class _Tee:
    """A sink that hashes and counts what goes to another."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: memoryview) -> None:
        self.sha256.update(data)
        self.num_bytes += len(data)
        self._sink.write(data)


def _write_table(open_file: OpenFile, prefix: str, table: TableSnapshot, churn: float | None) -> TableEntry:
    def write(name: str, array: pa.Array, metadata: Mapping[str, str] | None = None) -> FileEntry:
        file_name = f"{prefix}.{name}.arrow"
        with open_file(file_name) as sink:
            tee = _Tee(sink)
            write_array(tee, name, array, metadata)
        return FileEntry(name=file_name, sha256=tee.sha256.hexdigest(), num_bytes=tee.num_bytes, num_values=len(array))

    pointer_map, vocabulary = table.pointer_map, table.pointer_map.vocabulary
    weights, frequencies = table.weights, table.frequencies
    stored, form = pointer_map.stored, None if pointer_map.stored is None else pointer_map.pointer_format
    # Whoever reads the file without the manifest sees lists of bytes, which are not codes.
    packing = {"pointer_bits": str(form.bits)} if form is not None and form.nibbles else None
    return TableEntry(
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        feature_names=tuple(table.feature_names),
        pooling=table.pooling,
        num_ids=pointer_map.num_ids,
        num_columns=pointer_map.num_columns,
        num_rows=pointer_map.num_rows,
        generation=pointer_map.generation,
        unseen=pointer_map.unseen,
        codebook_hash=_functions(pointer_map.codebook_hash),
        helper_hash=_functions(pointer_map.helper_hash),
        map_digest=pointer_map.digest,
        pointers=None if stored is None else write("pointers", stored, packing),
        pointer_dtype=None if form is None else form.name,
        vocabulary=None
        if vocabulary is None
        else VocabularyEntry(
            num_buckets=vocabulary.num_buckets,
            seed=vocabulary.seed,
            digest=vocabulary.digest,
            file=write("slots", vocabulary.slots),
        ),
        weights=None if weights is None else write("weights", list_array(weights)),
        frequencies=None if frequencies is None else write("frequencies", pa.array(frequencies)),
        entropies=table.entropies,
        objective=table.objective,
        churn=churn,
    )


def _read_table(folder: Path, entry: TableEntry, version: int | None) -> TableSnapshot:
    stored, vocabulary = None, None
    if entry.pointers is not None and entry.pointer_dtype is not None:
        form = PointerFormat.named(entry.pointer_dtype, num_columns=entry.num_columns)
        stored = _read(folder, entry.pointers, "pointers", form.arrow_type)
    if entry.vocabulary is not None:
        slots = _read(folder, entry.vocabulary.file, "slots", pa.list_(pa.int64(), 2))
        vocabulary = Vocabulary(
            slots=slots, num_ids=entry.num_ids, num_buckets=entry.vocabulary.num_buckets, seed=entry.vocabulary.seed
        )
        vocabulary = vocabulary.vouched(entry.vocabulary.digest)
    pointer_map = PointerMap(
        num_ids=entry.num_ids,
        codebook_hash=_universal_hash(entry.codebook_hash, entry.num_rows),
        helper_hash=_universal_hash(entry.helper_hash, entry.num_rows),
        stored=stored,
        generation=entry.generation,
        vocabulary=vocabulary,
        unseen=entry.unseen,
        version=version,
    ).vouched(entry.map_digest)
    weights, frequencies = None, None
    if entry.weights is not None:
        width = entry.embedding_dim // entry.num_columns
        array = _read(folder, entry.weights, "weights", pa.list_(pa.float32(), width))
        weights = numbers(array.values).reshape(-1, width)
    if entry.frequencies is not None:
        frequencies = numbers(_read(folder, entry.frequencies, "frequencies", pa.int64()))
    return TableSnapshot(
        pointer_map=pointer_map,
        num_embeddings=entry.num_embeddings,
        embedding_dim=entry.embedding_dim,
        feature_names=entry.feature_names,
        pooling=entry.pooling,
        weights=weights,
        frequencies=frequencies,
        entropies=entry.entropies,
        objective=entry.objective,
    )


def _read(folder: Path, entry: FileEntry, name: str, kind: pa.DataType) -> pa.Array:
    return read_array(folder / entry.name, name, kind, entry.num_values)


def _functions(functions: UniversalHash) -> HashFunctions:
    return HashFunctions(multipliers=tuple(functions.multipliers.tolist()), offsets=tuple(functions.offsets.tolist()))


def _universal_hash(functions: HashFunctions, num_rows: int) -> UniversalHash:
    return UniversalHash(
        multipliers=np.array(functions.multipliers, np.uint64),
        offsets=np.array(functions.offsets, np.uint64),
        num_rows=num_rows,
    )
