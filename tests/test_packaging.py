"""The package imports without its optional parts, and says which extra brings a missing one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

OPTIONAL = ["faiss", "sklearn", "ray", "triton", "obstore", "matplotlib", "tensorboard", "jinja2"]
WRITTEN_FOR = {"torchrec_cce.kernels.lookup_on_gpu.bags": "triton"}
"""Modules in the language of an optional part, which are imported where that is."""

_BLOCKED = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_others(name, path=None, target=None):
    return None if name.split(".")[0] in {blocked!r} else find(name, path, target)
PathFinder.find_spec = find_others
"""


def run(program: str, blocked: list[str]) -> subprocess.CompletedProcess[str]:
    source = _BLOCKED.format(blocked=blocked) + program
    return subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True, check=False)


def test_every_module_imports_without_the_optional_parts() -> None:
    program = (
        "import importlib, pkgutil, torchrec_cce\n"
        f"written_for = {WRITTEN_FOR!r}\n"
        "names = [m.name for m in pkgutil.walk_packages(torchrec_cce.__path__, 'torchrec_cce.')]\n"
        "assert written_for.keys() <= set(names)\n"
        "for name in set(names) - written_for.keys():\n"
        "    if not name.endswith('__main__'): importlib.import_module(name)\n"
        f"print(len(names), 'modules', sorted(set(sys.modules) & set({OPTIONAL!r})))\n"
    )
    done = run(program, OPTIONAL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("modules []\n")


def test_what_is_no_module_is_in_the_wheel() -> None:
    """Stubs, without which no package has names, and templates."""
    (patterns,) = re.findall(r"^torchrec_cce = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    package = ROOT / "torchrec_cce"
    packed = {path for pattern in re.findall(r'"(.+?)"', patterns) for path in package.glob(pattern)}
    others = {path for path in package.rglob("*.*") if path.suffix != ".py" and path.parent.name != "__pycache__"}
    assert {path.suffix for path in others} >= {".pyi", ".html"}
    assert others - packed == set()


@pytest.mark.parametrize(
    ("blocked", "program", "extra"),
    [
        (
            "faiss",
            "import numpy as np\n"
            "from torchrec_cce.clustering.kmeans.kmeans import kmeans\n"
            "kmeans(np.random.rand(100, 4).astype('f4'), 5, seed=0, backend='faiss')",
            "torchrec-cce[cpu] or torchrec-cce[cuda]",
        ),
        (
            "tensorboard",
            "import pathlib, tempfile\n"
            "from torchrec_cce.training.metrics import MetricsLog\n"
            "from torchrec_cce.training.schedule import Position\n"
            "MetricsLog(pathlib.Path(tempfile.mkdtemp()), after=Position())",
            "torchrec-cce[report]",
        ),
    ],
)
def test_what_is_missing_is_named_with_its_extra(blocked: str, program: str, extra: str) -> None:
    done = run(program, [blocked])
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "MissingExtraError" in last
    assert blocked in last
    assert extra in last
