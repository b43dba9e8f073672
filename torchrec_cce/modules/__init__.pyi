from .collection import CCECollection as CCECollection
from .compressed_bag import CompressedEmbeddingBag as CompressedEmbeddingBag
from .embedding import CCEEmbeddingCollection as CCEEmbeddingCollection
from .embedding_bag import CCEEmbeddingBagCollection as CCEEmbeddingBagCollection
from .recluster import TableReport as TableReport
from .remap import Remap as Remap
