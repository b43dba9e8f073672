"""Keys of vocabularies that the ranks of a host share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from tests.support.launch import on_ranks
from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.sharding.host_file import share_keys
from torchrec_cce.training.parallel import process_group

KEYS = np.random.default_rng(0).permutation(np.arange(-3000, 3000))


def keyed() -> PointerMap:
    plain = PointerMap.hashed(num_ids=len(KEYS), num_columns=2, num_rows=10, seed=0)
    return plain.with_vocabulary(Vocabulary.build(KEYS, num_threads=1))


def inode_of(array: npt.NDArray[np.int64]) -> str:
    """Of the file that `array` is mapped from; 0 if it is private memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= array.ctypes.data < stop:
            return inode
    raise AssertionError("not in memory")


def share_on_a_rank() -> tuple[str, bool, str]:
    """The file of the keys, whether all are right and stay, and what damaged slots are called."""
    with process_group():
        one = keyed()
        assert one.vocabulary is not None
        if dist.get_rank() == 1:
            _ = one.raw_ids(np.arange(3))  # as a rank that has published
        share_keys([one, PointerMap.hashed(num_ids=3, num_columns=1, num_rows=2, seed=0)])
        shared = one.vocabulary.key_of_position
        share_keys([one])
        right = np.array_equal(one.raw_ids(np.arange(len(KEYS))), KEYS) and one.vocabulary.key_of_position is shared
        try:
            share_keys([replace(one, vocabulary=replace(one.vocabulary, num_ids=len(KEYS) - 1), num_ids=len(KEYS) - 1)])
        except ConfigError as error:
            return inode_of(shared), right, str(error)
        raise AssertionError("damaged slots went unnoticed")


def test_one_copy_a_host(tmp_path: Path) -> None:
    ranks = on_ranks(tmp_path, 2, share_on_a_rank)
    for rank in ranks:
        assert rank.code == 0, rank.stderr
        inode, right, message = rank.value
        assert inode == ranks[0].value[0] != "0"
        assert right
        assert "the slots do not hold the positions 0..5998" in message
