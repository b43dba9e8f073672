"""Registries of which a reader can tell whether what it gets is what a publisher meant, and ways to damage them."""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_cce.hashing import derive_seed
from torchrec_cce.maps.journal import RegistryState
from torchrec_cce.maps.manifest import MANIFEST, Manifest
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.vocabulary import Vocabulary

_NUM_KEYS = 500


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The few numbers that a version's tables follow from. Its publisher notes them as the version's checkpoint."""

    seed: int
    num_ids: int
    """Of the larger of two tables."""
    num_columns: int = 8
    """Of that table, of uint16."""
    parent_seed: int | None = None

    @classmethod
    def noted_in(cls, manifest: Manifest) -> "Recipe":
        assert manifest.provenance.checkpoint is not None
        return cls(**json.loads(manifest.provenance.checkpoint))

    @property
    def note(self) -> str:
        return json.dumps(asdict(self))

    def derived(self, token: int) -> "Recipe":
        """The recipe that `token` makes of this one."""
        return replace(self, seed=derive_seed(self.seed, token), parent_seed=self.seed)

    def tables(self) -> dict[str, TableSnapshot]:
        """A large table, and a small one that has all there is: vocabulary, weights and frequencies."""
        rng = np.random.default_rng(self.seed)
        n, c = self.num_ids, self.num_columns
        large = PointerMap.hashed(num_ids=n, num_columns=c, num_rows=1000, seed=self.seed)
        pointers = rng.integers(0, 1000, (n, c), dtype=np.uint16)
        vocabulary = Vocabulary.build(np.unique(rng.integers(-(2**63), 2**63, _NUM_KEYS)), num_threads=1)
        n = vocabulary.num_ids
        small = PointerMap.hashed(num_ids=n, num_columns=2, num_rows=50, seed=self.seed, vocabulary=vocabulary)
        return {
            "large": TableSnapshot(
                pointer_map=large.clustered(pointers, large.next_helper_hash(self.seed)),
                num_embeddings=self.num_ids,
                embedding_dim=c,
                feature_names=("a",),
                pooling="sum",
            ),
            "small": TableSnapshot(
                pointer_map=small.clustered(
                    rng.integers(0, 50, (n, 2), dtype=np.uint8), small.next_helper_hash(self.seed)
                ),
                num_embeddings=n,
                embedding_dim=8,
                feature_names=("b", "c"),
                pooling="mean",
                weights=rng.standard_normal((200, 4), dtype=np.float32),
                frequencies=rng.integers(0, 100, n),
            ),
        }


def content(tables: Mapping[str, TableSnapshot]) -> str:
    """SHA-256 (hex) of all that the tables hold, read anew: no digest that came with them is believed."""
    found = hashlib.sha256()
    for name, table in sorted(tables.items()):
        pointer_map, vocabulary = table.pointer_map, table.pointer_map.vocabulary
        found.update(repr((name, table.feature_names, table.pooling, pointer_map.generation)).encode())
        for functions in (pointer_map.codebook_hash, pointer_map.helper_hash):
            found.update(functions.multipliers.tobytes() + functions.offsets.tobytes())
        arrays = [pointer_map.stored_view, table.weights, table.frequencies]
        arrays += [] if vocabulary is None else [vocabulary.slots_view]
        for array in arrays:
            found.update(b"-" if array is None else np.ascontiguousarray(array).data)
    return found.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Target:
    """A registry that any process can open."""

    url: str
    cache: Path
    options: dict[str, Any] = field(default_factory=dict)

    def open(self) -> Registry:
        return Registry(self.url, cache=self.cache, **self.options)


def broken_links(history: Sequence[RegistryState]) -> list[str]:
    """Descriptions of the records that do not follow from the record before; none for a good history, oldest first."""
    broken = []
    for before, after in zip((RegistryState(), *history), history, strict=False):
        published = after.action == "publish"
        newest = after.versions[-1] if after.versions else None
        links = {
            "sequence": after.sequence == before.sequence + 1,
            "next_version": after.next_version == before.next_version + published,
            "current": after.current in {entry.version for entry in after.versions},
            "numbers": all(entry.version < after.next_version for entry in after.versions),
        }
        if published:
            links |= {
                "number": after.subject == after.current == before.next_version,
                "entry": newest is not None and newest.version == after.subject,
                "parent": newest is not None and newest.parent == before.current,
                "versions": after.versions[:-1] == before.versions,
            }
        elif after.action == "collect":
            links["versions"] = set(after.versions) <= set(before.versions) and after.current == before.current
        elif after.action == "rollback":
            links["versions"] = after.versions == before.versions and after.current == after.subject
        else:
            links["versions"] = len(after.versions) == len(before.versions) and after.current == before.current
        broken += [f"record {after.sequence} ({after.action}): {name}" for name, good in links.items() if not good]
    return broken


def damage(registry: Registry) -> list[str]:
    """Descriptions of all that is wrong in a registry, after reading all of it."""
    opened = registry.open(verify="all")
    wrong = [] if content(opened.tables) == content(Recipe.noted_in(opened.manifest).tables()) else ["other content"]
    return [*wrong, *broken_links(registry.history()), *map(str, registry.verify())]


def strays(registry: Registry, root: Path | None) -> set[str]:
    """Names in a registry's folder `root`, or in its store if None, that belong to no record and no version."""
    if root is None:
        there = {file.name for folder in ("versions", "log") for file in registry._store.objects(folder)}
    else:
        there = {path.relative_to(root).as_posix() for path in root.rglob("*")}
    known = {"versions", "log", "reserve", *(f"log/{record.sequence:020d}.json" for record in registry.history())}
    for entry in registry.state().versions:
        names = [file.name for file in registry.manifest(entry.version).files()]
        known |= {entry.folder, *(f"{entry.folder}/{name}" for name in [MANIFEST, *names])}
    return there - known


def flip(content: bytes, rng: random.Random) -> bytes:
    """`content` with one random bit flipped."""
    position, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
    return content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]


@contextmanager
def flipped(path: Path, rng: random.Random) -> Iterator[None]:
    """While entered, one random bit of a file is flipped in place. The file keeps its modification time."""
    position, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
    _flip(path, position, bit)
    try:
        yield
    finally:
        _flip(path, position, bit)


def _flip(path: Path, position: int, bit: int) -> None:
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ bit]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
