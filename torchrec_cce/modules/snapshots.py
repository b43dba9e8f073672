"""`snapshot_of`: a table as it is published, from its configuration, its map and its weights."""

import numpy as np
import numpy.typing as npt
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.modules.recluster import TableReport


def snapshot_of(
    config: CCEConfig,
    pointer_map: PointerMap,
    *,
    weights: npt.NDArray[np.float32] | None = None,
    frequencies: npt.NDArray[np.int64] | None = None,
    report: TableReport | None = None,
) -> TableSnapshot:
    """One table; see `TableSnapshot` for the parts that may be left out.

    Args:
        report: of the clustering that made the map, whose entropies and objective are kept with it.
    """
    return TableSnapshot(
        pointer_map=pointer_map,
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        feature_names=tuple(config.feature_names),
        # Unpooled embeddings are those of bags of one ID.
        pooling="mean" if isinstance(config, EmbeddingBagConfig) and config.pooling == PoolingType.MEAN else "sum",
        weights=None if weights is None else config.used_codewords(weights),
        frequencies=frequencies,
        entropies=() if report is None else report.entropies,
        objective=None if report is None else report.objective,
    )
