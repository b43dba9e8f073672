"""What the reports on trials share: sections of tables and pictures, written as a page and as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_cce.charts.chart import Picture, write_page, write_pictures
from torchrec_cce.files.atomic import write_json


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table."""

    cells: tuple[str, ...]
    runs: tuple[str, ...]
    """The folders of the runs that its numbers are made of."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    title: str
    lines: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page, and the numbers that it is made of."""

    title: str
    about: Mapping[str, str]
    """Facts that belong beside the numbers, e.g. the data and the versions."""
    sections: tuple[Section, ...]
    """In the order of the page."""
    values: Mapping[str, Any]
    """What `report.json` holds."""


def write_report(folder: Path, report: Report) -> None:
    """Write a report to `folder`: `report.json`; `report.html`, which needs no other file; its pictures in `pictures/`.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed; `report.json` is there all the same.
    """
    write_json(folder / "report.json", report.values, indent=2, strict=True)
    pictures = [picture for section in report.sections for picture in section.pictures]
    drawn = write_pictures(folder / "pictures", pictures)
    write_page(folder / "report.html", Path(__file__).with_name("report.html"), report=report, drawn=drawn)
