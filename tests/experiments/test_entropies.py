"""Entropies of the largest table: which that is, what they stand beside, and how they changed over clusterings."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.experiment_results import results, row, write_metrics
from torchrec_cce.charts.chart import MAX_SERIES
from torchrec_cce.clustering.entropy import random_entropies
from torchrec_cce.experiments.curve import curves_of
from torchrec_cce.experiments.entropies import (
    Collapse,
    LargestTable,
    collapses,
    entropy_charts,
    entropy_histories,
    largest_table,
)

RANDOM = np.array(random_entropies(100_000, 250, 4))


def found(*rows: dict[str, object]) -> dict[str, Collapse]:
    return {collapse.name: collapse for collapse in collapses(curves_of(results(*rows).trials))}


def test_product_quantization_with_as_many_rows_stands_beside() -> None:
    usual = [0.9, 0.92, 0.95, 0.97]
    by_name = found(
        row("cce", cap=8000, learned=[0.88, 0.9, 0.95, 0.97]),
        row("cce", cap=8000, seed=1, learned=usual),
        row("pq", cap=4000, learned=usual),  # k·d of its parameters are k rows; CCE has 2·k·d
        row("pq", name="pq, then trained", cap=4000, learned=[0.5, 0.5, 0.5, 0.5]),
        row("pq", name="pq, larger", cap=8000),
        row("ce_concat", cap=8000, learned=[]),
    )
    random = random_entropies(100_000, 250, 4)
    assert list(by_name) == ["cce", "pq", "pq, then trained", "pq, larger"]
    cce = by_name["cce"]
    assert cce.random == pytest.approx(random)
    assert cce.entropies == pytest.approx(np.array(random) * [0.89, 0.91, 0.95, 0.97])
    assert cce.pq == pytest.approx(np.array(random) * usual)
    assert cce.verdict == "like PQ"
    assert cce.runs == ("cce-8000-0", "cce-8000-1")
    assert cce.pq_runs == ("pq-4000-0",)
    assert (by_name["pq"].pq, by_name["pq"].verdict) == (None, "learned")


@pytest.mark.parametrize(
    ("learned", "verdict"),
    [
        ([1.0, 1.0, 1.0, 1.0], "as random as a hash"),
        ([0.4, 0.8, 0.9, 0.9], "collapsed"),
        ([0.9, 0.49, 0.9, 0.9], "collapsed"),
        ([0.8, 0.8, 0.9, 0.9], "learned"),
    ],
)
def test_verdicts(learned: list[float], verdict: str) -> None:
    assert found(row("cce", cap=8000, learned=learned))["cce"].verdict == verdict


def test_circular_clustering_is_no_product_quantization() -> None:
    circular = row("pq", name="circular", cap=4000)
    circular["config"] = json.dumps(json.loads(str(circular["config"])) | {"derive": {"circular": True, "run": "full"}})
    by_name = found(row("cce", cap=8000), circular)
    assert by_name["cce"].pq is None
    assert "circular" in by_name


def test_without_table_sizes_there_is_no_verdict() -> None:
    collapse = found(row("cce", cap=8000, config="{}"))["cce"]
    assert (collapse.table, collapse.verdict) == (None, None)


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
    for each in rows:
        write_metrics(tmp_path, str(each["run"]), {100: RANDOM[:1]})
    histories = entropy_histories(curves_of(results(*rows).trials), tmp_path)
    charts = entropy_charts(histories)
    assert [(chart.name, len(chart.series)) for chart in charts] == [
        ("entropy-h1-1", 5 + 1),
        ("entropy-h1-2", 4 + 1),
    ]


def config(method: str, cap: int | None, **embedding: object) -> dict[str, object]:
    return {
        "tables": {"day": {"num_embeddings": 7}, "item": {"num_embeddings": 100_000}, "user": {"num_embeddings": 900}},
        "embedding": {"method": method, "dim": 16, "max_parameters": cap, **embedding},
    }


@pytest.mark.parametrize(
    ("method", "cap", "columns", "rows", "bits"),
    [
        ("cce", 8192, 4, 256, 8),
        ("cce", 8224, 4, 257, 16),
        ("pq", 4096, 4, 256, 8),
        ("rq", 8192, 1, 256, 8),
        ("rq", 9000, 1, 281, 32),
    ],
)
def test_tables_with_learned_pointers(method: str, cap: int, columns: int, rows: int, bits: int) -> None:
    assert largest_table(config(method, cap)) == LargestTable(
        name="item", num_ids=100_000, num_columns=columns, num_rows=rows, pointer_bits=bits
    )


def test_columns_are_those_of_the_entry() -> None:
    table = largest_table(config("cce", 8192, num_columns=16))
    assert table is not None
    assert table.num_columns == 16


@pytest.mark.parametrize(
    "values", [{}, config("full", None), config("ce_concat", 8192), config("cce", 2_000_000), {"tables": {}}]
)
def test_tables_without(values: dict[str, object]) -> None:
    assert largest_table(values) is None
