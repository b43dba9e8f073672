"""The report of an experiment: every number has its runs, and every picture its numbers."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from tests.support.documents import PNG, Page
from tests.support.experiment_results import failed, results, row, write_metrics
from torchrec_cce.charts.chart import Chart, HeatMap
from torchrec_cce.errors import MissingExtraError
from torchrec_cce.experiments.experiment_report import experiment_report
from torchrec_cce.experiments.report import write_report

Rows = list[dict[str, Any]]


def whole() -> Rows:
    """Several of everything, with what may go wrong."""
    rows = [row("full", seed=seed, bce=0.450 + seed / 1000, auc=0.80) for seed in (0, 1)]
    for number, cap in enumerate((2000, 8000, 32_000)):
        for seed in (0, 1):
            noise = seed / 2000 - number / 100
            rows += [
                row("hashing_trick", cap=cap, seed=seed, bce=0.50 + noise, auc=0.70 - noise),
                row("rq", cap=cap, seed=seed, bce=0.49 + noise, auc=0.71 - noise),
                row("pq", cap=cap // 2, seed=seed, bce=0.48 + noise, auc=0.72 - noise),
                row("cce", cap=cap, seed=seed, bce=0.46 + noise, auc=0.74 - noise),
                row("cce", name="cce late", cap=cap, seed=seed, recluster={"cf": 300}, bce=0.465 + noise),
            ]
    return [
        *rows,
        row("dhe", cap=2000, bce=math.nan),
        row("cce", cap=8000, seed=7, bce=0.3, chosen=False, run="untuned"),
        failed("robe", "no memory <left> & gone", cap=2000),
    ]


def edge_cases() -> dict[str, Rows]:
    return {
        "nothing": [],
        "errors only": [failed("cce", "no such file", cap=2000, config=None, run=None)],
        "no full tables": [row("cce", cap=2000), row("cce", cap=8000, bce=0.4)],
        "full tables only": [row("full")],
        "one cap, one seed": [row("full"), row("cce", cap=2000, bce=0.6), row("ce_concat", cap=2000, bce=0.4)],
        "one cap, no AUC to choose by": [row("full", validation_auc=None), row("cce", cap=2000, validation_auc=None)],
        "method of tomorrow": [row("full"), row("new", cap=2000, config="{}")],
        "one column": [row("full"), row("cce", cap=8000, embedding={"num_columns": 1}, bce=0.51)],
        "equal losses": [row("full"), row("cce", cap=2000), row("cce", cap=8000)],
        "caps that compress nothing": [row("full"), row("ce_sum", cap=1_600_000), row("ce_sum", cap=3_200_000)],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Rows], tuple[dict[str, Any], Page]]:
    def written(rows: Rows) -> tuple[dict[str, Any], Page]:
        report = experiment_report(results(*rows), title="A <title>", runs=tmp_path / "runs")
        write_report(tmp_path, report)
        values = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
        return values, Page((tmp_path / "report.html").read_text())

    return written


def test_pictures_are_drawn_from_the_numbers_in_the_json(
    write: Callable[[Rows], tuple[dict[str, Any], Page]], tmp_path: Path
) -> None:
    for each in whole():
        if each["method"] == "cce":
            learned = [0.9 * value for value in each["random_entropies"]]
            write_metrics(tmp_path / "runs", each["run"], {100: learned, 200: learned})
    values, page = write(whole())
    kinds: dict[str, Any] = {"chart": Chart, "heat map": HeatMap}
    drawn = []
    for picture in values["pictures"]:
        restored = TypeAdapter(kinds[picture.pop("kind")]).validate_python(picture)
        png = restored.to_png()
        assert png.startswith(PNG)
        assert len(png) > 5000
        assert png == (tmp_path / "pictures" / f"{restored.name}.png").read_bytes()
        drawn.append(png)
    assert sorted(drawn) == sorted(page.images)
    names = [picture["name"] for picture in values["pictures"]]
    assert len(set(names)) == len(names)
    assert {"bce-1", "auc-1", "clusterings-bce-1", "clusterings-auc-1", "pareto", "entropy-h1-1", "figure-6"} <= {
        *names
    }


def test_every_number_names_runs_of_the_file(write: Callable[[Rows], tuple[dict[str, Any], Page]]) -> None:
    values, page = write(whole())
    runs = {each["run"] for each in whole()}
    rows = [line for table in values["tables"] for line in table["rows"]]
    assert len(rows) > 30
    assert all(line["runs"] and set(line["runs"]) <= runs for line in rows)
    trained = [p for p in values["pictures"] if not p["name"].startswith("figure")]
    for series in (series for picture in trained for series in picture["series"]):
        assert len(series["runs"]) == len(series["y"])
        assert all(point and set(point) <= runs for point in series["runs"])
    assert "untuned" not in json.dumps([values["tables"], values["pictures"], values["curves"]])
    shown = {text for line in page.rows for text in line}
    assert {"no memory <left> & gone", "it has no finite test BCE and AUC"} <= shown
    assert "cce-8000-0, cce-8000-1" in page.text
    assert "A <title>" in page.text


def test_points_of_a_chart_are_means_of_their_runs(write: Callable[[Rows], tuple[dict[str, Any], Page]]) -> None:
    values, _ = write(whole())
    losses = {trial["run"]: trial for trial in values["trials"]}
    for metric in ("bce", "auc"):
        (chart,) = (picture for picture in values["pictures"] if picture["name"] == f"{metric}-1")
        assert [series["label"] for series in chart["series"]] == ["hashing_trick", "pq", "cce", "full"]
        for series in chart["series"]:
            for y, runs in zip(series["y"], series["runs"], strict=True):
                assert y == pytest.approx(sum(losses[run][f"test_{metric}"] for run in runs) / len(runs))
            for x, runs in zip(series["x"], series["runs"], strict=series["label"] != "full"):
                assert {losses[run]["parameters"] for run in runs} == {x}


def test_the_page_says_what_the_json_says(write: Callable[[Rows], tuple[dict[str, Any], Page]]) -> None:
    values, page = write(whole())
    cells = [tuple(line[:-1]) for line in page.rows]
    for table in values["tables"]:
        assert tuple(table["columns"]) in cells
        for line in table["rows"]:
            assert tuple(line["cells"]) in cells
    by_name = {each["name"]: each for each in values["compression"]}
    assert by_name["cce"]["state"] == "measured"
    assert by_name["hashing_trick"]["state"] == "extrapolated"
    assert set(by_name) == {"hashing_trick", "rq", "pq", "cce", "cce late"}
    assert values["pareto_front"][-1] == "full"


@pytest.mark.parametrize("case", edge_cases())
def test_odd_experiments_have_a_report(case: str, write: Callable[[Rows], tuple[dict[str, Any], Page]]) -> None:
    values, page = write(edge_cases()[case])
    assert len(page.images) == len(values["pictures"]) >= 3
    assert all(image.startswith(PNG) for image in page.images)
    assert len(values["trials"]) + len(values["failures"]) == len(edge_cases()[case])
    if case in ("nothing", "errors only"):
        assert "No trial at a tuned rate has a result." in page.text
    if case == "no full tables":
        assert "there is nothing to compare with" in page.text
        assert values["compression"] == []
    if case == "one cap, one seed":
        assert [each["state"] for each in values["compression"]] == ["one cap", "smallest cap"]


@pytest.mark.parametrize("library", ["matplotlib.figure", "jinja2"])
def test_without_the_libraries_for_a_page_there_are_its_numbers(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    report = experiment_report(results(row("full"), row("cce", cap=8000)), title="t")
    with pytest.raises(MissingExtraError, match=rf"{library} is needed .* install torchrec-cce\[report\]"):
        write_report(tmp_path, report)
    assert json.loads((tmp_path / "report.json").read_text())["pareto_front"]
    assert not (tmp_path / "report.html").exists()
