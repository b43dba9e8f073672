"""Pages with pictures that need no other file: what all reports share."""

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchrec_cce.charts.chart import Picture
from torchrec_cce.extras import require
from torchrec_cce.files.atomic import atomic_path

_HERE = Path(__file__).parent


def write_pictures(folder: Path, pictures: Iterable[Picture]) -> dict[str, dict[str, str]]:
    """Draw pictures, and write each as `<name>.png` to `folder`.

    Returns:
        The name of each picture → what a template needs of it: its `name`, its `text` and a `url` that holds it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    found = {}
    for picture in pictures:
        png = picture.to_png()
        with atomic_path(folder / f"{picture.name}.png") as temporary:
            temporary.write_bytes(png)
        url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        found[picture.name] = {"name": picture.name, "text": picture.text, "url": url}
    return found


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Write a page.

    Args:
        path: the page, which appears whole.
        template: a jinja2 file that extends `page.html`; where `values` has `pictures`, they come at the end.
        values: of the template.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader([template.parent, _HERE]), autoescape=True)
    text = environment.get_template(template.name).render(**values)
    with atomic_path(path) as temporary:
        temporary.write_text(text)
