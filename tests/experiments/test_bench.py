"""Which runs a plan makes, and what it takes from them; training itself is replaced."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs
from tests.support.bench_plans import plan
from tests.support.experiment_results import SIZES
from torchrec_cce.errors import ConfigError, DataFileError, RegistryError
from torchrec_cce.experiments import trial as module
from torchrec_cce.experiments.plan import Plan
from torchrec_cce.experiments.results import TrialResult, chosen_results
from torchrec_cce.experiments.runner import bench
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.loop import RunResult

LOSSES = {"full": {0.1: 0.5, 0.2: 0.4, 0.3: math.nan}, "cce": {0.1: 0.45, 0.2: 0.46, 0.3: math.nan}}


class FakeTraining:
    """Validation BCE by learning rate; the test split says the opposite, so that choosing by it would show."""

    def __init__(self, losses: Mapping[str, Mapping[float, float | Exception]]) -> None:
        self.losses = losses
        self.configs: list[RunConfig] = []

    def __call__(self, config: RunConfig, run_dir: Path, **_: Any) -> RunResult:
        self.configs.append(config)
        if config.derive is not None:
            assert list((Path(config.derive.run) / "checkpoints").iterdir()), "a run starts from one that is gone"
        loss = self.losses[config.embedding.method][config.optimizer.embedding_learning_rate]
        if isinstance(loss, Exception):
            raise loss
        (run_dir / "checkpoints" / "step-10").mkdir(parents=True)
        best = {"validation_bce": loss, "validation_auc": 0.6, "test_bce": 1 - loss, "test_auc": loss}
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

    @property
    def tried(self) -> list[tuple[str, int | None, int, float]]:
        return [
            (c.embedding.method, c.embedding.max_parameters, c.seed, c.optimizer.embedding_learning_rate)
            for c in self.configs
        ]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log.tsv").touch()
    return tmp_path / "log.tsv"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    fake = FakeTraining({**LOSSES, "pq": {0.1: 0.3}, "ce_hybrid": LOSSES["cce"]})
    monkeypatch.setattr(module, "train", fake)
    return fake


def run(plan: Plan, folder: Path) -> list[TrialResult]:
    return bench(plan, folder, show_progress=False)


def rows(results: list[TrialResult]) -> list[tuple[str, int | None, int, float]]:
    return [(r.name, r.max_parameters, r.seed, r.learning_rate) for r in results if r.chosen]


def test_each_method_gets_the_learning_rate_of_its_lowest_validation_loss(
    fake: FakeTraining, log: Path, tmp_path: Path
) -> None:
    """0.3 diverges: NaN is below nothing, and must not win because of that."""
    results = run(plan(log, learning_rates=[0.3, 0.1, 0.2], caps=[800]), tmp_path)
    chosen = chosen_results(results)
    assert [(r.method, r.max_parameters, r.seed, r.learning_rate) for r in chosen] == [
        ("full", None, 7, 0.2),
        ("full", None, 8, 0.2),
        ("cce", 800, 7, 0.1),
        ("cce", 800, 8, 0.1),
    ]
    assert [r.validation_bce for r in chosen] == [0.4, 0.4, 0.45, 0.45]
    assert [r.test_bce for r in chosen] == [0.6, 0.6, 0.55, 0.55]
    assert len(fake.tried) == len(set(fake.tried)) == 2 * 3 + 2, "the first seed is tuned, the others are not"
    assert len(results) == 2 * 3 + 2, "what was only tried is recorded too"
    assert [r.rate_at_end for r in results if r.chosen] == [False, False, True, True]
    assert [r.error for r in results if r.learning_rate == 0.3] == ["diverged: no finite BCE in 10 batches"] * 2


def test_what_the_runs_share_is_that_of_the_plan(fake: FakeTraining, log: Path, tmp_path: Path) -> None:
    base = plan(log, caps=[400, 800], seeds=[0], learning_rates=[0.1])
    assert [r.rate_at_end for r in run(base, tmp_path)] == [False] * 3, "of a single rate nothing is to be said"
    assert [tried[:2] for tried in fake.tried] == [("full", None), ("cce", 400), ("cce", 800)]
    for config in fake.configs:
        assert (config.data, config.tables, config.recluster) == (base.run.data, base.run.tables, base.run.recluster)
        assert config.embedding.num_columns == base.run.embedding.num_columns


@pytest.mark.usefixtures("fake")
def test_an_entry_has_settings_of_its_own(log: Path, tmp_path: Path) -> None:
    narrow = {"name": "narrow", "method": "cce", "num_columns": 2, "recluster": {"cf": 3}, "caps": [500], "seeds": [1]}
    results = run(plan(log, {"method": "full"}, {"method": "cce"}, narrow), tmp_path)
    (mine,) = (r.config for r in results if r.name == "narrow" and r.chosen)
    (other,) = (r.config for r in results if r.name == "cce" and r.chosen and r.seed == 7)
    assert (mine["embedding"]["num_columns"], mine["recluster"]["ct"], mine["recluster"]["cf"]) == (2, 2, 3)
    assert (mine["seed"], mine["embedding"]["max_parameters"]) == (1, 500)
    assert (other["embedding"]["num_columns"], other["recluster"]["cf"]) == (4, 8)


@pytest.mark.usefixtures("fake")
def test_a_method_of_which_every_run_diverged(log: Path, tmp_path: Path) -> None:
    results = run(plan(log, learning_rates=[0.3]), tmp_path)
    chosen = chosen_results(results)
    assert [r.seed for r in chosen] == [7, 7], "no other seed is tried"
    assert all(math.isnan(result.test_auc) and math.isnan(result.test_bce) for result in chosen)


@pytest.mark.usefixtures("fake")
def test_entropies_stand_beside_those_of_a_hash(log: Path, tmp_path: Path) -> None:
    full, cce = chosen_results(run(plan(log, seeds=[0], learning_rates=[0.1]), tmp_path))
    assert full.entropies == {}
    entropies = cce.entropies["C1"]
    assert entropies.learned == (1.0, 2.0, 3.0, 4.0)
    assert len(entropies.random) == 4


@pytest.mark.usefixtures("fake")
def test_a_cap_that_a_method_cannot_keep_is_a_row(log: Path, tmp_path: Path) -> None:
    results = run(plan(log, {"method": "low_rank", "caps": [10]}, {"method": "cce"}), tmp_path)
    small = [r for r in results if r.method == "low_rank"]
    assert [r.sizes for r in small] == [None, None]
    for result in small:
        assert result.error is not None
        assert "max_parameters=10 is too little for low_rank; at least " in result.error
    assert rows(results)[1:] == [("cce", runs.MAX_PARAMETERS, seed, 0.1) for seed in (7, 8)]


@pytest.mark.parametrize("error", [RegistryError("no\nregistry"), ZeroDivisionError("no\nnumber")])
def test_a_run_that_fails_is_a_row_and_is_tried_again(
    fake: FakeTraining, log: Path, tmp_path: Path, error: Exception
) -> None:
    fake.losses = {**LOSSES, "full": {0.1: 0.3, 0.2: error}}
    results = run(plan(log), tmp_path)
    assert rows(results)[:2] == [("full", None, 7, 0.1), ("full", None, 8, 0.1)]
    (failed,) = (r for r in results if r.error is not None)
    kind = "" if isinstance(error, RegistryError) else "ZeroDivisionError: "
    assert failed.error == kind + " ".join(str(error).split())
    assert (tmp_path / "runs" / failed.run / "traceback.txt").exists() == bool(kind)

    fake.losses, before = {**LOSSES, "full": {0.1: 0.3, 0.2: 0.2}}, len(fake.tried)
    assert rows(run(plan(log), tmp_path))[:2] == [("full", None, 7, 0.2), ("full", None, 8, 0.2)]
    assert fake.tried[before:] == [("full", None, 7, 0.2), ("full", None, 8, 0.2)]


def test_what_is_there_is_not_run_again(fake: FakeTraining, log: Path, tmp_path: Path) -> None:
    first = run(plan(log), tmp_path)
    done = len(fake.tried)
    assert run(plan(log), tmp_path) == first
    assert len(fake.tried) == done
    run(plan(log, {"method": "full"}, {"method": "cce", "recluster": {"cf": 4}}), tmp_path)
    assert {tried[0] for tried in fake.tried[done:]} == {"cce"}, "only what the plan changed"
    done = len(fake.tried)
    run(plan(log, {"method": "full"}, {"method": "cce", "recluster": {"cf": 4}}, seeds=[7, 8, 9]), tmp_path)
    assert sorted(tried[2] for tried in fake.tried[done:]) == [9, 9]


PQ = {"method": "pq", "learning_rates": [0.1], "derive": {"from": "full"}, "training": {"epochs": 0}}


def checkpoints(folder: Path) -> list[str]:
    return [path.parent.name for path in sorted(folder.glob("runs/*/checkpoints"))]


def test_a_derived_run_starts_from_the_tuned_one_of_its_seed(fake: FakeTraining, log: Path, tmp_path: Path) -> None:
    results = run(plan(log, PQ, {"method": "full"}), tmp_path)
    starts = {c.seed: Path(c.derive.run) for c in fake.configs if c.derive is not None}
    assert starts == {seed: tmp_path / "runs" / f"full-lr0.2-seed{seed}" for seed in (7, 8)}
    assert [r.name for r in results] == ["pq"] * 2 + ["full"] * 3, "in the order of the plan"
    assert checkpoints(tmp_path) == [], "nobody waits any more"


def test_checkpoints_are_kept_for_those_who_wait_and_made_again_for_those_who_come_late(
    fake: FakeTraining, log: Path, tmp_path: Path
) -> None:
    fake.losses = {**LOSSES, "pq": {0.1: ZeroDivisionError()}}
    run(plan(log, {"method": "full"}), tmp_path)
    assert checkpoints(tmp_path) == []
    done = len(fake.tried)
    run(plan(log, {"method": "full"}, PQ), tmp_path)
    assert fake.tried[done:] == [("full", None, 7, 0.2), ("pq", runs.MAX_PARAMETERS, 7, 0.1)]


def test_checkpoints_of_all_runs_are_kept_on_request(fake: FakeTraining, log: Path, tmp_path: Path) -> None:
    bench(plan(log, {"method": "full"}, PQ), tmp_path, show_progress=False, keep_checkpoints=True)
    assert len(checkpoints(tmp_path)) == len(fake.tried) == 5


def test_a_source_that_changed_changes_what_starts_from_it(fake: FakeTraining, log: Path, tmp_path: Path) -> None:
    run(plan(log, {"method": "full"}, {"method": "cce"}, PQ), tmp_path)
    done = len(fake.tried)
    run(plan(log, {"method": "full", "optimizer": {"dense": "sgd"}}, {"method": "cce"}, PQ), tmp_path)
    assert sorted(tried[0] for tried in fake.tried[done:]) == ["full"] * 3 + ["pq"] * 2


def test_more_parameters_before_the_clustering(fake: FakeTraining, log: Path, tmp_path: Path) -> None:
    """The plan does not list the larger cap of the source; a chain of sources is followed."""
    more = {"name": "more", "method": "cce", "caps": [500], "derive": {"from": "sketch", "cap_factor": 2}}
    sketch = {"name": "sketch", "method": "ce_hybrid", "caps": [600]}
    results = run(plan(log, more, sketch, {**PQ, "caps": [500], "derive": {"from": "more"}}), tmp_path)
    assert rows(results) == [
        *(("more", 500, seed, 0.1) for seed in (7, 8)),
        *(("sketch", cap, seed, 0.1) for cap in (600, 1000) for seed in (7, 8)),
        *(("pq", 500, seed, 0.1) for seed in (7, 8)),
    ]
    starts = {Path(c.derive.run).name for c in fake.configs if c.derive is not None and c.embedding.method == "cce"}
    assert starts == {f"sketch-1000-lr0.1-seed{seed}" for seed in (7, 8)}


@pytest.mark.usefixtures("fake")
def test_what_starts_from_a_run_that_failed_says_so(log: Path, tmp_path: Path) -> None:
    results = run(plan(log, {"method": "full", "learning_rates": [0.3]}, PQ), tmp_path)
    assert [r.error for r in results] == [
        "diverged: no finite BCE in 10 batches",
        "the run it starts from, full-lr0.3-seed7, failed: diverged: no finite BCE in 10 batches",
    ]


def test_a_log_that_is_missing_is_said_once(fake: FakeTraining, tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"none\.tsv: no such file"):
        run(plan(tmp_path / "none.tsv"), tmp_path)
    assert fake.tried == []


@pytest.mark.usefixtures("fake")
def test_two_do_not_use_one_folder(log: Path, tmp_path: Path) -> None:
    class Second(FakeTraining):
        def __call__(self, config: RunConfig, run_dir: Path, **_: Any) -> RunResult:
            with pytest.raises(
                ConfigError, match=r"another process runs a plan in this folder: .* wait for it, .* choose"
            ):
                run(plan(log), tmp_path)
            return super().__call__(config, run_dir)

    second = Second(LOSSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", second)
        run(plan(log), tmp_path)
    assert len(second.tried) == 6
