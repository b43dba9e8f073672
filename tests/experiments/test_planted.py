"""The claim of the method, where the truth is known: clusters that exist are found, and pay."""

import pytest

from torchrec_cce.experiments.demo import prepare
from torchrec_cce.experiments.plan import MethodEntry, Plan
from torchrec_cce.experiments.planted_log import write_click_log
from torchrec_cce.experiments.results import TrialResult, chosen_results
from torchrec_cce.experiments.runner import bench
from torchrec_cce.training.config import RunConfig

Results = dict[str, TrialResult]
"""Of each method."""
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in (1, 2))]
CAP = 4000
PLANTED = ("C3", "C4", "C12", "C16", "C21")
# The runs of a seed take half a minute, and several minutes on a busy machine.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on a log with planted clusters."""
    folder = tmp_path_factory.mktemp("planted")
    write_click_log(folder / "clicks.tsv", num_rows=200_000, seed=0)
    config, _ = prepare(folder / "data", folder / "clicks.tsv", label="label", max_rows=200_000)
    return config


@pytest.fixture(scope="module", params=SEEDS)
def results(request: pytest.FixtureRequest, planted: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Each compressed method from one seed, at the same cap, on one planted log."""
    plan = Plan(
        run=planted,
        methods=(MethodEntry(method="hashing_trick"), MethodEntry(method="ce_concat"), MethodEntry(method="cce")),
        caps=(CAP,),
        seeds=(request.param,),
        learning_rates=(planted.optimizer.embedding_learning_rate,),
    )
    found = bench(plan, tmp_path_factory.mktemp("trials"), show_progress=False)
    return {result.method: result for result in chosen_results(found)}


def test_cce_beats_hashing_at_the_same_trained_parameters(results: Results) -> None:
    cce = results["cce"]
    for method in ("hashing_trick", "ce_concat"):
        other = results[method]
        assert cce.sizes.parameters <= other.sizes.parameters
        assert cce.test_auc > other.test_auc + 0.003
        assert cce.test_bce < other.test_bce - 0.003


def test_pair_entropy_lies_between_collapse_and_random(results: Results) -> None:
    """Collapsed columns say the same, so that a pair has the entropy of one; random ones have that of a hash."""
    for table in PLANTED:
        entropies = results["cce"].entropies[table]
        single, pair = entropies.learned[:2]
        assert 1.5 * single < pair < entropies.random[1] - 0.02


def test_pointers_are_counted(results: Results) -> None:
    cce = results["cce"]
    universes = [table["num_embeddings"] for table in cce.config["tables"].values()]
    compressed = [n for n in universes if n * 16 > CAP]
    assert cce.sizes.pointer_bytes == 4 * sum(compressed)  # 4 columns of uint8, as k = 125
    assert results["ce_concat"].sizes.pointer_bytes == 0
