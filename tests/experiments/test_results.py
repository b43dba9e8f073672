"""What a results file says, and files that are none."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.experiment_results import FULL_PARAMETERS, failed, results, row, write_results
from torchrec_cce.errors import DataFileError
from torchrec_cce.experiments.results import COLUMNS, read_results


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = row("cce", cap=8000, seed=3, bce=0.45, auc=0.8, rate_at_end=True)
    (found,) = read_results(write_results(tmp_path / "results.parquet", [written])).trials
    as_written = {**written, "entropies": tuple(written["entropies"]), "random_entropies": found.random_entropies}
    for column in COLUMNS:
        if column not in ("error", "config", "versions"):
            assert getattr(found, column) == as_written[column], column
    assert list(found.random_entropies) == written["random_entropies"]
    assert found.config["embedding"]["max_parameters"] == 8000
    assert found.versions == {"torch": "2.13.0"}
    assert found.largest_full_parameters == 1_600_000
    assert found.largest_parameters == pytest.approx(8000)


def test_errors_and_losses_that_are_none_are_failures(tmp_path: Path) -> None:
    rows = [
        row("full"),
        failed("cce", "no such file", cap=2000, config=None, run=None),
        row("dhe", cap=2000, bce=math.nan),
        row("robe", cap=2000, test_auc=None),
        row("pq", cap=2000, validation_bce=None, error="diverged"),
    ]
    found = read_results(write_results(tmp_path / "results.parquet", rows))
    assert [trial.method for trial in found.trials] == ["full"]
    assert [(failure.method, failure.error) for failure in found.failures] == [
        ("cce", "no such file"),
        ("dhe", "it has no finite test BCE and AUC"),
        ("robe", "it has no finite test BCE and AUC"),
        ("pq", "diverged"),
    ]
    assert found.failures[0].run is None


def test_only_tuned_rates_are_chosen() -> None:
    found = results(row("full"), row("full", seed=1, chosen=False))
    assert [trial.seed for trial in found.chosen] == [0]


def test_parameters_of_the_largest_where_no_table_is_named() -> None:
    (trial,) = results(row("ce_sum", cap=2000, config='{"embedding": {}}')).trials
    assert trial.largest_full_parameters == FULL_PARAMETERS


def test_files_that_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"nowhere\.parquet: cannot be read as a results file"):
        read_results(tmp_path / "nowhere.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(DataFileError, match=r"text\.parquet: cannot be read as a results file"):
        read_results(tmp_path / "text.parquet")
    pq.write_table(pa.table({column: pa.nulls(1) for column in COLUMNS[2:]}), tmp_path / "other.parquet")
    with pytest.raises(DataFileError, match="lacks the columns name, method of a results file"):
        read_results(tmp_path / "other.parquet")
