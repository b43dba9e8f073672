from .batches import (
    global_batches as global_batches,
    prefetch as prefetch,
    rank_part as rank_part,
)
from .criteo import (
    KAGGLE_UNIVERSES as KAGGLE_UNIVERSES,
    read_criteo as read_criteo,
)
from .parquet import (
    num_rows as num_rows,
    read_parquet as read_parquet,
    write_parquet as write_parquet,
)
from .remapped import (
    RemappedLog as RemappedLog,
    read_remapped as read_remapped,
)
from .remapped_format import (
    RemappedFeature as RemappedFeature,
    RemappedFormat as RemappedFormat,
    codes_of as codes_of,
)
from .rows import (
    Column as Column,
    Rows as Rows,
    bound as bound,
    concat as concat,
    to_batch as to_batch,
)
from .tsv import (
    CATEGORICAL_FEATURES as CATEGORICAL_FEATURES,
    DENSE_FEATURES as DENSE_FEATURES,
)
from .vocabulary import (
    BuiltVocabulary as BuiltVocabulary,
    VocabularyReport as VocabularyReport,
    build_vocabulary as build_vocabulary,
)
