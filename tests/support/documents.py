"""Documents as their readers see them: the code blocks of Markdown, and the cells and pictures of an HTML page."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img", "br", "link"}


def blocks(document: str) -> list[tuple[str, int, str]]:
    """(language, line, code) of every fenced block."""
    text = (ROOT / document).read_text()
    return [
        (match.group(1), text[: match.start()].count("\n") + 2, match.group(2))
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    ]


class Page(HTMLParser):
    """Cells, pictures and text of a page whose every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.images: list[bytes] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "img":
            source = dict(attrs)["src"] or ""
            head, _, data = source.partition(",")
            assert head == "data:image/png;base64", "a page that needs other files is not one"
            self.images.append(base64.b64decode(data))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data
