"""What tests and benchmarks share lies in `tests/support/`: none of them imports a file of tests."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports(source: str) -> Iterator[str]:
    """The dotted names that a module imports, each name of a `from … import` as if it were a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_of_a_test_file(name: str) -> bool:
    package, *parts = name.split(".")
    # The last part may be a function, which has the same prefix.
    return package == "tests" and any(part.startswith("test_") for part in parts)


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_nobody_imports_a_test_file(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [(str(path), name) for path in files for name in imports(path.read_text()) if is_of_a_test_file(name)]
    assert not found, "move what is shared to tests/support"
