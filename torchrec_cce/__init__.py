"""Clustered Compositional Embeddings for TorchRec: categorical features with huge universes in tiny tables.

A name is imported when it is first used, so that who only wants maps, or a command's help, does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "METHODS": "budget",
    "CCEEmbeddingBagCollection": "modules.embedding_bag",
    "CCEEmbeddingBagConfig": "config",
    "CCEEmbeddingCollection": "modules.embedding",
    "CCEEmbeddingConfig": "config",
    "CompositionalEmbeddingBagConfig": "config",
    "CompositionalEmbeddingConfig": "config",
    "MapVersion": "maps.registry",
    "Method": "budget",
    "PointerMap": "maps.pointer_map",
    "ReclusterConfig": "clustering.settings",
    "Registry": "maps.registry",
    "TableSnapshot": "maps.snapshot",
    "Vocabulary": "maps.vocabulary",
    "tables_under_cap": "budget",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
