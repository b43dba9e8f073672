"""Documents of every kind, damaged by a fuzzer: each is read, or refused by an error of one line.

What a night finds goes to `tests/faults/corpus/NAME/`, where it is tried in every run from then on.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fuzz import Target, targets

CORPUS = Path(__file__).parent / "corpus"
NAMES = ("thrift", "page headers", "manifests", "journal", "remapped schemas", "Arrow files", "TOML")
NIGHTLY = [pytest.mark.nightly, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def every_target(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    found = targets(tmp_path_factory.mktemp("whole"))
    assert tuple(found) == NAMES
    return found


@pytest.mark.parametrize("name", NAMES)
def test_whole_documents_and_those_that_were_found(every_target: dict[str, Target], name: str, tmp_path: Path) -> None:
    target = every_target[name]
    for document in target.whole:
        target.read(document, tmp_path)
    for path in sorted((CORPUS / name.replace(" ", "-")).glob("*")):
        assert target.fault(path.read_bytes(), tmp_path) is None, path.name


@pytest.mark.parametrize("examples", [150, pytest.param(30_000, marks=NIGHTLY)])
@pytest.mark.parametrize("name", NAMES)
def test_damaged_documents(every_target: dict[str, Target], name: str, examples: int, tmp_path: Path) -> None:
    target = every_target[name]

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), derandomize=examples < 1000)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        document = data.draw(target.documents())
        fault = target.fault(document, tmp_path)
        assert fault is None, f"{fault}; keep it: {document!r}"

    check()
