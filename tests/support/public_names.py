"""Public names, read from the stubs that list them, and the page of the documents that explains them.

`python -m tests.support.public_names` writes the page.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "torchrec_cce"
PAGE = ROOT / "docs/api.md"

_HEAD = """\
# Public names

What a program of yours may import, a line each; the docstrings say more. Anything deeper, such as
`torchrec_cce.maps.pointer_map`, may move without notice. `python -m tests.support.public_names` writes this page.
"""


@dataclass(frozen=True, kw_only=True)
class PublicName:
    """A name of a package."""

    package: str
    """Dotted."""
    name: str
    home: Path
    """The file that defines it."""

    def line(self) -> str:
        """The lines of its docstring up to the first that ends with a sentence, as a single line; "" if it has none."""
        text = ""
        for line in (_docstring(ast.parse(self.home.read_text()), self.name) or "").splitlines():
            text += " " * bool(text) + line.strip()
            if text.endswith("."):
                break
        return text


def public_names() -> list[PublicName]:
    """Those of `torchrec_cce` and its packages, and the errors, which are a file of their own."""
    found = []
    for stub in sorted(PACKAGE.rglob("__init__.pyi")):
        package = ".".join(stub.parent.relative_to(ROOT).parts)
        for node in ast.parse(stub.read_text()).body:
            assert isinstance(node, ast.ImportFrom)
            assert node.module is not None
            home = stub.parent / (node.module.replace(".", "/") + ".py")
            found += [PublicName(package=package, name=alias.name, home=home) for alias in node.names]
    errors = PACKAGE / "errors.py"
    found += [
        PublicName(package="torchrec_cce.errors", name=node.name, home=errors)
        for node in ast.parse(errors.read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    return found


def page() -> str:
    """`docs/api.md`."""
    names = public_names()
    parts = [_HEAD]
    for package in sorted({each.package for each in names}):
        path = ROOT / package.replace(".", "/")
        source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        about = ast.get_docstring(ast.parse(source.read_text()), clean=True) or ""
        parts.append(f"\n## `{package}`\n\n{about.partition(chr(10))[0]}\n\n| name | what it is |\n|---|---|\n")
        ours = sorted((each for each in names if each.package == package), key=lambda each: each.name.lower())
        parts += [f"| `{each.name}` | {each.line().replace('|', chr(92) + '|')} |\n" for each in ours]
    return "".join(parts)


def _docstring(module: ast.Module, name: str) -> str | None:
    """Of a class or function, or the string below a variable."""
    for node, below in zip(module.body, [*module.body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node)
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            return str(below.value.value) if is_text else None
    raise LookupError(f"{name} is not defined at the top of its file")


if __name__ == "__main__":
    PAGE.write_text(page())
