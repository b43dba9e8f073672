"""The remap of whole folders: what is written, what is refused, and that it goes on where it was."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.launch import Job
from tests.support.remap_cases import known_ids, make_map
from tests.support.remap_folders import NAMES, Place, contents, refused, write_log
from torchrec_cce.data.remapped_format import (
    HELPER_POLICIES,
    LAYOUTS,
    HelperPolicy,
    Layout,
    RemappedFormat,
    codes_of,
)
from torchrec_cce.errors import ConfigError, DataFileError, InvalidIDError, JobError, RegistryError
from torchrec_cce.jobs.remap import file as remap_file
from torchrec_cce.jobs.remap import job as remap_run
from torchrec_cce.jobs.remap.check import check_file
from torchrec_cce.jobs.remap.output import read_manifest
from torchrec_cce.maps.store import open_store
from torchrec_cce.workers import engine_of
from torchrec_cce.workers import inline as inline_engine
from torchrec_cce.workers import local as local_engine
from torchrec_cce.workers.inline import InlineEngine


@pytest.fixture
def with_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path)


@pytest.fixture
def place(with_workers: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(remap_run, "engine_of", lambda *_, **__: InlineEngine(1))
    return with_workers


def test_every_file_is_remapped(with_workers: Place) -> None:
    place, seen = with_workers, []
    report = place.run(num_workers=2, inverse_check=True, progress=seen.append)
    found = contents(place.folder / "out")
    assert {name for name in found if not name.startswith("_remap/")} == set(NAMES)
    assert (report.num_files, report.num_rows, report.version, report.skipped_files) == (3, 3000, 1, 0)
    assert 3 * 700 <= report.checked_rows <= 3 * 900
    assert report.num_bytes == sum(len(found[name]) for name in NAMES)
    assert list(dict.fromkeys(one.done_files for one in seen if one.done_files)) == [1, 2, 3]
    assert (seen[-1].rows, seen[-1].done_bytes) == (3000, seen[-1].num_bytes)
    remapper = place.remapper()
    for name in NAMES:
        raw, new = (pq.ParquetFile(root / name) for root in (place.raw, place.folder / "out"))
        assert new.metadata.num_row_groups == raw.metadata.num_row_groups == 4
        table = new.read()
        assert RemappedFormat.of_schema(table.schema, name) == remapper.format
        (batch,) = raw.read().combine_chunks().to_batches()
        assert table.combine_chunks().equals(pa.Table.from_batches([remapper.batch(batch, name)]))
    manifest = json.loads(found["_remap/manifest.json"])["content"]
    assert (manifest["complete"], manifest["num_rows"]) == (True, 3000)
    sizes = {one["name"]: (one["num_rows"], one["num_bytes"]) for one in manifest["files"]}
    assert sizes == {name: (1000, len(found[name])) for name in NAMES}


@pytest.mark.parametrize("file_format", ["parquet", "arrow"])
def test_layouts_and_policies_are_proved(place: Place, file_format: Any) -> None:
    """By the inverse check, which goes another way; and by reading Arrow files a batch for each row group."""
    for layout, helper in [("words", "store"), ("lists", "keep-raw")]:
        output = f"{layout}-{helper}"
        report = place.run(
            output, layout=layout, helper=helper, file_format=file_format, compression="lz4", inverse_check=True
        )
        assert report.checked_rows >= 3 * 700
        remapper = place.remapper(output)
        for name in NAMES:
            raw = pq.ParquetFile(place.raw / name)
            path = place.folder / output / name
            if file_format == "arrow":
                reader = pa.ipc.open_file(path.with_suffix(".arrow"))
                batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
                assert [len(batch) for batch in batches] == [300, 300, 300, 100]
                new = pa.Table.from_batches(batches)
            else:
                new = pq.read_table(path, partitioning=None)
            (batch,) = raw.read().combine_chunks().to_batches()
            assert new.combine_chunks().equals(pa.Table.from_batches([remapper.batch(batch, name)]))


@pytest.mark.parametrize(("layout", "helper"), [("words", "store"), ("lists", "drop")])
def test_pointers_of_4_bits_are_those_of_8(place: Place, layout: Layout, helper: HelperPolicy) -> None:
    """In words there are 16 in place of 8; lists are the same files, but for what they say of the map."""
    read = {}
    for nibbles in (False, True):
        place.publish(num_columns=9, num_rows=16, nibbles=nibbles)
        output = f"{layout}-{nibbles}"
        report = place.run(output, layout=layout, helper=helper, inverse_check=True)
        assert report.checked_rows >= 3 * 700
        found = place.remapper(output)
        key, other = "user@t_user", "user@t_item"
        feature = found.format.features[key]
        packs = nibbles and layout == "words"
        assert feature.pointer_dtype == ("uint4" if packs else "uint8")
        assert found.format.format == (2 if packs else 1)
        assert found.format.features[other].pointer_dtype == "uint16"
        table = pq.read_table(place.folder / output / NAMES[0], partitioning=None)
        codes = []
        for names in filter(None, (feature.pointers, feature.helpers)):
            assert len(names) == (2 if layout == "words" and not nibbles else 1)
            columns = [table.column(name).combine_chunks() for name in names]
            codes.append(codes_of([column.drop_null() for column in columns], feature, layout))
        read[nibbles] = np.stack(codes), table.column(feature.pointers[0]).is_null()
    np.testing.assert_array_equal(read[True][0], read[False][0])
    assert read[True][1].equals(read[False][1])


@pytest.mark.parametrize("file_format", ["parquet", "arrow"])
def test_ids_that_a_map_does_not_know_are_counted(place: Place, file_format: Any) -> None:
    """In the report, in the manifest and in the records of files, from which a job goes on."""
    known = set(known_ids(make_map(2, num_columns=5, keys=True, unseen="hash")))
    expected = {"item": 0, "user@t_item": 0}
    for name in NAMES:
        raw = pq.read_table(place.raw / name, partitioning=None)
        expected["item"] += sum(one not in known for cell in raw.column("item").to_pylist() for one in cell)
        expected["user@t_item"] += sum(one is not None and one not in known for one in raw.column("user").to_pylist())
    assert min(expected.values()) > 100
    assert place.run(file_format=file_format).unseen == expected
    assert read_manifest(open_store(place.folder / "out")).unseen == expected
    (place.folder / "out" / "_remap" / "manifest.json").unlink()
    assert place.run(file_format=file_format).unseen == expected


def test_all_combinations_are_there() -> None:
    assert LAYOUTS == ("words", "lists")
    assert HELPER_POLICIES == ("drop", "store", "keep-raw")


def test_the_bytes_do_not_depend_on_workers(with_workers: Place, place: Place) -> None:
    """Five of them, for three files, use threads within a file."""
    place.run("one")
    place.run("some", input=str(place.raw / "day=1/*.parquet"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remap_run, "engine_of", engine_of)
        with_workers.run("five", num_workers=5)
    one, five, some = (contents(place.folder / name) for name in ("one", "five", "some"))
    for name in NAMES:
        assert one[name] == five[name]
    assert {name for name in some if name.endswith(".parquet")} == {"a.parquet", "b.parquet"}
    assert some["a.parquet"] == one["day=1/a.parquet"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("day=2/hour=0/a.parquet", ["a.parquet"]),
        ("day=1", ["a.parquet", "b.parquet"]),
        ("day=*/a.parquet", ["day=1/a.parquet"]),
        ("**/a.parquet", ["day=1/a.parquet", "day=2/hour=0/a.parquet"]),
        ("day=[2-9]/**/*.parquet", ["day=2/hour=0/a.parquet"]),
    ],
)
def test_what_is_read(place: Place, pattern: str, names: list[str]) -> None:
    from torchrec_cce.jobs.remap.input import list_input

    _, files = list_input(f"{place.raw}/{pattern}", {})
    assert [one.name for one in files] == names


def test_a_job_goes_on(place: Place) -> None:
    """A file that cannot be remapped ends the job; the others stay, and are not made again."""
    bad = place.raw / NAMES[2]
    good = bad.read_bytes()
    table = pq.read_table(bad, partitioning=None)
    ids = np.where(np.arange(1000) == 700, 99, 3)
    pq.write_table(table.set_column(1, "user", pa.array(ids)), bad, row_group_size=300)
    message = refused(InvalidIDError, place.run)
    assert f"{NAMES[2]}: column 'user', row 700 (the first is 0) holds raw ID 99" in message
    before = contents(place.folder / "out")
    assert "_remap/manifest.json" not in before
    assert not any(name.endswith(".tmp") for name in before)
    message = refused(JobError, lambda: read_manifest(open_store(place.folder / "out")))
    assert "the job has not finished; run it again" in message

    (place.folder / "out" / "day=1" / ".x.parquet.12345678.tmp").write_text("of a process that was killed")
    (place.folder / "out" / "_remap" / "files" / "y.json#1234").write_text("of a process that was killed")
    version = place.publish(unseen="hash")
    message = refused(JobError, place.run)
    assert f"is the output of another job: version {version}, not 1" in message
    report = place.run("new")
    assert (report.version, report.num_files) == (version, 3)
    bad.write_bytes(good)
    message = refused(JobError, lambda: place.run(version=1))
    assert message.endswith(f"input file {NAMES[2]} has changed. Choose a new folder, or run the job that it is of")


def test_finished_files_are_not_made_again(place: Place) -> None:
    place.run()
    out = place.folder / "out"
    before = contents(out)
    report = place.run()
    assert (report.skipped_files, report.num_rows) == (3, 3000)
    (out / "_remap" / "manifest.json").unlink()
    (record,) = (path for path in (out / "_remap" / "files").iterdir() if NAMES[1] in path.read_text())
    record.unlink()
    (out / NAMES[1]).write_bytes(b"half")
    (out / "day=1" / ".b.parquet.12345678.tmp").write_text("debris")
    (out / "_remap" / "files" / "y.json#1234").write_text("debris")
    assert place.run().skipped_files == 2
    assert contents(out) == before
    (out / NAMES[0]).unlink()
    assert f"{NAMES[0]}: was finished with" in refused(JobError, place.run)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"helper": "store"}, "helper store, not drop"),
        ({"layout": "lists"}, "layout lists, not words"),
        ({"compression": "lz4"}, "compression lz4, not zstd"),
        ({"file_format": "arrow"}, "file_format arrow, not parquet"),
        ({"features": {"item": "item"}}, "feature user"),
    ],
)
def test_another_job_is_refused(place: Place, options: dict[str, Any], said: str) -> None:
    place.run(version=1)
    before = contents(place.folder / "out")
    assert said in refused(JobError, lambda: place.run(**options))
    assert contents(place.folder / "out") == before


def test_what_cannot_work_is_said_before_anything_is_written(place: Place) -> None:
    place.publish()
    for options, kind, said in [
        ({"layout": "bits"}, ConfigError, "layout='bits' is not one of words, lists"),
        ({"file_format": "arrow", "compression": "snappy"}, ConfigError, "'snappy' is not one of zstd, lz4, none"),
        ({"features": {"nobody": "user"}}, ConfigError, "features ['nobody'] are not among those of version 2"),
        ({"version": 9}, RegistryError, "9"),
        ({"input": str(place.folder / "none")}, DataFileError, "none: no such file or folder"),
        ({"input": f"{place.raw}/x*"}, DataFileError, "x*: no file matches"),
        ({"input": str(place.registry)}, DataFileError, "no *.parquet in this folder or below it"),
        ({"features": {"user": "day"}}, DataFileError, "'day', the column of feature 'user', is a key of its folders"),
        ({"features": {"user": "day"}}, DataFileError, "or leave the feature out of `features`"),
        ({"output": "raw/new"}, ConfigError, "lie in one another; choose a folder beside the input"),
        ({"output": "."}, ConfigError, "lie in one another; choose a folder beside the input"),
        ({"output": "registry"}, JobError, "registry: holds other data than a remap job's; choose a new folder"),
    ]:  # fmt: skip
        before = contents(place.folder)
        assert said in refused(kind, lambda: place.run(**options))  # noqa: B023
        after = contents(place.folder)
        assert {
            name for name in after if name not in before and "out/_remap" not in name and "cache" not in name
        } == set()
        shutil.rmtree(place.folder / "out", ignore_errors=True)


def test_files_that_are_no_raw_data(place: Place) -> None:
    (place.raw / NAMES[1]).write_bytes((place.raw / NAMES[1]).read_bytes()[:-50])
    message = refused(DataFileError, lambda: place.run("cut"))
    assert f"{NAMES[1]}: cannot be read as Parquet (" in message
    pq.write_table(pa.table({"user": [1], "label": [0]}), place.raw / NAMES[1])
    message = refused(DataFileError, lambda: place.run("missing"))
    assert f"{NAMES[1]}: there is no column 'item'" in message


def test_feature_of_another_column(place: Place) -> None:
    for name in NAMES:
        path = place.raw / name
        table = pq.ParquetFile(path).read()
        pq.write_table(table.rename_columns({"user": "user_id"}), path)
    place.run(features={"user": "user_id"}, inverse_check=True)
    names = pq.read_schema(place.folder / "out" / NAMES[0]).names
    pointers = ["user@t_user.pointers", "user@t_item.pointers.0", "user@t_item.pointers.1"]
    assert names == ["label", *pointers, "item", "text"]


def test_the_inverse_check_finds_what_is_wrong(place: Place) -> None:
    place.run(helper="keep-raw")
    remapper = place.remapper()
    source, output = open_store(place.raw), open_store(place.folder / "out")
    name, path = NAMES[0], place.folder / "out" / NAMES[0]
    good = pq.ParquetFile(path).read()

    def check(column: str, wrong: pa.Array) -> str:
        at = good.schema.get_field_index(column)
        table = good.set_column(at, good.schema.field(at), wrong)
        pq.write_table(table.replace_schema_metadata(good.schema.metadata), path, row_group_size=300)
        return refused(DataFileError, lambda: check_file(source, name, output, name, remapper))

    assert check_file(source, name, output, name, remapper) in (700, 900)
    pointers = good.column("user@t_user.pointers")
    wrong = pa.array([None if one is None else one ^ 1 for one in pointers.to_pylist()], pa.int64())
    assert "the map of table 't_user' gives" in check("user@t_user.pointers", wrong)
    nulls = pa.array([None] * 1000, pa.int64())
    assert "column 'user', row " in check("user@t_user.pointers", nulls)
    assert "column 'text', row " in check("text", pa.array(["y"] * 1000))
    assert "column 'user', row " in check("user", pa.array([7] * 1000))
    swapped = pa.array([(one or [])[:-1] for one in good.column("item").to_pylist()], good.schema.field("item").type)
    assert "column 'item', row " in check("item", swapped)


def limited(place: Place, limit: int) -> str:
    """In a process of its own: files cannot grow beyond `limit` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        place.run()
    except JobError as error:
        return str(error)
    return "finished"


