from .cafe import CafeEmbeddingBagConfig as CafeEmbeddingBagConfig
from .cce import (
    CCEConfig as CCEConfig,
    CCEEmbeddingBagConfig as CCEEmbeddingBagConfig,
    CCEEmbeddingConfig as CCEEmbeddingConfig,
)
from .compositional import (
    CompositionalConfig as CompositionalConfig,
    CompositionalEmbeddingBagConfig as CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig as CompositionalEmbeddingConfig,
)
from .computed import (
    ComputedEmbeddingBagConfig as ComputedEmbeddingBagConfig,
    ComputedTable as ComputedTable,
)
from .factored import (
    LowRankEmbeddingBagConfig as LowRankEmbeddingBagConfig,
    TensorTrainEmbeddingBagConfig as TensorTrainEmbeddingBagConfig,
)
from .quotient_remainder import (
    QuotientRemainderEmbeddingBagConfig as QuotientRemainderEmbeddingBagConfig,
    QuotientRemainderProductEmbeddingBagConfig as QuotientRemainderProductEmbeddingBagConfig,
)
from .registry import (
    METHODS as METHODS,
    Method as Method,
    tables_under_cap as tables_under_cap,
)
from .residents import ResidentConfig as ResidentConfig
from .rowless import (
    DeepHashEmbeddingBagConfig as DeepHashEmbeddingBagConfig,
    RobeEmbeddingBagConfig as RobeEmbeddingBagConfig,
)
from .sketch import SketchEmbeddingBagConfig as SketchEmbeddingBagConfig
from .table import (
    CompressedConfig as CompressedConfig,
    MethodSpec as MethodSpec,
    PointerScheme as PointerScheme,
    Sizing as Sizing,
)
