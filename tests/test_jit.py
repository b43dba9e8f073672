"""Compiled loops, and when their cached results are too old."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CALLEE = """
from torchrec_cce.jit import jit
SHIFT, _FACTOR = 1, 3

@jit
def inner(x):
    return x * _FACTOR
"""
INTRINSIC = """
from numba.core import types
from numba.extending import intrinsic
SHIFT = 1

@intrinsic
def inner(context, x):
    def generate(context, builder, signature, arguments):
        return builder.mul(*arguments, arguments[0].type(3))
    return types.int64(types.int64), generate
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


def run(folder: Path, inner: str) -> list[str]:
    (folder / "inner.py").write_text(inner)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run(
        [sys.executable, folder / "outer.py"], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return found.stdout.split()


@pytest.mark.parametrize(
    ("inner", "before", "after", "value"),
    [
        pytest.param(CALLEE, "x * _FACTOR", "x * _FACTOR * 2", "1201", id="code of a callee's callee"),
        pytest.param(CALLEE, "1, 3", "1, 4", "801", id="constant that a callee reads"),
        pytest.param(CALLEE, "1, 3", "2, 3", "602", id="constant of another file"),
        pytest.param(INTRINSIC, "type(3)", "type(4)", "801", id="code that a callee generates"),
    ],
)
def test_what_is_compiled_in_from_another_file_counts(
    tmp_path: Path, inner: str, before: str, after: str, value: str
) -> None:
    (tmp_path / "outer.py").write_text(OUTER)
    assert [run(tmp_path, inner) for _ in range(2)] == [["601", "0"], ["601", "1"]]
    changed = inner.replace(before, after)
    assert [run(tmp_path, changed) for _ in range(2)] == [[value, "0"], [value, "1"]]


@pytest.mark.parametrize(
    ("suffix", "damage"), [("nbi", "short"), ("nbi", "flipped"), ("nbc", "flipped"), ("nbc", "old")]
)
def test_damaged_results_are_compiled_anew(tmp_path: Path, suffix: str, damage: str) -> None:
    """Never a traceback, and nothing of them is run. Those of before there were digests are damaged as well."""
    (tmp_path / "outer.py").write_text(OUTER)
    assert run(tmp_path, CALLEE) == ["601", "0"]
    for path in (tmp_path / "__pycache__").glob(f"outer.outer-*.{suffix}"):
        content = path.read_bytes()
        middle = len(content) // 2
        damaged = {
            "short": content[:middle],
            "flipped": content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :],
            "old": content[:-32],
        }
        path.write_bytes(damaged[damage])
    assert [run(tmp_path, CALLEE) for _ in range(2)] == [["601", "0"], ["601", "1"]]
