"""What no other entry beats, by brute force, and what is advised."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.experiment_results import results, row
from torchrec_cce.errors import ConfigError
from torchrec_cce.experiments.curve import MeanDeviation
from torchrec_cce.experiments.pareto import Candidate, advise, budget_charts, candidates_of, pareto_front


def candidate(number: int, total_bytes: int, auc: float) -> Candidate:
    spread = MeanDeviation(mean=auc, deviation=0.0)
    return Candidate(
        name=str(number),
        method="cce",
        max_parameters=None,
        learning_rate=0.05,
        settings={},
        largest=None,
        validation_auc=auc,
        auc=spread,
        bce=spread,
        table_bytes=total_bytes,
        pointer_bytes=0,
        device_pointer_bytes=0,
        total_bytes=total_bytes,
        training_bytes=0,
        runs=(),
    )


@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.5, 0.6, 0.7, 0.8, math.nan])), max_size=25))
def test_front_is_what_nothing_dominates(points: list[tuple[int, float]]) -> None:
    """Few values make ties."""
    front = pareto_front([candidate(number, *point) for number, point in enumerate(points)])
    known = [point for point in points if not math.isnan(point[1])]
    undominated = {
        (size, auc)
        for size, auc in known
        if not any(s <= size and a >= auc and (s, a) != (size, auc) for s, a in known)
    }
    found = [(each.total_bytes, each.validation_auc) for each in front]
    assert found == sorted(undominated)
    assert [each.name for each in front] == [str(points.index(point)) for point in found]


@given(
    st.lists(st.tuples(st.integers(200, 3000), st.sampled_from([0.5, 0.6, 0.7])), min_size=1, max_size=8),
    st.integers(1, 20_000),
)
def test_advice_is_the_best_that_fits(points: list[tuple[int, float]], max_bytes: int) -> None:
    trials = results(
        *(row("ce_sum", name=str(number), cap=cap, auc=auc) for number, (cap, auc) in enumerate(points))
    ).trials
    fitting = [trial for trial in trials if trial.sizes.total_bytes <= max_bytes]
    if fitting:
        best = max(trial.validation_auc for trial in fitting)
        smallest = min(trial.sizes.total_bytes for trial in fitting if trial.validation_auc == best)
        found = advise(trials, max_bytes=max_bytes)
        assert (found.validation_auc, found.total_bytes) == (best, smallest)
    else:
        with pytest.raises(ConfigError, match="is too little for everything that was run"):
            advise(trials, max_bytes=max_bytes)


def test_the_budget_counts_pointers_and_is_met_exactly() -> None:
    trials = results(row("full", auc=0.9), row("cce", cap=8000, auc=0.8), row("ce_concat", cap=8000, auc=0.7)).trials
    cce = trials[1]
    assert cce.sizes.total_bytes == 4 * (8000 + 7 * 16) + 400_000
    assert advise(trials, max_bytes=cce.sizes.total_bytes).name == "cce"
    assert advise(trials, max_bytes=cce.sizes.total_bytes - 1).name == "ce_concat"
    assert advise(trials, max_bytes=10**9).name == "full"


def test_nothing_fits() -> None:
    trials = results(row("ce_concat", cap=8000), row("ce_concat", cap=2000)).trials
    with pytest.raises(
        ConfigError,
        match=r"max_bytes=1,000 is too little .*; the smallest is ce_concat at 2,000, 8,448 bytes with its pointers",
    ):
        advise(trials, max_bytes=1000)


@pytest.mark.parametrize(
    "rows", [[], [row("cce", cap=8000, chosen=False)], [row("cce", cap=8000, validation_auc=None)]]
)
def test_nothing_to_choose_from(rows: list[dict[str, object]]) -> None:
    with pytest.raises(ConfigError, match="no finished trial at a tuned rate"):
        advise(results(*rows).trials, max_bytes=10**9)


def test_a_candidate_says_what_to_configure() -> None:
    rows = [row("cce", cap=16_000, seed=seed, auc=auc, rate_at_end=True) for seed, auc in ((0, 0.7), (1, 0.8))]
    (cce,) = candidates_of(results(*rows).trials)
    assert cce.validation_auc == pytest.approx(0.751)
    assert cce.auc.mean == pytest.approx(0.75)
    assert cce.largest is not None
    assert (cce.largest.num_columns, cce.largest.num_rows, cce.largest.pointer_bits) == (4, 500, 16)
    assert cce.runs == ("cce-16000-0", "cce-16000-1")
    assert list(cce.settings) == ["embedding", "optimizer", "recluster"]
    (other,) = candidates_of(results(row("rq", cap=16_000)).trials)
    assert list(other.settings) == ["embedding", "optimizer"]
    assert (other.pointer_bytes, other.accelerator_bytes) == (0, other.total_bytes)


def test_charts_against_what_is_served_and_what_is_held_while_training() -> None:
    """Of full tables, and of those with rows of 4 bits: as large while training, a seventh when served."""

    def served(size: int) -> dict[str, int]:
        return {"table_bytes": size, "pointer_bytes": 0, "device_pointer_bytes": 0}

    trials = results(
        row("full", auc=0.8, bce=0.4, **served(700), training_bytes=800),
        row("full", name="int4", auc=0.79, bce=0.41, **served(100), training_bytes=800),
        row("cce", cap=2000, auc=0.7, bce=0.5, **served(50), training_bytes=60),
        row("robe", cap=2000, auc=0.6, bce=0.6, **served(60), training_bytes=0),
    ).trials
    charts = {chart.name: chart for chart in budget_charts(candidates_of(trials))}
    assert list(charts) == [
        "pareto-bce-total_bytes",
        "pareto",
        "pareto-bce-training_bytes",
        "pareto-auc-training_bytes",
    ]
    points = {
        name: {series.label: list(zip(series.x, series.y, strict=True)) for series in chart.series}
        for name, chart in charts.items()
    }
    assert points["pareto"]["full"] == [(700, 0.8), (100, 0.79)]
    assert points["pareto"]["front"] == [(50, 0.7), (100, 0.79), (700, 0.8)]
    assert points["pareto-auc-training_bytes"]["front"] == [(60, 0.7), (800, 0.8)]
    bce = points["pareto-bce-training_bytes"]
    assert bce == {"full": [(800, 0.4), (800, 0.41)], "CCE": [(60, 0.5)], "front": [(60, 0.5), (800, 0.4)]}
