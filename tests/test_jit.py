"""Compiled loops, and when their cached results are too old."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

INNER = """
from torchrec_cce.jit import jit
{constant}

@jit
def inner(x):
    return {body}
"""
OUTER = """
from inner import inner, SHIFT
from torchrec_cce.jit import jit

@jit
def middle(x):
    return inner(x)

@jit
def outer(x):
    return 100 * middle(x) + SHIFT

if __name__ == "__main__":
    value = outer(2)
    print(value, sum(outer.stats.cache_hits.values()))
"""


def run(folder: Path, constant: str, body: str) -> list[str]:
    (folder / "inner.py").write_text(INNER.format(constant=constant, body=body))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run(
        [sys.executable, folder / "outer.py"], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return found.stdout.split()


@pytest.mark.parametrize(
    ("constant", "body", "value"),
    [
        pytest.param("SHIFT, _FACTOR = 1, 3", "x * _FACTOR * 2", "1201", id="code of a callee's callee"),
        pytest.param("SHIFT, _FACTOR = 1, 4", "x * _FACTOR", "801", id="constant that a callee reads"),
        pytest.param("SHIFT, _FACTOR = 2, 3", "x * _FACTOR", "602", id="constant of another file"),
    ],
)
def test_what_is_compiled_in_from_another_file_counts(tmp_path: Path, constant: str, body: str, value: str) -> None:
    (tmp_path / "outer.py").write_text(OUTER)
    before = "SHIFT, _FACTOR = 1, 3", "x * _FACTOR"
    assert [run(tmp_path, *before) for _ in range(2)] == [["601", "0"], ["601", "1"]]
    assert [run(tmp_path, constant, body) for _ in range(2)] == [[value, "0"], [value, "1"]]
