"""Jobs that are killed with SIGKILL at random moments, and run again: the output is that of a job that was not."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.support.launch import Job
from tests.support.remap_folders import Place, contents, write_log
from torchrec_cce.jobs.remap import job as remap_run
from torchrec_cce.jobs.remap.job import RemapReport
from torchrec_cce.workers.inline import InlineEngine

KILLS = 12
WITH_WORKERS = 3
"""So many kills are of jobs whose workers live on for a moment; the others write files themselves, and die at once."""
FILES = 8


def run(raw: Path, output: Path, registry: Path, with_workers: bool) -> RemapReport:
    with pytest.MonkeyPatch.context() as patch:
        if not with_workers:
            patch.setattr(remap_run, "engine_of", lambda *_, **__: InlineEngine(1))
        # gzip is slow: a file takes long enough to be killed in its middle.
        return remap_run.remap(str(raw), str(output), registry=str(registry), compression="gzip", num_workers=1)


def unfinished(folder: Path) -> list[str]:
    return [name for name in contents(folder) if name.endswith(".tmp") or "#" in name]


@pytest.mark.timeout(280)
def test_killed_jobs_go_on(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for number in range(FILES):
        write_log(place.raw / f"day={number % 4}" / f"{number}.parquet", number, rows=20_000, row_group_size=4000)
    cache = {"TORCHREC_CCE_CACHE": str(tmp_path / "cache")}

    kills = 0

    def begin(name: str) -> Job:
        arguments = (place.raw, tmp_path / name, place.registry, kills < WITH_WORKERS)
        return Job(tmp_path / "process", run, *arguments, **cache)

    def outputs(name: str) -> list[Path]:
        return [path for path in (tmp_path / name).rglob("*") if "_remap" not in path.parts and path.is_file()]

    job = Job(tmp_path / "process", run, place.raw, tmp_path / "whole", place.registry, False, **cache)
    job.wait_for(lambda: bool(outputs("whole")))
    began = time.monotonic()
    assert job.wait().code == 0
    seconds = time.monotonic() - began
    whole = contents(tmp_path / "whole")
    assert not unfinished(tmp_path / "whole")

    rng = random.Random(5)
    torn = resumed = round_number = 0
    while kills < KILLS:
        round_number += 1
        output = f"out-{round_number}"
        while True:
            job = begin(output)
            before = len(outputs(output))
            # Half of the kills come while files are written, the others at any moment from the start of the process.
            if rng.random() < 0.5:
                while job.process.is_alive() and len(outputs(output)) <= before:
                    time.sleep(0.002)
            job.process.join(rng.uniform(0, 0.6 * seconds))
            if not job.process.is_alive() or kills == KILLS:
                finished = job.wait()
                assert finished.code == 0, finished.stderr
                resumed += finished.value.skipped_files
                break
            os.kill(job.pid, signal.SIGKILL)
            job.wait()
            kills += 1
            torn += bool(unfinished(tmp_path / output))
            for name, content in contents(tmp_path / output).items():
                if not name.startswith("_remap") and not name.endswith(".tmp"):
                    assert content == whole[name], "a file is there, and not whole"
        assert contents(tmp_path / output) == whole
    print(f"{kills} kills in {round_number} jobs, {torn} left debris, {resumed} files were finished before")
    assert resumed, "no kill came after a file was finished"
