"""The keys of vocabularies by rows: one copy a host."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.sharding.host_file import HostFile


def share_keys(maps: Iterable[PointerMap]) -> None:
    """Let the ranks of a host share what `raw_ids` needs of each map's vocabulary: 8 bytes an ID, kept with it.

    Every rank calls it, with maps of the same vocabularies.

    Raises:
        ConfigError: on all ranks, if the slots of a vocabulary are damaged.
        OSError: on all ranks, if the cache folder (`TORCHREC_CCE_CACHE`) of one has no room.
    """
    for vocabulary in (one.vocabulary for one in maps):
        if vocabulary is None:
            continue
        lacks = torch.tensor(int(not vocabulary.has_key_of_row))
        dist.all_reduce(lacks, op=dist.ReduceOp.MAX)
        if lacks:
            vocabulary.reading_keys(_written(vocabulary))


def _written(vocabulary: Vocabulary) -> npt.NDArray[np.int64]:
    file = HostFile((vocabulary.num_ids, 1), np.dtype(np.int64))
    return file.filled(lambda keys: vocabulary.keys(keys[:, 0]))[:, 0]
