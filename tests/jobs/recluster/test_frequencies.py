"""The archive of frequencies that a job is given, from whomever."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from torchrec_cce.errors import ConfigError
from torchrec_cce.jobs.recluster.request import unpack_frequencies

COUNTS = np.arange(1000)


def bomb(archive: zipfile.ZipFile) -> None:
    archive.writestr("t.npy", bytes(200_000_000))


def twice(archive: zipfile.ZipFile) -> None:
    for _ in range(2):
        with archive.open("t.npy", "w") as file:
            np.save(file, COUNTS)


def unknown(archive: zipfile.ZipFile) -> None:
    archive.writestr("../t.npy", b"")


def unfinished(archive: zipfile.ZipFile) -> None:
    archive.writestr("t.npy", b"\x93NUMPY")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bomb, r"'t' would be 200000000 bytes, 1 times; int64 \[1000\] is at most 73536, once"),
        (twice, "'t' would be 8128 bytes, 2 times"),
        (unknown, r"frequencies of \['../t'\]; the CCE tables are \['t'\]"),
        (unfinished, "'t' is not an array of numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_is_refused(tmp_path: Path, make: Callable[[zipfile.ZipFile], None], message: str) -> None:
    with zipfile.ZipFile(tmp_path / "f.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        make(archive)
    with pytest.raises(ConfigError, match=message):
        unpack_frequencies(tmp_path / "f.npz", tmp_path / "unpacked", {"t": 1000})
    assert sum(path.stat().st_size for path in (tmp_path / "unpacked").iterdir()) < 100


def test_an_archive_of_counts(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "f.npz", t=COUNTS)
    files = unpack_frequencies(tmp_path / "f.npz", tmp_path / "unpacked", {"t": 1000, "other": 7})
    np.testing.assert_array_equal(np.load(files["t"]), COUNTS)
