"""Files and folders that appear whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from torchrec_cce.files.atomic import atomic_path


def test_a_file_is_replaced_and_a_folder_created(tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.txt"
    for content in ("one", "two"):
        with atomic_path(path) as temporary:
            temporary.write_text(content)
        assert path.read_text() == content
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "t.txt").touch()
    assert {item.name for item in tmp_path.rglob("*")} == {"new", "t.txt", "folder"}


def write_half(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("old")
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from torchrec_cce.files.atomic import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(path)], check=False).returncode == -9
    assert path.read_text() == "old"
