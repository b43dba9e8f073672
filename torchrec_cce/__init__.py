"""Clustered Compositional Embeddings for TorchRec: categorical features with huge universes in tiny tables."""

from torchrec_cce.budget import METHODS, Method, tables_under_cap
from torchrec_cce.clustering.recluster import ReclusterConfig
from torchrec_cce.config import CCEEmbeddingBagConfig, CompositionalEmbeddingBagConfig
from torchrec_cce.maps.files import read_pointer_map, write_pointer_map
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection

__all__ = [
    "METHODS",
    "CCEEmbeddingBagCollection",
    "CCEEmbeddingBagConfig",
    "CompositionalEmbeddingBagConfig",
    "Method",
    "PointerMap",
    "ReclusterConfig",
    "read_pointer_map",
    "tables_under_cap",
    "write_pointer_map",
]
