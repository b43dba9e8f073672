"""Pages with plots that need no other file: what all reports share."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrec_cce.extras import require
from torchrec_cce.files.atomic import atomic_path

_HERE = Path(__file__).parent


def new_plot() -> tuple[Any, Any]:
    """A matplotlib figure and its axes. Raises MissingExtraError."""
    figure = require("matplotlib.figure", "report").Figure(figsize=(7, 4), layout="constrained")
    return figure, figure.subplots()


def to_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def data_url(png: bytes) -> str:
    """A picture that is part of its page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def write_page(path: Path, template: Path, plots: Mapping[str, bytes], **values: Any) -> None:
    """Write a page.

    Args:
        path: the page, which appears whole.
        template: a jinja2 file that extends `page.html`, whose plots come at the end.
        plots: caption → PNG.
        values: of the template.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader([template.parent, _HERE]), autoescape=True)
    pictures = [{"name": caption, "url": data_url(png)} for caption, png in plots.items()]
    text = environment.get_template(template.name).render(plots=pictures, **values)
    with atomic_path(path) as temporary:
        temporary.write_text(text)
