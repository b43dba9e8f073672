from ._version import __version__ as __version__
from .clustering.settings import ReclusterConfig as ReclusterConfig
from .data.vocabulary import build_vocabulary as build_vocabulary
from .maps.pointer_map import PointerMap as PointerMap
from .maps.registry import (
    MapVersion as MapVersion,
    Registry as Registry,
)
from .maps.snapshot import TableSnapshot as TableSnapshot
from .maps.vocabulary import Vocabulary as Vocabulary
from .methods.cafe import CafeEmbeddingBagConfig as CafeEmbeddingBagConfig
from .methods.cce import (
    CCEEmbeddingBagConfig as CCEEmbeddingBagConfig,
    CCEEmbeddingConfig as CCEEmbeddingConfig,
)
from .methods.compositional import (
    CompositionalEmbeddingBagConfig as CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig as CompositionalEmbeddingConfig,
)
from .methods.factored import (
    LowRankEmbeddingBagConfig as LowRankEmbeddingBagConfig,
    TensorTrainEmbeddingBagConfig as TensorTrainEmbeddingBagConfig,
)
from .methods.quotient_remainder import (
    QuotientRemainderEmbeddingBagConfig as QuotientRemainderEmbeddingBagConfig,
    QuotientRemainderProductEmbeddingBagConfig as QuotientRemainderProductEmbeddingBagConfig,
)
from .methods.registry import (
    METHODS as METHODS,
    Method as Method,
    tables_under_cap as tables_under_cap,
)
from .methods.residents import ResidentConfig as ResidentConfig
from .methods.rowless import (
    DeepHashEmbeddingBagConfig as DeepHashEmbeddingBagConfig,
    RobeEmbeddingBagConfig as RobeEmbeddingBagConfig,
)
from .methods.sketch import SketchEmbeddingBagConfig as SketchEmbeddingBagConfig
from .modules.compressed_bag import CompressedEmbeddingBag as CompressedEmbeddingBag
from .modules.embedding import CCEEmbeddingCollection as CCEEmbeddingCollection
from .modules.embedding_bag import CCEEmbeddingBagCollection as CCEEmbeddingBagCollection
from .modules.stock_state import stock_state_dict as stock_state_dict
from .training.saved_model import (
    load_model as load_model,
    save_model as save_model,
)
