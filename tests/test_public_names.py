"""What a user imports: listed once, there, explained, and what the documents use."""

import ast
import importlib
import re
from collections.abc import Iterator

import pytest

from tests.support.documents import DOCUMENTS, blocks
from tests.support.public_names import PAGE, ROOT, PublicName, page, public_names

NAMES = public_names()
PACKAGES = sorted({each.package for each in NAMES})
READ = [*(document for document in DOCUMENTS if document != "CONTRIBUTING.md"), "examples/README.md"]


def programs() -> Iterator[tuple[str, ast.Module]]:
    """Place → what a reader of README, docs and examples would copy."""
    for document in READ:
        for language, line, code in blocks(document):
            if language == "python":
                yield f"{document}:{line}", ast.parse(code)
    for path in sorted((ROOT / "examples").glob("*.py")):
        yield path.name, ast.parse(path.read_text())


def test_the_page_is_that_of_today() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.support.public_names"


@pytest.mark.parametrize("name", NAMES, ids=lambda each: f"{each.package}.{each.name}")
def test_every_name_is_explained(name: PublicName) -> None:
    assert name.line().endswith((".", ":", ";"))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    listed = {each.name for each in NAMES if each.package == package}
    assert all(hasattr(module, name) for name in listed)
    assert listed <= set(dir(module))
    with pytest.raises(AttributeError, match="Nothing"):
        module.Nothing  # noqa: B018
    if package != "torchrec_cce.errors":
        assert set(module.__all__) == listed


def test_no_name_hides_a_package() -> None:
    folders = {".".join(stub.parent.relative_to(ROOT).parts) for stub in (ROOT / "torchrec_cce").rglob("__init__.py")}
    assert not folders & {f"{each.package}.{each.name}" for each in NAMES}


def test_documents_and_examples_import_public_names_alone() -> None:
    public = {(each.package, each.name) for each in NAMES}
    used = [
        (place, (node.module, alias.name))
        for place, program in programs()
        for node in ast.walk(program)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchrec_cce")
        for alias in node.names
    ]
    assert len(used) > 30
    assert [(place, name) for place, name in used if name not in public] == []
    assert not [
        place
        for place, program in programs()
        for node in ast.walk(program)
        if isinstance(node, ast.Import) and any(alias.name.startswith("torchrec_cce") for alias in node.names)
    ]


def test_documents_speak_of_public_names_alone() -> None:
    """A dotted name of three parts or more, in text; that of a metadata key has two."""
    public = {*PACKAGES, *(f"{each.package}.{each.name}" for each in NAMES)}
    for document in READ:
        if document == "docs/api.md":
            continue
        text = (ROOT / document).read_text()
        for found in re.findall(r"`(torchrec_cce\.\w+\.[\w.]+)`", text):
            assert found in public, document
