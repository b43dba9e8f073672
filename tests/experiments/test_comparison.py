"""The report's files hold what the results say."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.documents import PNG, Page
from tests.support.experiment_results import SIZES, trial_result
from torchrec_cce.cli.experiments import print_comparison
from torchrec_cce.experiments.comparison import COLUMNS, NOTE, comparison_report, to_markdown
from torchrec_cce.experiments.report import write_report
from torchrec_cce.experiments.results import TrialResult


@pytest.fixture
def results(tmp_path: Path) -> list[TrialResult]:
    return [
        trial_result(tmp_path, "full"),
        trial_result(tmp_path, "hashing_trick"),
        trial_result(tmp_path, "ce_concat"),
        *(trial_result(tmp_path, "cce", seed=seed, test_auc=0.7 + seed / 50) for seed in (0, 1)),
    ]


def test_page(results: list[TrialResult], tmp_path: Path) -> None:
    write_report(
        tmp_path,
        comparison_report(
            results, title="A <title> & more", about={"log": "clicks <made>", "rows": "3,000"}, runs=tmp_path
        ),
    )
    page = Page((tmp_path / "report.html").read_text())
    head, *rows = page.rows
    assert head == [*COLUMNS, "runs"]
    assert [row[0] for row in rows] == ["full", "hashing_trick", "ce_concat", "cce"]
    assert [row[COLUMNS.index("AUC")] for row in rows] == ["0.7000", "0.7000", "0.7000", "0.7100 ± 0.0141"]
    assert rows[-1][COLUMNS.index("pointer bytes")] == "16,000"
    assert rows[-1][-4:-1] == ["40.0×", "40.0×", "11.4×"]
    assert len(page.images) == 5
    assert all(image.startswith(PNG) for image in page.images)
    for text in ("A <title> & more", "clicks <made>", "3,000"):
        assert text in page.text


def test_without_a_clustered_table_there_is_no_plot_of_entropies(results: list[TrialResult], tmp_path: Path) -> None:
    write_report(tmp_path, comparison_report(results[:2], title="t", about={}, runs=tmp_path))
    assert len(Page((tmp_path / "report.html").read_text()).images) == 4


def test_json_with_null_for_what_is_no_number(results: list[TrialResult], tmp_path: Path) -> None:
    results.append(trial_result(tmp_path, "dhe", test_bce=math.nan, test_auc=math.inf, validation_auc=0.7))
    write_report(tmp_path, comparison_report(results, title="t", about={"log": "l"}, runs=tmp_path))
    values = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert values["title"] == "t"
    assert values["about"] == {"log": "l"}
    expected = [result.as_outcome(tmp_path / str(result.run)) for result in results]
    for each in expected:
        each.update({name: None for name, value in each.items() if value != value or value == math.inf})
    assert values["outcomes"] == json.loads(json.dumps(expected, allow_nan=False))
    assert values["outcomes"][-1]["bce"] is None


def test_nothing_is_cut_in_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = replace(
        SIZES,
        full_parameters=10**10,
        parameters=10**7,
        table_bytes=4 * 10**7,
        pointer_bytes=10**9,
        largest_factor=8500.0,
    )
    large = [
        trial_result(tmp_path, "rq_hash_embeddings", max_parameters=64_000, seed=s, test_auc=0.7 + s, sizes=sizes)
        for s in (0, 1)
    ]
    print_comparison(large)
    text = capsys.readouterr().out.removesuffix(f"{NOTE}\n")
    assert max(map(len, text.splitlines())) <= 150
    assert "…" not in text
    assert "1,000,000,000" in text


def test_pointers_beside_the_tables_are_pointers(tmp_path: Path) -> None:
    results = [trial_result(tmp_path, "rq", sizes=replace(SIZES, pointer_bytes=0, device_pointer_bytes=16_000))]
    assert "| 16,000 |" in to_markdown(results)
    write_report(tmp_path, comparison_report(results, title="t", about={}, runs=tmp_path))
    assert len(Page((tmp_path / "report.html").read_text()).images) == 4


def test_terminal_and_document(results: list[TrialResult], capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(results)
    text = capsys.readouterr().out
    for method in ("full", "hashing_trick", "ce_concat", "cce"):
        assert sum(line.split()[:1] == [method] for line in text.splitlines()) == 1
    lines = to_markdown(results).splitlines()
    assert len(lines) == 2 + 4
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}
