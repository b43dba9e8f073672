from .admit import (
    admit_sharded as admit_sharded,
    top_up_sharded as top_up_sharded,
)
from .agreement import (
    on_all_ranks as on_all_ranks,
    on_first_rank as on_first_rank,
)
from .constraints import column_constraints as column_constraints
from .distributed_checkpoint import load_checkpoint as load_checkpoint
from .estimates import (
    PlanSummary as PlanSummary,
    TableSummary as TableSummary,
)
from .frequencies import ShardedFrequencies as ShardedFrequencies
from .pipeline import (
    RowCollate as RowCollate,
    drain as drain,
)
from .planner import (
    CCEShardingPlanner as CCEShardingPlanner,
    planning_topology as planning_topology,
)
from .recluster import (
    adopt_sharded as adopt_sharded,
    recluster_sharded as recluster_sharded,
)
from .sharders import (
    CCEEmbeddingBagCollectionSharder as CCEEmbeddingBagCollectionSharder,
    CCEEmbeddingCollectionSharder as CCEEmbeddingCollectionSharder,
    get_cce_sharders as get_cce_sharders,
)
from .tables import ShardedMaps as ShardedMaps
from .watch import (
    Adoption as Adoption,
    VersionWatcher as VersionWatcher,
)
