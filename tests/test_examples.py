"""The examples run as their README says, and do what it says."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import ROOT, blocks
from tests.support.launch import TIMEOUT, Job, on_ranks, wait_for_all

EXAMPLES = ROOT / "examples"
README = "examples/README.md"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands() -> list[list[str]]:
    """Those of the README, in its order."""
    return [
        shlex.split(line) for language, _, code in blocks(README) if language == "bash" for line in code.splitlines()
    ]


def run(command: list[str]) -> str:
    """The standard output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_script(script: Path, *arguments: str) -> None:
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def train_on(world_size: int, run_dir: Path, *options: str) -> str:
    """What `train_ranks.py` prints on rank 0."""
    folder = run_dir.parent / "ranks" / "-".join([run_dir.name, *options])
    finished = on_ranks(folder, world_size, run_script, EXAMPLES / "train_ranks.py", str(run_dir), *options)
    for rank in finished:
        assert rank.code == 0, rank.stderr
    return finished[0].stdout


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^stretch \d+: loss (\S+),", output, flags=re.MULTILINE)]


def test_every_example_is_in_the_readme_and_every_block_is_tested() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == {
        Path(word).name for command in commands() for word in command if word.endswith(".py")
    }
    assert {language for language, _, _ in blocks(README)} == {"bash", "diff", "python"}


def test_the_diff_leads_from_a_stock_script_to_the_example(tmp_path: Path) -> None:
    after = (EXAMPLES / "replace_ebc.py").read_text()
    (diff,) = [code for language, _, code in blocks(README) if language == "diff"]
    before = after
    for old, new in re.findall(r"((?:^-.*\n)*)((?:^\+.*\n)+)", diff, flags=re.MULTILINE):
        old, new = (re.sub(r"^.", "", lines, flags=re.MULTILINE) for lines in (old, new))
        assert before.count(new) == 1
        before = before.replace(new, old)
    assert "cce" not in before.partition('"""\n')[2].lower()

    jobs = []
    for name, text in (("before", before), ("after", after)):
        script = tmp_path / f"{name}.py"
        script.write_text(text)
        jobs.append(Job(tmp_path / name, run_script, script))
    finished = wait_for_all(jobs)
    for job in finished:
        assert job.code == 0, job.stderr
    printed = [job.stdout for job in finished]
    assert [int(re.sub(r"\D", "", out.split()[0])) for out in printed] == [400_000, 16_000]
    assert all(float(out.split()[-1]) < 0.68 for out in printed), "log(2) would be a guess"


def test_python_blocks(workplace: Path) -> None:
    for language, line, code in blocks(README):
        if language == "python":
            exec(compile("\n" * (line - 1) + code, str(workplace / README), "exec"), {"__name__": "__main__"})


def test_training_on_ranks_resumes_where_it_was(workplace: Path) -> None:
    """Stopped after a clustering, then started again by the README's command, and on one rank."""
    _, torchrun, maps = commands()
    undisturbed = losses(train_on(2, workplace / "undisturbed"))
    stopped = losses(train_on(2, workplace / "runs" / "mine", "--stretches", "2"))
    shutil.copytree("runs/mine", "resumed")
    for resumed in (run(torchrun), train_on(1, workplace / "resumed")):
        assert stopped + losses(resumed) == pytest.approx(undisturbed, abs=2e-6)  # printed with six digits
        assert "maps version 2" in resumed
    assert len(undisturbed) == 3
    assert len(run(maps).splitlines()) >= 2
