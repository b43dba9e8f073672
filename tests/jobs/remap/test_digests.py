"""Finished files are those that were written: when a job goes on, and when they are verified."""

import json
from pathlib import Path

import pytest

from tests.support.remap_folders import NAMES, Place, refused, write_log
from torchrec_cce.errors import JobError
from torchrec_cce.jobs.remap import job as remap_job
from torchrec_cce.jobs.remap.output import verify
from torchrec_cce.maps.sealed import seal, sha256_of
from torchrec_cce.workers.inline import InlineEngine


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHREC_CCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(remap_job, "engine_of", lambda *_, **__: InlineEngine(1))
        yield Place(tmp_path_factory.mktemp("place"))


def records(out: Path) -> list[Path]:
    return [*(out / "_remap" / "files").iterdir(), out / "_remap" / "manifest.json"]


@pytest.mark.parametrize("file_format", ["parquet", "arrow"])
def test_a_changed_byte_is_found(once: Place, file_format: str) -> None:
    once.run(file_format, file_format=file_format)
    out = once.folder / file_format
    manifest = verify(str(out))
    assert len(manifest.files) == 3
    assert {file.sha256 for file in manifest.files} == {sha256_of(out / file.name) for file in manifest.files}
    path = out / manifest.files[1].name
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    said = f"{manifest.files[1].name}: was finished with SHA-256"
    assert said in refused(JobError, lambda: verify(str(out)))
    assert said in refused(JobError, lambda: once.run(file_format, file_format=file_format))
    path.unlink()
    assert "is gone" in refused(JobError, lambda: verify(str(out)))
    path.write_bytes(data)
    assert once.run(file_format, file_format=file_format).skipped_files == 3


def test_a_file_that_is_not_the_jobs(once: Place) -> None:
    once.run("strange")
    out = once.folder / "strange"
    (out / "_SUCCESS.parquet").write_text("passed over by readers")
    assert verify(str(out)).num_rows == 3000
    write_log(out / "day=1" / "c.parquet", 3)
    assert "day=1/c.parquet: the job has not written it" in refused(JobError, lambda: verify(str(out)))


def test_a_job_that_has_not_finished(once: Place) -> None:
    once.run("half")
    (once.folder / "half" / "_remap" / "manifest.json").unlink()
    assert "the job has not finished" in refused(JobError, lambda: verify(str(once.folder / "half")))


def test_records_of_format_1(once: Place) -> None:
    """They have no digests; a job goes on from them all the same, and sizes are compared."""
    once.run("older")
    out = once.folder / "older"
    for path in records(out):
        content = json.loads(path.read_text())["content"]
        for each in (content, *content.get("files", [])):
            each["format"] = 1
            each.pop("sha256", None)
        path.write_bytes(seal(content))
    assert [file.sha256 for file in verify(str(out)).files] == [None] * 3
    assert once.run("older").skipped_files == 3
    record = next(path for path in records(out) if NAMES[0] in path.read_text())
    record.unlink()
    (out / "_remap" / "manifest.json").unlink()
    assert once.run("older").skipped_files == 2
    (out / NAMES[1]).write_bytes(b"short")
    assert "and now has 5" in refused(JobError, lambda: verify(str(out)))
