"""The parity suite on CUDA and NCCL, compared with one process on the CPU."""

import pytest
import torch

from tests.support.distributed_cases import FORMS, MIXTURES, TABLES, UNIFORM, Case
from tests.support.parity import CUDA_TOLERANCE, Outcome, assert_equal, compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no CUDA device"),
]

CASES = {
    **UNIFORM,
    **MIXTURES,
    **FORMS,
    "row_wise, variable": Case(placement=dict.fromkeys(TABLES, "row_wise"), form="variable"),
    "table_row_wise, variable": Case(placement=dict.fromkeys(TABLES, "table_row_wise"), form="variable"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Outcome, Outcome]]:
    """On two devices, or on the only one there is."""
    ranks = min(2, torch.cuda.device_count())
    return compare(tmp_path_factory.mktemp("cuda"), CASES, world_size=ranks, local_size=ranks, device_type="cuda")


@pytest.mark.parametrize("name", CASES)
def test_cuda_ranks(name: str, outcomes: dict[str, tuple[Outcome, Outcome]]) -> None:
    assert_equal(outcomes[name], CASES[name], tolerance=CUDA_TOLERANCE)
