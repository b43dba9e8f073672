"""What a recluster job did: as JSON for schedulers and for the same job started again, and as a page with plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from torchrec_cce.charts.chart import BarChart, Chart, Picture, Series, write_page, write_pictures
from torchrec_cce.errors import MissingExtraError
from torchrec_cce.extras import require
from torchrec_cce.files.atomic import write_json
from torchrec_cce.jobs.recluster.gates import Gate, TableFigures
from torchrec_cce.training.metrics import Quality

RECORD = "recluster.json"
"""The file in the output folder that says which job made it."""

Status = Literal["published", "finished", "refused", "there already"]
"""`published`: a new version is current. `finished`: it had been published before, and its checkpoint has been written
now. `refused`: gates were closed. `there already`: nothing was left to do."""


@dataclass(frozen=True, kw_only=True)
class ReclusterSummary:
    """What a job did. This is what it prints and what it leaves in `recluster.json`."""

    status: Status
    checkpoint: str
    output: str
    registry: str
    parent: int
    version: int | None
    """None if it was refused."""
    forced: bool
    """Whether it was published although gates were closed."""
    identity: dict[str, Any]
    """Everything that decides the result."""
    tables: tuple[TableFigures, ...]
    gates: tuple[Gate, ...]
    before: Quality | None
    """The model's quality on the validation sample before the clustering."""
    after: Quality | None
    seconds: dict[str, float]
    """Step of the job → how long it took."""

    @property
    def closed(self) -> list[Gate]:
        """The gates that were not passed."""
        return [gate for gate in self.gates if not gate.passed]

    def to_json(self) -> str:
        """One line. Numbers that are not finite are null."""
        return _ADAPTER.dump_json(self).decode()


_ADAPTER = TypeAdapter(ReclusterSummary)


def write_summary(folder: Path, summary: ReclusterSummary) -> None:
    """Leave `summary` in the output folder `folder`."""
    write_json(folder / RECORD, summary)


def read_summary(folder: Path) -> ReclusterSummary | None:
    """The summary of the job that made `folder`; None if no such job did."""
    try:
        return _ADAPTER.validate_python(json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError):
        return None


GATE_COLUMNS = ("gate", "table", "figure", "must be", "")


def gate_cells(gate: Gate) -> tuple[str, ...]:
    """One row of a table with the columns `GATE_COLUMNS`."""
    least = gate.threshold.startswith("min_")
    return (
        gate.threshold.removeprefix("min_").removeprefix("max_"),
        gate.table or "all",
        f"– ({gate.note})" if gate.value is None else f"{gate.value:.4g}",
        f"{'≥' if least else '≤'} {gate.bound:g}",
        "open" if gate.passed else "CLOSED",
    )


def write_report(
    folder: Path, summary: ReclusterSummary, cluster_sizes: Mapping[str, npt.NDArray[np.int64]]
) -> str | None:
    """Write `report.json` to `folder`, and where the libraries for it are installed also `report.html` and its plots.

    Args:
        cluster_sizes: table → [c, k], IDs of each codebook row.

    Returns:
        Why there is no page; None if there is one.
    """
    write_json(folder / "report.json", summary, strict=True)
    try:
        for library in ("jinja2", "matplotlib.figure"):
            require(library, "report")
    except MissingExtraError as error:
        return str(error)
    pictures: list[Picture] = [_entropy_chart(summary), _error_chart(summary)]
    pictures += [_size_chart(number, *sizes) for number, sizes in enumerate(cluster_sizes.items())]
    write_page(
        folder / "report.html",
        Path(__file__).with_name("report.html"),
        pictures=write_pictures(folder, pictures).values(),
        summary=summary,
        gate_columns=GATE_COLUMNS,
        gates=[(gate.passed, gate_cells(gate)) for gate in summary.gates],
    )
    return None


def _entropy_chart(summary: ReclusterSummary) -> Chart:
    series = []
    for table in summary.tables:
        columns = tuple(float(m) for m in range(1, table.num_columns + 1))
        most = (float(np.log(table.num_rows)),) * table.num_columns
        series += [
            Series(label=table.table, x=columns, y=tuple(table.entropies)),
            Series(label="", x=columns, y=tuple(table.random_entropies), style="bound"),
            Series(label="", x=columns, y=most, style="limit"),
        ]
    return Chart(
        name="entropies",
        caption="Entropies of the new pointers. As random as a hash (dashed), nothing was learned; far below log k "
        "(dotted) at 1, or hardly more at 2 than at 1, columns have collapsed",
        x_label="columns together",
        y_label="entropy, nats",
        series=tuple(series),
        whole_x=True,
        y_range=(0.0, 1.05 * max((y for each in series for y in each.y), default=1.0)),
    )


def _error_chart(summary: ReclusterSummary) -> BarChart:
    def shares(errors: Sequence[float]) -> tuple[float, ...]:
        return tuple(error / max(table.variance, 1e-30) for error, table in zip(errors, summary.tables, strict=True))

    return BarChart(
        name="errors",
        caption="How far today's embeddings are from the codewords that stand for them",
        x_label="mean squared distance over the variance of the embeddings",
        names=tuple(table.table for table in summary.tables),
        bars={
            "the parent's clusters": shares([table.parent_error for table in summary.tables]),
            "the new codewords": shares([table.error for table in summary.tables]),
        },
    )


def _size_chart(number: int, table: str, sizes: npt.NDArray[np.int64]) -> Chart:
    places = tuple(float(place) for place in range(sizes.shape[1]))
    return Chart(
        name=f"sizes-{number:04d}",
        caption=f"IDs of each codebook row of {table}",
        x_label="codebook rows, the largest first",
        y_label="IDs",
        series=tuple(
            Series(label=f"column {column}", x=places, y=tuple(np.sort(counts)[::-1].tolist()), style="line")
            for column, counts in enumerate(sizes)
        ),
        log_y=True,
    )
