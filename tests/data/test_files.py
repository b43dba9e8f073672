"""Which files a path, a folder, a pattern or a list of them stands for."""

from pathlib import Path

import pytest

from torchrec_cce.data.files import files_of
from torchrec_cce.errors import DataFileError


def find(*paths: Path | str) -> list[str]:
    """Their names; a folder is its `*.log`."""
    return [path.name for path in files_of(list(paths), (".log",))]


@pytest.fixture
def days(tmp_path: Path) -> Path:
    for name in ("day_0", "day_1", "day_2", "day_10", "day_10b", "day_23", "day_02", "other", "day_[1]"):
        (tmp_path / name).touch()
    for week in (9, 10):
        (tmp_path / f"week_{week}").mkdir()
        (tmp_path / f"week_{week}" / f"{week}.log").touch()
    return tmp_path


def test_a_file_a_folder_and_a_list(days: Path) -> None:
    assert files_of(days / "other", (".log",)) == [days / "other"]
    assert files_of(str(days / "other"), (".log",)) == [days / "other"]
    assert find(days / "week_10", days / "other", str(days / "week_9")) == ["10.log", "other", "9.log"]


def test_numbers_in_names_count_by_their_value(days: Path) -> None:
    assert find(days / "day_[0-9]*") == ["day_0", "day_1", "day_02", "day_2", "day_10", "day_10b", "day_23"]
    assert find(days / "day_2?", days / "day_?") == ["day_23", "day_0", "day_1", "day_2"]
    assert find(str(days / "**" / "day_1")) == ["day_1"]


def test_folders_that_match_are_looked_into(days: Path) -> None:
    assert find(days / "week_*") == ["9.log", "10.log"]


def test_a_file_of_that_very_name_is_no_pattern(days: Path) -> None:
    assert find(days / "day_[1]") == ["day_[1]"]
    (days / "day_[1]").unlink()
    assert find(days / "day_[1]") == ["day_1"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "gone: no such file or folder"),
        ("gone_*", r"gone_\*: no file matches this pattern"),
        ("week_?", r"week_9: no \*\.log in this folder"),
    ],
)
def test_what_is_not_there(days: Path, name: str, message: str) -> None:
    (days / "week_9" / "9.log").unlink()
    with pytest.raises(DataFileError, match=message):
        find(days / "other", days / name)
