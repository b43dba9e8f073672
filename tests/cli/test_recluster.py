"""`torchrec-cce recluster` as a scheduler and the person who is paged run it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from tests.support import nights
from tests.support.launch import Job, command
from tests.support.nights import Night
from torchrec_cce.cli.main import app, main
from torchrec_cce.jobs.recluster import job as job_module
from torchrec_cce.jobs.recluster import report as report_module
from torchrec_cce.training.versions import snapshot_of_run

LOOSE = ("--max-churn", "1", "--min-learned", "0", "--max-objective-ratio", "2")


@pytest.fixture
def night(trained: Path, tmp_path: Path) -> Night:
    return Night(tmp_path, trained)


def arguments(night: Night, *options: str | Path) -> list[str]:
    named = ["--registry", night.folder / "registry", "--checkpoint", night.run, "--output-checkpoint", night.output]
    return [str(each) for each in ("recluster", *named, "--workers", "1", *LOOSE, *options)]


def run(night: Night, *options: str | Path, code: int = 0) -> Any:
    """In this process, by an engine without processes."""
    with mock.patch.object(job_module, "engine_of", return_value=nights.InlineEngine()):
        done = CliRunner().invoke(app, arguments(night, *options))
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done


def test_a_night(night: Night, trained: Path) -> None:
    """By a worker process, as a scheduler runs it: everything on stdout is one JSON value."""
    options = ("--validate", trained.parent / "log.tsv", "--report", night.folder / "report", "--json")
    done = command(night.folder / "process", *arguments(night, *options)).wait()
    assert done.code == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["status"], said["parent"], said["version"]) == ("published", 1, 2)
    assert {gate["threshold"] for gate in said["gates"]} == {
        "min_h1",
        "min_h2_gain",
        "min_learned",
        "max_error",
        "max_objective_ratio",
        "max_churn",
        "max_unseen",
        "max_bce_ratio",
    }
    assert said["before"]["bce"] > 0 < said["after"]["bce"]
    assert night.registry.open().version == 2
    page = (night.folder / "report" / "report.html").read_text()
    assert page.count("<img ") == 4
    assert "max_" not in page
    assert "C2" in page
    assert json.loads((night.folder / "report" / "report.json").read_text()) == said
    assert {path.name for path in (night.folder / "report").glob("*.png")} == {
        "entropies.png",
        "errors.png",
        "sizes-0000.png",
        "sizes-0001.png",
    }
    again = run(night)
    assert "there already: version 2, made from version 1" in again.stdout


def test_what_people_read(night: Night) -> None:
    said = run(night).stdout
    assert f"published version 2, made from version 1; train on from {night.output}" in said
    assert [line for line in said.splitlines() if line.startswith("churn") and "≤ 1" in line and "open" in line]


def test_a_closed_gate(night: Night) -> None:
    done = run(night, "--min-h1", "1.5", "--report", night.folder / "report", code=3)
    assert "CLOSED" in done.stdout
    assert "2 gates are closed: nothing was published, version 1 is what it was" in done.stdout
    assert (night.folder / "report" / "report.html").exists()
    assert night.versions == [1]
    assert not night.output.exists()
    done = run(night, "--min-h1", "1.5", "--force", "--json")
    assert json.loads(done.stdout)["forced"]


def test_errors(night: Night, tmp_path: Path) -> None:
    done = run(night, "--checkpoint", tmp_path / "nothing", "--json", code=1)
    error = json.loads(done.stdout)
    assert error["status"] == "error"
    assert "neither the folder of a run" in error["error"]
    assert f"error: {error['error']}" in done.stderr
    run(night, "--memory", "1KiB", code=1)
    for usage in (["--memory", "much"], ["--workers", "0"], ["--engine", "slurm"], ["--min-h1", "-1"], ["--nonsense"]):
        assert run(night, *usage, code=2).stdout == ""
    night.assert_untouched()


def test_conflicts(night: Night, tmp_path: Path) -> None:
    assert "there is no such folder" in run(night, "--registry", tmp_path / "nothing", code=4).stderr
    night.registry.publish(snapshot_of_run(night.run).tables | {}, parent=1)
    run(night, "--registry", tmp_path / "registry")  # the same maps, published again
    night.registry.rollback(1)
    night.registry.publish(night.registry.open(3).tables)
    done = run(night, "--output-checkpoint", tmp_path / "second", "--json", code=4)
    assert "but current is version 4" in json.loads(done.stdout)["error"]


def test_a_dry_run(night: Night) -> None:
    done = run(night, "--dry-run")
    assert "k-means" in done.stdout
    assert "memory:" in done.stdout
    assert "min_h1 0.5" in done.stdout
    assert json.loads(run(night, "--dry-run", "--json").stdout)["parent"] == 1
    night.assert_untouched()


def test_a_report_without_its_libraries(night: Night) -> None:
    with mock.patch.object(report_module, "require", side_effect=report_module.MissingExtraError("no matplotlib")):
        done = run(night, "--report", night.folder / "report")
    assert "warning: no page in" in done.stderr
    assert [path.name for path in (night.folder / "report").iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written(night: Night) -> None:
    (night.folder / "report").touch()
    assert "warning: no page in" in run(night, "--report", night.folder / "report").stderr
    assert night.versions == [1, 2]


def hang(marker: Path) -> None:
    """A task that does not end; it says which process works on it."""
    marker.with_suffix(".tmp").write_text(str(os.getpid()))
    marker.with_suffix(".tmp").rename(marker)
    time.sleep(600)


def work_for_ever(arguments: list[str], marker: Path) -> None:
    """The command, with a clustering that does not end."""
    with mock.patch.object(job_module, "cluster", lambda _, engine, **__: list(engine.run(hang, [marker]))):
        sys.argv = ["torchrec-cce", *arguments]
        main()


@pytest.fixture
def job(night: Night) -> Job:
    """A process whose worker is at work."""
    marker = night.folder / "process" / "worker"
    job = Job(night.folder / "process", work_for_ever, arguments(night), marker)
    job.wait_for(marker.exists)
    return job


def test_a_worker_that_vanishes(night: Night, job: Job) -> None:
    os.kill(int((job.folder / "worker").read_text()), signal.SIGKILL)
    done = job.wait()
    assert done.code == 1
    assert "a worker process vanished" in done.stderr
    assert "Traceback" not in done.stderr
    night.assert_untouched()


def test_ctrl_c(night: Night, job: Job) -> None:
    os.kill(job.pid, signal.SIGINT)
    done = job.wait()
    assert done.code == 130, done.stderr
    assert "interrupted; run the same command again" in done.stderr
    night.assert_untouched()


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from torchrec_cce.cli.main import app\n"
        "try: app(['recluster', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--output-checkpoint" in done.stdout
