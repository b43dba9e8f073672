"""Ranks killed by SIGKILL under torchrun: training restarts from its checkpoint and ends as if nothing happened."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.support import runs
from tests.support.launch import Job
from tests.support.runs import assert_equal_metrics, maps_of
from tests.support.torchrun import torchrun
from torchrec_cce.maps.registry import Registry
from torchrec_cce.training import checkpoint, loop
from torchrec_cce.training.config import RunConfig

Moment = Callable[[Path, list[int]], bool]
"""Whether it has come, from the test's folder and the pids of the ranks."""


def saving(folder: Path, _: list[int]) -> bool:
    """A checkpoint is being written."""
    return any((folder / "run" / "checkpoints").glob(".step-*"))


def publishing(folder: Path, _: list[int]) -> bool:
    """A version is being written that no record names yet."""
    versions, records = (list((folder / "registry").glob(pattern)) for pattern in ("versions/*", "log/*.json"))
    return len(versions) > len(records)


def reclustering(_: Path, pids: list[int]) -> bool:
    """New pointers are being written: beside that of the frequencies, another file without a name is mapped."""
    for pid in pids:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            if len({line.split("/live/")[1] for line in lines if "/live/" in line and " rw-s " in line}) > 1:
                return True
    return False


def assert_undisturbed(folder: Path, expected: Path) -> None:
    """The metrics of a run that nobody killed, and a checkpoint and a registry whose parts belong together."""
    kinds = {"train", "validation", "test", "recluster"}
    found, wanted = ([r for r in runs.metrics(one) if r["kind"] in kinds] for one in (folder / "run", expected))
    assert_equal_metrics(wanted, found, 1e-6)
    tables, undisturbed = maps_of(folder / "run"), maps_of(expected)
    registry = Registry(folder / "registry", cache=folder / "cache")
    assert registry.verify() == []
    current = registry.open().tables
    assert {name: table.pointer_map.digest for name, table in tables.items()} == {
        name: table.pointer_map.digest for name, table in current.items()
    }
    published = Registry(expected.parent / "registry", cache=folder / "cache").open().tables
    for found_tables, wanted_tables in ((tables, undisturbed), (current, published)):
        assert found_tables.keys() == wanted_tables.keys()
        for name, table in found_tables.items():
            np.testing.assert_array_equal(table.frequencies, wanted_tables[name].frequencies)  # type: ignore[arg-type]
    assert not any((folder / "cache" / "live").iterdir())
    assert not list((folder / "run" / "checkpoints").glob(".step-*"))


def config_of(folder: Path, log: Path, **training: int) -> RunConfig:
    return runs.criteo_config(
        log,
        registry={"url": str(folder / "registry")},
        training={"batch_size": runs.BATCH_SIZE, "evaluate_every": 50, "checkpoint_every": 10, **training},
        recluster={"ct": 3, "cf": 8, "weigh_by_frequency": True},
    )


def undisturbed(folder: Path, config: RunConfig) -> Path:
    finished = Job(folder / "job", loop.train, config, folder / "undisturbed").wait()
    assert finished.code == 0, finished.stderr
    return folder / "undisturbed"


@pytest.mark.timeout(300)
def test_killed_while_saving_while_publishing_and_while_reclustering(log: Path, tmp_path: Path) -> None:
    (tmp_path / "killed").mkdir()
    choose = random.Random(0)
    moments: list[Moment] = [reclustering, publishing, saving]
    reached = 0
    with torchrun(tmp_path / "killed", config_of(tmp_path / "killed", log), "--restartable", max_restarts=10) as run:
        assert run.wait_for(lambda: checkpoint.exists(run.folder / "run")), "from which the ranks go on"
        for moment in moments:
            reached += run.wait_for(lambda now=moment: now(run.folder, run.ranks()))  # type: ignore[misc]
            run.kill_a_rank(choose)
    assert reached == len(moments)
    assert_undisturbed(tmp_path / "killed", undisturbed(tmp_path, config_of(tmp_path, log)))


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_killed_thirty_times_at_random_moments(tmp_path: Path) -> None:
    log = runs.write_criteo_log(tmp_path / "log.tsv")
    (tmp_path / "killed").mkdir()
    choose = random.Random(1)
    kills = 0
    with torchrun(
        tmp_path / "killed", config_of(tmp_path / "killed", log, epochs=200), "--restartable", max_restarts=60
    ) as run:
        while kills < 30:
            before = run.measured()
            started = run.wait_for(lambda start=before: run.measured() not in (0, start))  # type: ignore[misc]
            time.sleep(choose.uniform(0, 2))
            if not started or not run.job.process.is_alive():
                break
            run.kill_a_rank(choose)
            kills += 1
    assert kills == 30, "the run ended before; give it more epochs"
    assert_undisturbed(tmp_path / "killed", undisturbed(tmp_path, config_of(tmp_path, log, epochs=200)))
