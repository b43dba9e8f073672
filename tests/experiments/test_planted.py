"""The claim of the method, where the truth is known: clusters that exist are found, and pay."""

import json
from pathlib import Path

import pytest

from torchrec_cce.experiments.bench import bench, chosen_outcomes
from torchrec_cce.experiments.demo import prepare
from torchrec_cce.experiments.outcome import Outcome
from torchrec_cce.experiments.plan import MethodEntry, Plan
from torchrec_cce.experiments.planted_log import write_click_log

SEEDS = (0, 1, 2)
CAP = 4000
PLANTED = ("C3", "C4", "C12", "C16", "C21")
# The runs of all tests take a minute, and several on a busy machine.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Outcome]:
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
    found = chosen_outcomes(bench(plan, folder, workers=2, show_progress=False))
    return {(outcome.method, outcome.seed): outcome for outcome in found}


@pytest.mark.parametrize("seed", SEEDS)
def test_cce_beats_hashing_at_the_same_trained_parameters(outcomes: dict[tuple[str, int], Outcome], seed: int) -> None:
    cce = outcomes["cce", seed]
    for method in ("hashing_trick", "ce_concat"):
        other = outcomes[method, seed]
        assert cce.sizes.parameters <= other.sizes.parameters
        assert cce.auc > other.auc + 0.003
        assert cce.bce < other.bce - 0.003


@pytest.mark.parametrize("seed", SEEDS)
def test_pair_entropy_lies_between_collapse_and_random(outcomes: dict[tuple[str, int], Outcome], seed: int) -> None:
    """Collapsed columns say the same, so that a pair has the entropy of one; random ones have that of a hash."""
    for table in PLANTED:
        entropies = outcomes["cce", seed].entropies[table]
        single, pair = entropies.learned[:2]
        assert 1.5 * single < pair < entropies.random[1] - 0.02


def test_pointers_are_counted(outcomes: dict[tuple[str, int], Outcome]) -> None:
    cce = outcomes["cce", 0]
    tables = json.loads((Path(cce.run_dir) / "config.json").read_text())["tables"]
    universes = [table["num_embeddings"] for table in tables.values()]
    compressed = [n for n in universes if n * 16 > CAP]
    assert cce.sizes.pointer_bytes == 4 * sum(compressed)  # 4 columns of uint8, as k = 125
    assert outcomes["ce_concat", 0].sizes.pointer_bytes == 0
