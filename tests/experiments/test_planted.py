"""The claim of the method, where the truth is known: clusters that exist are found, and pay."""

import pytest

from torchrec_cce.experiments.demo import prepare
from torchrec_cce.experiments.plan import MethodEntry, Plan
from torchrec_cce.experiments.planted_log import write_click_log
from torchrec_cce.experiments.results import TrialResult, chosen_results
from torchrec_cce.experiments.runner import bench

SEEDS = (0, 1, 2)
CAP = 4000
PLANTED = ("C3", "C4", "C12", "C16", "C21")
# The runs of all tests take a minute, and several on a busy machine.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], TrialResult]:
    """Each compressed method from three seeds, at the same cap, on one planted log."""
    folder = tmp_path_factory.mktemp("planted")
    write_click_log(folder / "clicks.tsv", num_rows=200_000, seed=0)
    base, _ = prepare(folder / "data", folder / "clicks.tsv", label="label", max_rows=200_000)
    plan = Plan(
        run=base,
        methods=(MethodEntry(method="hashing_trick"), MethodEntry(method="ce_concat"), MethodEntry(method="cce")),
        caps=(CAP,),
        seeds=SEEDS,
        learning_rates=(base.optimizer.embedding_learning_rate,),
    )
    found = chosen_results(bench(plan, folder, workers=2, show_progress=False))
    return {(result.method, result.seed): result for result in found}


@pytest.mark.parametrize("seed", SEEDS)
def test_cce_beats_hashing_at_the_same_trained_parameters(
    results: dict[tuple[str, int], TrialResult], seed: int
) -> None:
    cce = results["cce", seed]
    for method in ("hashing_trick", "ce_concat"):
        other = results[method, seed]
        assert cce.sizes.parameters <= other.sizes.parameters
        assert cce.test_auc > other.test_auc + 0.003
        assert cce.test_bce < other.test_bce - 0.003


@pytest.mark.parametrize("seed", SEEDS)
def test_pair_entropy_lies_between_collapse_and_random(results: dict[tuple[str, int], TrialResult], seed: int) -> None:
    """Collapsed columns say the same, so that a pair has the entropy of one; random ones have that of a hash."""
    for table in PLANTED:
        entropies = results["cce", seed].entropies[table]
        single, pair = entropies.learned[:2]
        assert 1.5 * single < pair < entropies.random[1] - 0.02


def test_pointers_are_counted(results: dict[tuple[str, int], TrialResult]) -> None:
    cce = results["cce", 0]
    universes = [table["num_embeddings"] for table in cce.config["tables"].values()]
    compressed = [n for n in universes if n * 16 > CAP]
    assert cce.sizes.pointer_bytes == 4 * sum(compressed)  # 4 columns of uint8, as k = 125
    assert results["ce_concat", 0].sizes.pointer_bytes == 0
