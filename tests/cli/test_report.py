"""`torchrec-cce report`, as a user calls it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.support.experiment_results import row, write_results
from torchrec_cce.cli.main import app


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [row("full", auc=0.8), row("cce", cap=8000, auc=0.75), row("ce_concat", cap=8000, auc=0.7)]
    return write_results(tmp_path / "my log" / "results.parquet", rows)


def test_a_report_is_written(results: Path, tmp_path: Path) -> None:
    done = run(results, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"report: {tmp_path / 'out' / 'report.html'} and {tmp_path / 'out' / 'report.json'}\n"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["title"] == "my log"
    assert "<title>my log</title>" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "pictures" / "pareto.png").exists()


def test_a_budget_names_what_to_configure(results: Path, tmp_path: Path) -> None:
    done = run(results, "--out", tmp_path / "out", "--max-bytes", "500000", "--title", "Mine")
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in (
        "cce at 8,000",
        "total bytes 432,448",
        "on the accelerator 32,448",
        "in host memory 400,000",
        "largest table, item 4 columns of 250 rows, 8-bit pointers",
        "test AUC 0.7500",
        "runs cce-8000-0",
        "[embedding]",
        'method = "cce"',
        "max_parameters = 8000",
        "[recluster]",
        "ct = 2",
    ):
        assert line in lines


def test_a_budget_that_nothing_meets(results: Path, tmp_path: Path) -> None:
    done = run(results, "--out", tmp_path / "out", "--max-bytes", "1000")
    assert done.exit_code == 2
    assert "the smallest is ce_concat at 8,000, 32,448 bytes with its pointers" in done.stderr
    assert (tmp_path / "out" / "report.html").exists()


def test_what_is_no_results_file(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere.parquet", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "nowhere.parquet: cannot be read as a results file" in done.stderr
    assert not (tmp_path / "out").exists()