def test_a_full_disk(place: Place) -> None:
    """Nothing half is left, and with room the job goes on."""
    place.run("whole")
    largest = max(len(content) for name, content in contents(place.folder / "whole").items() if name in NAMES)
    finished = Job(
        place.folder / "process", limited, place, largest - 1, TORCHREC_CCE_CACHE=str(place.folder / "cache")
    ).wait()
    assert (
        "cannot be written (File too large); what is finished stays, make room and run the job again" in finished.value
    )
    assert not any(name.endswith(".tmp") for name in contents(place.folder / "out"))
    place.run()
    assert contents(place.folder / "out") == contents(place.folder / "whole")


def hold(place: Place) -> None:
    from torchrec_cce.jobs.remap.output import OutputFolder

    folder = OutputFolder(open_store(place.folder / "out"))
    with folder._locked():
        (place.folder / "held").touch()
        signal.pause()


def test_two_jobs_at_once(place: Place) -> None:
    """The second is told; when the first has died, it may work."""
    place.run()
    job = Job(place.folder / "process", hold, place)
    job.wait_for((place.folder / "held").exists)
    message = refused(JobError, place.run)
    assert f"another process is at work in this folder: process {job.pid} on " in message
    assert "; wait for it, or end it" in message
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert place.run().skipped_files == 3


