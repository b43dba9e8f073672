"""The pipelines on CUDA and NCCL, where their stages are streams of their own."""

from pathlib import Path

import pytest
import torch

from tests.support.parity import CUDA_TOLERANCE
from tests.support.pipelines import assert_all_ways_were_taken, assert_same, in_every_way

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no CUDA device"),
]


def test_pipelined_training_is_unpipelined_training(tmp_path: Path) -> None:
    trained = in_every_way(tmp_path, world_size=min(2, torch.cuda.device_count()), device_type="cuda")
    assert_all_ways_were_taken(trained)
    for way in trained[0]:
        assert_same(way, trained, tolerance=CUDA_TOLERANCE)
