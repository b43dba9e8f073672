"""Results files, written and read back."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support import experiment_results
from tests.support.bench_plans import plan
from tests.support.outcomes import SIZES, outcome
from torchrec_cce.errors import DataFileError
from torchrec_cce.experiments.agenda import Key, Record, Setting
from torchrec_cce.experiments.outcome import Entropies, Outcome
from torchrec_cce.experiments.results import COLUMNS, SCHEMA, read_outcomes, versions, write_results
from torchrec_cce.experiments.trial import Ended


def record(tmp_path: Path, ended: Ended, *, chosen: bool = True) -> Record:
    given = plan(tmp_path / "log.tsv", {"method": "cce", "name": "cce, 4 columns"})
    config = given.configure(given.methods[0], cap=800, seed=3, learning_rate=0.1)
    return Record(
        key=Key(setting=Setting(entry="cce, 4 columns", cap=800), learning_rate=0.1, seed=3),
        method="cce",
        chosen=chosen,
        rate_at_end=False,
        config=config,
        run="cce-3-0",
        ended=ended,
    )


@pytest.fixture
def made(tmp_path: Path) -> Outcome:
    return outcome(
        tmp_path,
        "cce",
        name="cce, 4 columns",
        seed=3,
        learning_rate=0.1,
        validation_auc=0.65,
        sizes=replace(SIZES, largest_table="C1", device_pointer_bytes=77),
        entropies={"C1": Entropies(learned=(3.0, 5.5), random=(3.2, 6.0))},
    )


def test_outcomes_are_read_back(tmp_path: Path, made: Outcome) -> None:
    made = replace(made, run_dir=str(tmp_path / "runs" / "cce-3-0"))
    others = [record(tmp_path, Ended(outcome=made), chosen=False), record(tmp_path, Ended(error="no room"))]
    path = tmp_path / "results.parquet"
    write_results(path, [record(tmp_path, Ended(outcome=made)), *others], versions())
    assert read_outcomes(path, tmp_path / "runs") == [made]


def test_a_row_has_what_is_documented(tmp_path: Path, made: Outcome) -> None:
    path = tmp_path / "results.parquet"
    diverged = replace(made, bce=math.nan)
    write_results(
        path,
        [
            record(tmp_path, Ended(outcome=made)),
            record(tmp_path, Ended(error="no room")),
            record(tmp_path, Ended(outcome=diverged, error="diverged")),
        ],
        versions(),
    )
    assert tuple(SCHEMA.names) == COLUMNS
    assert pq.read_schema(path).equals(experiment_results.SCHEMA)  # written out there
    row, failed, nan = pq.read_table(path, schema=SCHEMA).to_pylist()
    assert row["total_bytes"] == row["table_bytes"] + row["pointer_bytes"] + 77
    assert (row["entropies"], row["random_entropies"]) == ([3.0, 5.5], [3.2, 6.0])
    assert json.loads(row["config"])["embedding"]["max_parameters"] == 800
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


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.parquet").write_text("none")
    with pytest.raises(DataFileError, match=r"results\.parquet"):
        read_outcomes(tmp_path / "results.parquet", tmp_path)
