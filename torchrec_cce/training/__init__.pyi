from .config import (
    DeriveSection as DeriveSection,
    EmbeddingConfig as EmbeddingConfig,
    ModelConfig as ModelConfig,
    OptimizerConfig as OptimizerConfig,
    RegistrySection as RegistrySection,
    RunConfig as RunConfig,
    TableConfig as TableConfig,
    TrainingConfig as TrainingConfig,
)
from .data_config import (
    DataConfig as DataConfig,
    SplitConfig as SplitConfig,
)
from .config_file import (
    read_config as read_config,
    read_run_config as read_run_config,
)
from .footprint import (
    Footprint as Footprint,
    footprints as footprints,
    peak_training_bytes as peak_training_bytes,
)
from .loop import (
    RunResult as RunResult,
    evaluate as evaluate,
    train as train,
)
from .metrics import Quality as Quality
from .model import (
    Sizes as Sizes,
    sizes_of as sizes_of,
)
from .parallel import (
    Ranks as Ranks,
    process_group as process_group,
)
from .recluster_config import (
    ReclusterSection as ReclusterSection,
    ResidentsSection as ResidentsSection,
)