def test_another_registry_under_the_same_name(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of the same number and another manifest, as after a registry was made anew while a job ran."""
    begin = remap_run.remapped_format

    def begin_and_replace(*arguments: Any) -> RemappedFormat:
        remapped = begin(*arguments)
        shutil.rmtree(place.registry)
        place.publish()
        remap_file._OPENED.clear()  # as in a worker, which has not opened it yet
        return remapped

    monkeypatch.setattr(remap_run, "remapped_format", begin_and_replace)
    message = refused(RegistryError, place.run)
    assert "is not the version of that number with which this job began (manifest " in message


@pytest.mark.parametrize("num_files", [1, 2])
def test_progress_within_a_file(with_workers: Place, monkeypatch: pytest.MonkeyPatch, num_files: int) -> None:
    """By row groups, while nothing is finished, in this process and in a worker; and it never goes back."""
    place, seen = with_workers, []
    for module in (local_engine, inline_engine):
        monkeypatch.setattr(module, "TICK_S", 0.002)
    folder = place.folder / "large"
    for number in range(num_files):
        write_log(folder / f"{number}.parquet", 5, rows=20_000, row_group_size=50)
    place.run("out", input=str(folder), num_workers=1, progress=seen.append)
    within = [one for one in seen if one.done_files == 0 and one.rows > 0]
    assert len({one.rows for one in within}) > 3
    size = (folder / "0.parquet").stat().st_size
    for one in within:
        assert one.rows % 50 == 0
        assert (one.num_files, one.num_bytes) == (num_files, num_files * size)
        assert one.done_bytes == size * one.rows // 20_000
    assert seen == sorted(seen, key=lambda one: (one.rows, one.done_bytes, one.done_files))
    assert (seen[-1].rows, seen[-1].done_bytes, seen[-1].done_files) == (
        20_000 * num_files,
        num_files * size,
        num_files,
    )


def test_a_single_file_takes_no_worker(with_workers: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are those of a worker; what this process has set stays."""
    place = with_workers
    options = {"input": str(place.raw / "day=1"), "file_format": "arrow", "num_workers": 2}
    place.run("many", **options)
    monkeypatch.setattr(local_engine.LocalEngine, "run", lambda *_, **__: pytest.fail("a worker"))
    threads = pa.cpu_count()
    place.run("one", **options | {"input": str(place.raw / NAMES[0])})
    assert contents(place.folder / "one")["a.arrow"] == contents(place.folder / "many")["a.arrow"]
    assert pa.cpu_count() == threads
    pq.write_table(pa.table({"user": [99], "item": [[0]]}), place.raw / NAMES[0])
    assert "row 0" in refused(
        InvalidIDError, lambda: place.run("bad", **options | {"input": str(place.raw / NAMES[0])})
    )
    assert not (place.folder / "bad" / "a.arrow").exists()


def test_a_job_does_not_wait_for_pandas(place: Place) -> None:
    """Which pyarrow would import, if it is installed, to no end where columns are not decoded."""
    program = (
        "import sys; from torchrec_cce.jobs.remap.job import remap\n"
        "remap(sys.argv[1], sys.argv[2], registry=sys.argv[3], features={'user': 'user'})\n"
        "assert 'pandas' not in sys.modules"
    )
    where = [place.raw / NAMES[0], place.folder / "out", place.registry]
    done = subprocess.run([sys.executable, "-c", program, *where], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (place.folder / "out" / "a.parquet").exists()


def test_raw_ids_that_do_not_tell_what_the_map_knows(place: Place) -> None:
    place.publish(unseen="first_row")
    with pytest.raises(ConfigError, match=r"the map of table 't_user' knows.*take store or drop"):
        place.run(helper="keep-raw")
    assert place.run(helper="store").num_files == len(NAMES)


def test_the_inverse_check_takes_what_the_job_takes(place: Place) -> None:
    """Two columns of one name, NaN in any depth, times that Python has no type for, a column called as a new one is."""
    nan = float("nan")
    columns = {
        "x": pa.array([1, 2]),
        "user": pa.array([3, None]),
        "times": pa.array([2**62, None], pa.timestamp("ns")),
        "half": pa.array([nan, 1.5], pa.float16()),
        "lists": pa.array([[nan, None], None]),
        "map": pa.array([[("a", nan)], None], pa.map_(pa.string(), pa.float64())),
        "nested": pa.array([{"a": [nan]}, None]),
        "view": pa.array(["a", None], pa.string_view()),
        "shop": pa.array(["a", None]).dictionary_encode(),
    }
    names = [*columns, "x", "user.x"]
    log = pa.Table.from_arrays([*columns.values(), pa.array([3.0, nan]), pa.array([4, 5])], names=names)
    path = place.folder / "odd.parquet"
    pq.write_table(log, path)
    for helper in HELPER_POLICIES:
        for file_format in ("parquet", "arrow"):
            report = place.run(
                f"{helper}-{file_format}", input=str(path), helper=helper, file_format=file_format, compression="lz4",
                inverse_check=True,
            )  # fmt: skip
            assert report.checked_rows == 2
    remapper = place.remapper(f"{helper}-parquet")
    other = log.set_column(9, "x", pa.array([3.0, 1.0]))
    pq.write_table(other, path)
    source, output = open_store(place.folder), open_store(place.folder / f"{helper}-parquet")
    found = refused(DataFileError, lambda: check_file(source, "odd.parquet", output, "odd.parquet", remapper))
    assert "column 'x', row 1 (the first is 0) is not as in the raw file" in found
