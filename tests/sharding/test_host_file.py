"""Arrays in files that ranks share. What recluster makes of them is in test_recluster.py."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch.distributed as dist

from tests.support.launch import on_ranks
from torchrec_cce.sharding.host_file import HostFile
from torchrec_cce.training.parallel import process_group


def write_on_a_rank(
    folders: tuple[str, ...], num_rows: int
) -> tuple[list[tuple[int, int]], list[npt.NDArray[np.int64]]]:
    """What a rank maps after each of two rounds, in which every rank adds its number plus one to its share."""
    rank = int(os.environ["RANK"])
    with process_group():
        file = HostFile((num_rows, 2), np.dtype(np.int64), Path(folders[rank % len(folders)]))
        _, _, ours = file.ours()
        whole, seen = file.whole(), []
        for _ in range(2):
            ours += rank + 1
            dist.barrier()
            seen.append(np.array(whole))
            dist.barrier()
        return file.host_bounds, seen


@pytest.mark.parametrize(("world_size", "hosts", "num_rows"), [(1, 1, 5), (2, 1, 7), (3, 2, 7), (4, 1, 2)])
def test_the_ranks_of_a_host_share_its_rows(tmp_path: Path, world_size: int, hosts: int, num_rows: int) -> None:
    folders = tuple(str(tmp_path / f"host-{host}") for host in range(hosts))
    for number, rank in enumerate(on_ranks(tmp_path, world_size, write_on_a_rank, folders, num_rows)):
        assert rank.code == 0, rank.stderr
        bounds, seen = rank.value
        here = range(number % hosts, world_size, hosts)
        assert [bounds[r] for r in here] == [
            (num_rows * i // len(here), num_rows * (i + 1) // len(here)) for i in range(len(here))
        ]
        first = np.concatenate([np.full((bounds[r][1] - bounds[r][0], 2), r + 1) for r in here])
        for times, found in enumerate(seen, start=1):
            np.testing.assert_array_equal(found, times * first)
