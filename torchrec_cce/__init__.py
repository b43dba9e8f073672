"""Clustered Compositional Embeddings for TorchRec: categorical features with huge universes in tiny tables.

A name is imported when it is first used, so that who only wants maps, or a command's help, does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrec_cce.budget import tables_under_cap
    from torchrec_cce.clustering.settings import ReclusterConfig
    from torchrec_cce.computed_config import (
        DeepHashEmbeddingBagConfig,
        LowRankEmbeddingBagConfig,
        QuotientRemainderProductEmbeddingBagConfig,
        RobeEmbeddingBagConfig,
        SketchEmbeddingBagConfig,
        TensorTrainEmbeddingBagConfig,
    )
    from torchrec_cce.config import (
        CCEEmbeddingBagConfig,
        CCEEmbeddingConfig,
        CompositionalEmbeddingBagConfig,
        CompositionalEmbeddingConfig,
        QuotientRemainderEmbeddingBagConfig,
    )
    from torchrec_cce.maps.pointer_map import PointerMap
    from torchrec_cce.maps.registry import MapVersion, Registry
    from torchrec_cce.maps.snapshot import TableSnapshot
    from torchrec_cce.maps.vocabulary import Vocabulary
    from torchrec_cce.modules.bag import CompressedEmbeddingBag
    from torchrec_cce.modules.embedding import CCEEmbeddingCollection
    from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection
    from torchrec_cce.sizing import METHODS, Method

__all__ = [
    "METHODS",
    "CCEEmbeddingBagCollection",
    "CCEEmbeddingBagConfig",
    "CCEEmbeddingCollection",
    "CCEEmbeddingConfig",
    "CompositionalEmbeddingBagConfig",
    "CompositionalEmbeddingConfig",
    "CompressedEmbeddingBag",
    "DeepHashEmbeddingBagConfig",
    "LowRankEmbeddingBagConfig",
    "MapVersion",
    "Method",
    "PointerMap",
    "QuotientRemainderEmbeddingBagConfig",
    "QuotientRemainderProductEmbeddingBagConfig",
    "ReclusterConfig",
    "Registry",
    "RobeEmbeddingBagConfig",
    "SketchEmbeddingBagConfig",
    "TableSnapshot",
    "TensorTrainEmbeddingBagConfig",
    "Vocabulary",
    "tables_under_cap",
]

_HOMES = {
    "METHODS": "sizing",
    "CCEEmbeddingBagCollection": "modules.embedding_bag",
    "CCEEmbeddingBagConfig": "config",
    "CCEEmbeddingCollection": "modules.embedding",
    "CCEEmbeddingConfig": "config",
    "CompositionalEmbeddingBagConfig": "config",
    "CompositionalEmbeddingConfig": "config",
    "CompressedEmbeddingBag": "modules.bag",
    "DeepHashEmbeddingBagConfig": "computed_config",
    "LowRankEmbeddingBagConfig": "computed_config",
    "MapVersion": "maps.registry",
    "Method": "sizing",
    "PointerMap": "maps.pointer_map",
    "QuotientRemainderEmbeddingBagConfig": "config",
    "QuotientRemainderProductEmbeddingBagConfig": "computed_config",
    "ReclusterConfig": "clustering.settings",
    "Registry": "maps.registry",
    "RobeEmbeddingBagConfig": "computed_config",
    "SketchEmbeddingBagConfig": "computed_config",
    "TableSnapshot": "maps.snapshot",
    "TensorTrainEmbeddingBagConfig": "computed_config",
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
