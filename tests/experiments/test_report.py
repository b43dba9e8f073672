"""The report's files hold what the outcomes say."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.support.documents import PNG, Page
from tests.support.outcomes import SIZES, outcome
from torchrec_cce.cli.bench import print_outcomes
from torchrec_cce.experiments.outcome import Outcome
from torchrec_cce.experiments.report import COLUMNS, NOTE, to_markdown, write_report


@pytest.fixture
def outcomes(tmp_path: Path) -> list[Outcome]:
    return [
        outcome(tmp_path, "full"),
        outcome(tmp_path, "hashing_trick"),
        outcome(tmp_path, "ce_concat"),
        *(outcome(tmp_path, "cce", seed=seed, auc=0.7 + seed / 50) for seed in (0, 1)),
    ]


def test_page(outcomes: list[Outcome], tmp_path: Path) -> None:
    write_report(tmp_path, outcomes, title="A <title> & more", about={"log": "clicks <made>", "rows": "3,000"})
    page = Page((tmp_path / "report.html").read_text())
    head, *rows = page.rows
    assert head == list(COLUMNS)
    assert [row[0] for row in rows] == ["full", "hashing_trick", "ce_concat", "cce"]
    assert [row[COLUMNS.index("AUC")] for row in rows] == ["0.7000", "0.7000", "0.7000", "0.7100 ± 0.0141"]
    assert rows[-1][COLUMNS.index("pointer bytes")] == "16,000"
    assert rows[-1][-3:] == ["40.0×", "40.0×", "11.4×"]
    assert len(page.images) == 4
    assert all(image.startswith(PNG) for image in page.images)
    for text in ("A <title> & more", "clicks <made>", "3,000"):
        assert text in page.text


def test_without_a_clustered_table_there_is_no_plot_of_entropies(outcomes: list[Outcome], tmp_path: Path) -> None:
    write_report(tmp_path, outcomes[:2], title="t", about={})
    assert len(Page((tmp_path / "report.html").read_text()).images) == 3


def test_json_with_null_for_what_is_no_number(outcomes: list[Outcome], tmp_path: Path) -> None:
    outcomes.append(outcome(tmp_path, "dhe", bce=math.nan, auc=math.inf, validation_auc=0.7))
    write_report(tmp_path, outcomes, title="t", about={"log": "l"})
    values = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert values["title"] == "t"
    assert values["about"] == {"log": "l"}
    expected = [asdict(each) for each in outcomes]
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
        outcome(tmp_path, "rq_hash_embeddings", max_parameters=64_000, seed=s, auc=0.7 + s, sizes=sizes) for s in (0, 1)
    ]
    print_outcomes(large)
    text = capsys.readouterr().out.removesuffix(f"{NOTE}\n")
    assert max(map(len, text.splitlines())) <= 150
    assert "…" not in text
    assert "1,000,000,000" in text


def test_pointers_beside_the_tables_are_pointers(tmp_path: Path) -> None:
    outcomes = [outcome(tmp_path, "rq", sizes=replace(SIZES, pointer_bytes=0, device_pointer_bytes=16_000))]
    assert "| 16,000 |" in to_markdown(outcomes)
    write_report(tmp_path, outcomes, title="t", about={})
    assert len(Page((tmp_path / "report.html").read_text()).images) == 3


def test_terminal_and_document(outcomes: list[Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    print_outcomes(outcomes)
    text = capsys.readouterr().out
    for method in ("full", "hashing_trick", "ce_concat", "cce"):
        assert sum(line.split()[:1] == [method] for line in text.splitlines()) == 1
    lines = to_markdown(outcomes).splitlines()
    assert len(lines) == 2 + 4
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}
