"""Clustered Compositional Embeddings for TorchRec: categorical features with huge universes in tiny tables."""

from torchrec_cce.budget import METHODS, Method, tables_under_cap
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.config import (
    CCEEmbeddingBagConfig,
    CCEEmbeddingConfig,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig,
)
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.modules.embedding import CCEEmbeddingCollection
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection

__all__ = [
    "METHODS",
    "CCEEmbeddingBagCollection",
    "CCEEmbeddingBagConfig",
    "CCEEmbeddingCollection",
    "CCEEmbeddingConfig",
    "CompositionalEmbeddingBagConfig",
    "CompositionalEmbeddingConfig",
    "MapVersion",
    "Method",
    "PointerMap",
    "ReclusterConfig",
    "Registry",
    "TableSnapshot",
    "Vocabulary",
    "tables_under_cap",
]
