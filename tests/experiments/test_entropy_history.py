"""Entropies over clusterings, from the metrics of runs."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.experiment_results import results, row, write_metrics
from torchrec_cce.clustering.entropy import random_entropies
from torchrec_cce.experiments.chart import MAX_SERIES
from torchrec_cce.experiments.curve import curves_of
from torchrec_cce.experiments.entropy_history import entropy_charts, entropy_histories

RANDOM = np.array(random_entropies(100_000, 250, 4))


def test_mean_over_seeds_of_the_clusterings_that_all_have(tmp_path: Path) -> None:
    write_metrics(tmp_path, "cce-8000-0", {100: RANDOM * 0.9, 200: RANDOM * 0.8, 300: RANDOM * 0.7})
    write_metrics(tmp_path, "cce-8000-1", {100: RANDOM * 0.7, 200: RANDOM * 0.6})
    write_metrics(tmp_path, "cce-2000-0", {100: RANDOM * 0.1})
    rows = [row("cce", cap=cap, seed=seed) for cap, seed in ((2000, 0), (8000, 0), (8000, 1), (8000, 2))]
    (history,) = entropy_histories(curves_of(results(*rows).trials), tmp_path)
    assert history.label == "cce at 8,000"
    assert history.steps == (100, 200)
    assert history.shares == (pytest.approx((0.8, 0.8)), pytest.approx((0.7, 0.7)))
    assert history.runs == ("cce-8000-0", "cce-8000-1")
    first, second = entropy_charts([history])
    assert (first.name, second.name) == ("entropy-h1-1", "entropy-h2-1")
    assert first.series[0].x == (100, 200)
    assert first.series[0].y == pytest.approx((0.8, 0.7))
    assert first.series[-1].y == (1.0,)


def test_without_folders_there_is_nothing(tmp_path: Path) -> None:
    curves = curves_of(results(row("cce", cap=8000), row("pq", cap=8000), row("full")).trials)
    assert entropy_histories(curves, tmp_path / "nowhere") == []
    write_metrics(tmp_path, "cce-8000-0", {})  # a run that was never clustered
    assert entropy_histories(curves, tmp_path) == []
    assert entropy_charts([]) == []


def test_one_column_has_no_pairs_and_many_entries_several_charts(tmp_path: Path) -> None:
    rows = [row("cce", name=f"cce {i}", cap=8000, embedding={"num_columns": 1}) for i in range(MAX_SERIES + 1)]
    for one in rows:
        write_metrics(tmp_path, str(one["run"]), {100: RANDOM[:1]})
    histories = entropy_histories(curves_of(results(*rows).trials), tmp_path)
    charts = entropy_charts(histories)
    assert [(chart.name, len(chart.series)) for chart in charts] == [
        ("entropy-h1-1", 5 + 1),
        ("entropy-h1-2", 4 + 1),
    ]
