"""Which runs a comparison makes, and what it takes from them; training itself is replaced."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.outcomes import SIZES
from tests.training import runs
from torchrec_cce.errors import ConfigError
from torchrec_cce.training import compare as module
from torchrec_cce.training.compare import compare
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.loop import RunResult


class FakeTraining:
    """Validation BCE by learning rate; the test split says the opposite, so that choosing by it would show."""

    def __init__(self, losses: dict[str, dict[float, float]]) -> None:
        self.losses = losses
        self.configs: list[RunConfig] = []

    def __call__(self, config: RunConfig, run_dir: Path, **_: Any) -> RunResult:
        self.configs.append(config)
        loss = self.losses[config.embedding.method][config.optimizer.embedding_learning_rate]
        best = {"validation_bce": loss, "test_bce": 1 - loss, "test_auc": loss}
        return RunResult(
            best=None if math.isnan(loss) else best,
            steps=10,
            rows_per_second=1.0,
            recluster_seconds=0.0,
            entropies={"C1": (1.0, 2.0, 3.0, 4.0)} if config.embedding.method == "cce" else {},
            sizes=SIZES,
            interrupted=False,
            checkpoint=str(run_dir),
        )


@pytest.fixture
def base(tmp_path: Path) -> RunConfig:
    return runs.criteo_config(tmp_path / "log.tsv")


def run(monkeypatch: pytest.MonkeyPatch, base: RunConfig, folder: Path, **changes: Any) -> tuple[FakeTraining, Any]:
    fake = FakeTraining(
        {
            "full": {0.1: 0.5, 0.2: 0.4, 0.3: math.nan},
            "cce": {0.1: 0.45, 0.2: 0.46, 0.3: math.nan},
        }
    )
    monkeypatch.setattr(module, "train", fake)
    arguments: dict[str, Any] = {
        "methods": ["full", "cce"],
        "caps": [800],
        "seeds": [7, 8],
        "learning_rates": [0.3, 0.1, 0.2],
        "show_progress": False,
        **changes,
    }
    return fake, compare(base, folder=folder, **arguments)


def test_each_method_gets_the_learning_rate_of_its_lowest_validation_loss(
    monkeypatch: pytest.MonkeyPatch, base: RunConfig, tmp_path: Path
) -> None:
    """0.3 comes first and diverges: NaN is below nothing, and must not win because of that."""
    fake, outcomes = run(monkeypatch, base, tmp_path)
    assert [(o.method, o.max_parameters, o.seed, o.learning_rate) for o in outcomes] == [
        ("full", None, 7, 0.2),
        ("full", None, 8, 0.2),
        ("cce", 800, 7, 0.1),
        ("cce", 800, 8, 0.1),
    ]
    assert [o.validation_bce for o in outcomes] == [0.4, 0.4, 0.45, 0.45]
    assert [o.bce for o in outcomes] == [0.6, 0.6, 0.55, 0.55]
    tried = [(c.embedding.method, c.seed, c.optimizer.embedding_learning_rate) for c in fake.configs]
    assert len(tried) == len(set(tried)) == 2 * 3 + 2, "the first seed is tuned, the others are not"


def test_what_the_runs_share_is_that_of_the_base(
    monkeypatch: pytest.MonkeyPatch, base: RunConfig, tmp_path: Path
) -> None:
    fake, _ = run(monkeypatch, base, tmp_path, caps=[400, 800], seeds=[0], learning_rates=[0.1])
    assert [(c.embedding.method, c.embedding.max_parameters) for c in fake.configs] == [
        ("full", None),
        ("cce", 400),
        ("cce", 800),
    ]
    for config in fake.configs:
        assert (config.data, config.tables, config.recluster) == (base.data, base.tables, base.recluster)
        assert config.embedding.num_columns == base.embedding.num_columns


def test_a_method_of_which_every_run_diverged(monkeypatch: pytest.MonkeyPatch, base: RunConfig, tmp_path: Path) -> None:
    _, outcomes = run(monkeypatch, base, tmp_path, seeds=[0], learning_rates=[0.3])
    assert all(math.isnan(outcome.auc) and math.isnan(outcome.bce) for outcome in outcomes)


def test_entropies_stand_beside_those_of_a_hash(
    monkeypatch: pytest.MonkeyPatch, base: RunConfig, tmp_path: Path
) -> None:
    _, outcomes = run(monkeypatch, base, tmp_path, seeds=[0], learning_rates=[0.1])
    assert outcomes[0].entropies == {}
    entropies = outcomes[1].entropies["C1"]
    assert entropies.learned == (1.0, 2.0, 3.0, 4.0)
    assert len(entropies.random) == 4


def test_a_comparison_needs_validation_and_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without = runs.criteo_config(tmp_path / "log.tsv", data={"test": None})
    with pytest.raises(ConfigError, match=r"needs data\.validation and data\.test"):
        run(monkeypatch, without, tmp_path)
