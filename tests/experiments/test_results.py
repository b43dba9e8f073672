"""Results files, written and read back, and files that are none."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import experiment_results
from tests.support.experiment_results import FULL_PARAMETERS, SIZES, failed, results, row, trial_result
from torchrec_cce.errors import DataFileError
from torchrec_cce.experiments.results import SCHEMA, Entropies, TrialResult, read_results, versions, write_results
from torchrec_cce.training.model import Sizes

COLUMNS = SCHEMA.names
CONFIG = {"tables": {"day": {"num_embeddings": 7}, "C1": {"num_embeddings": 1000}}, "embedding": {"dim": 16}}


@pytest.fixture
def made(tmp_path: Path) -> TrialResult:
    """With a value of its own in every field that a file keeps."""
    return trial_result(
        tmp_path,
        "cce",
        name="cce, 4 columns",
        seed=3,
        learning_rate=0.1,
        chosen=True,
        rate_at_end=True,
        validation_auc=0.65,
        sizes=replace(SIZES, largest_table="C1", device_pointer_bytes=77),
        entropies={"C1": Entropies(learned=(3.0, 5.5), random=(3.2, 6.0))},
        config=CONFIG,
        versions={"torch": "2.13.0"},
    )


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = row("cce", cap=8000, seed=3, bce=0.45, auc=0.8, rate_at_end=True)
    (found,) = read_results(experiment_results.write_results(tmp_path / "results.parquet", [written])).trials
    assert {name: found.row()[name] for name in COLUMNS if name not in ("config", "versions")} == {
        name: value for name, value in written.items() if name not in ("config", "versions")
    }
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
    found = read_results(experiment_results.write_results(tmp_path / "results.parquet", rows))
    assert [trial.method for trial in found.trials] == ["full"]
    assert [(failure.method, failure.failure) for failure in found.failures] == [
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


def test_results_are_read_back(tmp_path: Path, made: TrialResult) -> None:
    others = [replace(made, chosen=False), replace(made, sizes=None, entropies={}, error="no room", steps=0)]
    path = tmp_path / "results.parquet"
    write_results(path, [made, *others], made.versions)
    found = read_results(path)
    assert found.trials == (made, others[0])
    assert found.chosen == [made]
    assert [failure.failure for failure in found.failures] == ["no room"]


def test_what_a_run_keeps_of_its_result(tmp_path: Path, made: TrialResult) -> None:
    """Runs and reports of earlier versions hold these names."""
    assert json.dumps(made.as_outcome(tmp_path / "run")) == json.dumps(
        {
            "method": "cce",
            "name": "cce, 4 columns",
            "max_parameters": 800,
            "seed": 3,
            "learning_rate": 0.1,
            "validation_bce": 0.5,
            "validation_auc": 0.65,
            "bce": 0.51,
            "auc": 0.7,
            "sizes": {field.name: getattr(made.sizes, field.name) for field in fields(Sizes)},
            "entropies": {"C1": {"learned": [3.0, 5.5], "random": [3.2, 6.0]}},
            "steps": 20,
            "rows_per_second": 1000.0,
            "seconds": 2.0,
            "run_dir": str(tmp_path / "run"),
        }
    )


def test_a_row_has_what_is_documented(tmp_path: Path, made: TrialResult) -> None:
    path = tmp_path / "results.parquet"
    diverged = replace(made, test_bce=math.nan, error="diverged")
    untrained = TrialResult(
        name="cce", method="cce", max_parameters=800, seed=3, learning_rate=0.1, run="r", config=CONFIG, error="no room"
    )
    write_results(path, [made, untrained, diverged], versions())
    assert pq.read_schema(path).equals(experiment_results.SCHEMA)  # written out there
    row, failed, nan = pq.read_table(path, schema=SCHEMA).to_pylist()
    assert row["total_bytes"] == row["table_bytes"] + row["pointer_bytes"] + 77
    assert (row["entropies"], row["random_entropies"]) == ([3.0, 5.5], [3.2, 6.0])
    assert json.loads(row["config"]) == CONFIG
    assert set(json.loads(row["versions"])) == {"python", "torch", "torchrec", "fbgemm", "numpy", "platform", "cores"}
    assert (row["error"], failed["error"], nan["error"]) == (None, "no room", "diverged")
    given = {
        "name",
        "method",
        "cap",
        "seed",
        "learning_rate",
        "chosen",
        "rate_at_end",
        "error",
        "run",
        "config",
        "versions",
    }
    assert {name for name, value in failed.items() if value is None} == set(SCHEMA.names) - given
    assert math.isnan(nan["test_bce"])
    assert nan["parameters"] == row["parameters"]
