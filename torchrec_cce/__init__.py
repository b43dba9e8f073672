"""Clustered Compositional Embeddings for TorchRec: categorical features with huge universes in tiny tables.

A name is imported when it is first used, so that who only wants maps, or a command's help, does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrec_cce.clustering.settings import ReclusterConfig
    from torchrec_cce.maps.pointer_map import PointerMap
    from torchrec_cce.maps.registry import MapVersion, Registry
    from torchrec_cce.maps.snapshot import TableSnapshot
    from torchrec_cce.maps.vocabulary import Vocabulary
    from torchrec_cce.methods.cce import CCEEmbeddingBagConfig, CCEEmbeddingConfig
    from torchrec_cce.methods.compositional import CompositionalEmbeddingBagConfig, CompositionalEmbeddingConfig
    from torchrec_cce.methods.deep_hash import DeepHashEmbeddingBagConfig
    from torchrec_cce.methods.low_rank import LowRankEmbeddingBagConfig
    from torchrec_cce.methods.quotient_remainder import (
        QuotientRemainderEmbeddingBagConfig,
        QuotientRemainderProductEmbeddingBagConfig,
    )
    from torchrec_cce.methods.registry import METHODS, Method, tables_under_cap
    from torchrec_cce.methods.robe import RobeEmbeddingBagConfig
    from torchrec_cce.methods.sketch import SketchEmbeddingBagConfig
    from torchrec_cce.methods.tensor_train import TensorTrainEmbeddingBagConfig
    from torchrec_cce.modules.bag import CompressedEmbeddingBag
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
    "METHODS": "methods.registry",
    "CCEEmbeddingBagCollection": "modules.embedding_bag",
    "CCEEmbeddingBagConfig": "methods.cce",
    "CCEEmbeddingCollection": "modules.embedding",
    "CCEEmbeddingConfig": "methods.cce",
    "CompositionalEmbeddingBagConfig": "methods.compositional",
    "CompositionalEmbeddingConfig": "methods.compositional",
    "CompressedEmbeddingBag": "modules.bag",
    "DeepHashEmbeddingBagConfig": "methods.deep_hash",
    "LowRankEmbeddingBagConfig": "methods.low_rank",
    "MapVersion": "maps.registry",
    "Method": "methods.registry",
    "PointerMap": "maps.pointer_map",
    "QuotientRemainderEmbeddingBagConfig": "methods.quotient_remainder",
    "QuotientRemainderProductEmbeddingBagConfig": "methods.quotient_remainder",
    "ReclusterConfig": "clustering.settings",
    "Registry": "maps.registry",
    "RobeEmbeddingBagConfig": "methods.robe",
    "SketchEmbeddingBagConfig": "methods.sketch",
    "TableSnapshot": "maps.snapshot",
    "TensorTrainEmbeddingBagConfig": "methods.tensor_train",
    "Vocabulary": "maps.vocabulary",
    "tables_under_cap": "methods.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
