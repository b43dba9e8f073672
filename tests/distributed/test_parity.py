"""Tables on several ranks train as on one process: losses, weights and optimizer state after 20 steps."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.distributed_cases import FORMS, MIXTURES, OTHER_METHODS, TABLES, UNIFORM, WITHOUT_HELPER, Case
from tests.support.launch import on_ranks
from tests.support.parity import Outcome, assert_equal, build_model, compare, on_a_rank

TOLERANCE = 1e-6
CASES = UNIFORM | MIXTURES | FORMS | WITHOUT_HELPER | OTHER_METHODS
OVER_HOSTS = {
    name: case
    for name, case in CASES.items()
    if name.startswith(("table_row_wise, sgd", "table_row_wise, rowwise", "mixed, rowwise"))
}

Outcomes = dict[str, tuple[Outcome, Outcome]]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return compare(tmp_path_factory.mktemp("two"), CASES, world_size=2, local_size=2)


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of two ranks each, as far as TorchRec knows."""
    return compare(tmp_path_factory.mktemp("four"), OVER_HOSTS, world_size=4, local_size=2)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(name: str, two_ranks: Outcomes) -> None:
    assert_equal(two_ranks[name], CASES[name], tolerance=TOLERANCE)


@pytest.mark.parametrize("name", OVER_HOSTS)
def test_two_hosts(name: str, two_hosts: Outcomes) -> None:
    assert_equal(two_hosts[name], CASES[name], tolerance=TOLERANCE)


@pytest.mark.parametrize("name", ["mixed, sgd, sum", "mixed, rowwise_adagrad, sum"])
def test_every_weight_has_moved(name: str, two_ranks: Outcomes) -> None:
    """A comparison of what never moved would prove nothing."""
    start = dict(build_model(CASES[name], torch.device("cpu")).named_parameters())
    _, spread = two_ranks[name]
    for key, value in start.items():
        assert np.abs(spread.weights[key] - value.detach().numpy()).max() > 1000 * TOLERANCE, key


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(placement=dict.fromkeys(TABLES, "data_parallel"), form="variable"), "RuntimeError: "),
        (Case(placement=dict.fromkeys(TABLES, "row_wise"), form="variable"), "RuntimeError: ProcessGroupGloo"),
    ],
    ids=["replicated", "by rows, of other sizes on each rank"],
)
def test_a_variable_batch_that_torchrec_cannot_place(case: Case, message: str, tmp_path: Path) -> None:
    """FBGEMM's dense kernels know no variable batch, and gloo gathers no parts of different sizes: errors on all."""
    for rank in on_ranks(tmp_path, 2, on_a_rank, [case], "cpu", 2):
        assert rank.code == 1
        assert message in rank.stderr
