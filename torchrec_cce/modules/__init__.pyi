from .collection import CCECollection as CCECollection
from .embedding import CCEEmbeddingCollection as CCEEmbeddingCollection
from .embedding_bag import (
    CCEEmbeddingBagCollection as CCEEmbeddingBagCollection,
    CompressedEmbeddingBag as CompressedEmbeddingBag,
)
from .recluster import TableReport as TableReport
from .remap import Remap as Remap
