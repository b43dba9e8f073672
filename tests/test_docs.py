"""Every code block in README and docs runs, in the order of its document."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import DOCUMENTS, ROOT, blocks
from tests.support.launch import command
from torchrec_cce.experiments.plan import read_plan
from torchrec_cce.experiments.planted_log import write_click_log
from torchrec_cce.training.config_file import read_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a small log, and the run and the plan of docs/training.md and docs/benchmarking.md."""
    monkeypatch.chdir(tmp_path)
    write_click_log(tmp_path / "clicks.tsv", num_rows=10_000, seed=0)
    for name, document in (("run", "docs/training.md"), ("plan", "docs/benchmarking.md")):
        first_toml = next(code for language, _, code in blocks(document) if language == "toml")
        (tmp_path / f"{name}.toml").write_text(first_toml)
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks(document: str, workplace: Path) -> None:
    """The blocks of a document are one program."""
    program = ""
    for language, line, code in blocks(document):
        if language == "python":
            program += "\n" * (line - 1 - program.count("\n")) + code
    exec(compile(program, str(workplace / document), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_toml_blocks(document: str, workplace: Path) -> None:
    for language, line, code in blocks(document):
        if language == "toml":
            path = workplace / f"line-{line}.toml"
            path.write_text(code)
            if "[[methods]]" in code:
                read_plan(path)
            else:
                read_config(path)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_shell_blocks(document: str, workplace: Path) -> None:
    """`make` targets exist; everything else runs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    for language, _, code in blocks(document):
        if language not in ("bash", "sh"):
            continue
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            where = workplace
            # The README's commands are the installed ones; those of the docs need not import everything anew.
            if words[:1] == ["torchrec-cce"] and document != "README.md":
                finished = command(workplace / "process", *words[1:], cwd=workplace).wait(300)
                assert finished.code == 0, f"{line}\n{finished.stderr}"
                continue
            if words[:1] == ["make"]:
                words, where = ["make", "--dry-run", *words[1:]], ROOT
            if words:
                done = subprocess.run(words, cwd=where, env=environment, capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    for document in DOCUMENTS:
        for language, line, _ in blocks(document):
            assert language in ("python", "toml", "bash", "text"), f"{document}:{line}"
