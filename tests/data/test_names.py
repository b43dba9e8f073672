"""Which files a path means: the same ones to whoever reads it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_cce.data.names import meant, walk
from torchrec_cce.data.parquet import num_rows, parquet_files, read_parquet
from torchrec_cce.data.remapped import remapped_files
from torchrec_cce.data.vocabulary import build_vocabulary
from torchrec_cce.errors import DataFileError, RegistryError
from torchrec_cce.jobs.remap.input import list_input
from torchrec_cce.maps.store import open_store

HIDDEN = (
    *("_x.parquet", ".x.parquet", "._x.parquet", "_temporary/0/x.parquet", ".tmp/x.parquet", "part.parquet/_x.parquet"),
    *("a/.x/y.parquet", "_delta_log/0.checkpoint.parquet"),
)
SEEN = ("a.parquet", "a/b.parquet", "a/c/d.parquet", "a-b/e.parquet", "part.parquet/part-0.parquet")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    for name in (*HIDDEN, *SEEN):
        path = tmp_path / "log" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"label": [0, 1], "user": [len(name), 2]}), path)
    (tmp_path / "log" / "_SUCCESS").touch()
    (tmp_path / "log" / "notes.txt").touch()
    (tmp_path / "log" / "a" / "round").symlink_to(tmp_path / "log")
    return tmp_path / "log"


def seen_by_all(path: Path | str, root: Path) -> list[str]:
    """Names of the files that all readers agree on."""
    training, remapped = parquet_files(path), remapped_files(path)
    folder, files = list_input(str(path), {})
    assert training == remapped
    assert sorted(training) == sorted(Path(folder, file.name) for file in files)
    assert build_vocabulary(path, columns=["user"]).report.rows == num_rows(path) == 2 * len(training)
    assert sum(map(len, read_parquet(path, label="label", ids={"user": "user"}))) == 2 * len(training)
    return [file.relative_to(root).as_posix() for file in training]


def test_a_folder_is_the_same_to_all(log: Path) -> None:
    assert seen_by_all(log, log) == ["a/b.parquet", "a/c/d.parquet", "a-b/e.parquet", "a.parquet", SEEN[-1]]
    assert seen_by_all(log / "part.parquet", log) == [SEEN[-1]]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.parquet", ["a.parquet", SEEN[-1]]),
        ("*/*.parquet", ["a/b.parquet", "a-b/e.parquet", SEEN[-1]]),
        ("a*", ["a/b.parquet", "a/c/d.parquet", "a-b/e.parquet", "a.parquet"]),
        ("**/[bd].parquet", ["a/b.parquet", "a/c/d.parquet"]),
        ("_x*", ["_x.parquet"]),
        (".[_x]*.parquet", [".x.parquet", "._x.parquet"]),
        ("_temporary/*", ["_temporary/0/x.parquet"]),
    ],
)
def test_a_pattern_is_the_same_to_all(log: Path, pattern: str, names: list[str]) -> None:
    assert sorted(seen_by_all(log / pattern, log)) == sorted(names)


@pytest.mark.parametrize("name", ["log[1].parquet", "log*.parquet", "what?.parquet", "a%20b.parquet", "[x]"])
def test_a_path_that_is_there_is_no_pattern(log: Path, name: str) -> None:
    path = log / name / "in.parquet" if name == "[x]" else log / name
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"label": [0, 1], "user": [1, 2]}), path)
    pq.write_table(pa.table({"label": [0, 1], "user": [1, 2]}), log / "log1.parquet")
    found = seen_by_all(log / name, log)
    assert found == [path.relative_to(log).as_posix()]


def test_what_is_not_there_is_so_to_all(log: Path) -> None:
    for path in (log / "none", log / "none*"):
        for read in (parquet_files, remapped_files, lambda path: list_input(str(path), {})):
            with pytest.raises(DataFileError, match=r"none\*?: no "):
                read(path)
    with pytest.raises(DataFileError, match="s3://b/log: data is read from a disk"):
        parquet_files("s3://b/log")


@pytest.mark.parametrize("url", ["s3:/bucket/log", "s3:bucket", "gs:/b", "S3:/b", "file:/tmp/x", "https:/x", "az:c/x"])
def test_one_slash_is_not_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RegistryError, match="a URL has two slashes there"):
        open_store(url)
    assert list(tmp_path.iterdir()) == []
    assert open_store(f"./{url}").path() == tmp_path / url


def test_listings_mean_what_walks_do(log: Path) -> None:
    """Of a store all names are known, of a disk those that a pattern may lead to."""
    listed = [path.relative_to(log).as_posix() for path in log.rglob("*") if path.is_file()]
    for pattern in ([], ["*"], ["**"], ["a*", "*"], ["**", "*.parquet"], ["_*"], ["*", "**", "[de]*"]):
        wanted = {name for name in listed if meant(name, pattern, (".parquet",)) is not None}
        walked = [name for name in walk(log, pattern) if not name.endswith("/")]
        found = {name for name in walked if meant(name, pattern, (".parquet",)) is not None}
        assert found == wanted
