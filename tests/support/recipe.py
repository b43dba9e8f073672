"""Tables that follow from a few numbers, so that a reader can tell whether it got what the publisher meant."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from torchrec_cce.hashing import derive_seed
from torchrec_cce.maps.manifest import Manifest
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.vocabulary import Vocabulary

_NUM_KEYS = 500


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a version is made from, and where it came from; its publisher notes it as the version's checkpoint."""

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
