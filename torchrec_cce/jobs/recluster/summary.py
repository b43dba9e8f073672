"""What a recluster job did: as JSON for schedulers and for the same job started again, and as a page with plots."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from torchrec_cce.errors import MissingExtraError
from torchrec_cce.extras import require
from torchrec_cce.files.atomic import atomic_path, write_json
from torchrec_cce.files.page import new_plot, to_png, write_page
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
    plots = {"entropies": _entropy_plot(summary), "errors": _error_plot(summary)}
    plots |= {
        f"sizes-{number:04d}": _size_plot(name, sizes) for number, (name, sizes) in enumerate(cluster_sizes.items())
    }
    for name, (_, png) in plots.items():
        with atomic_path(folder / f"{name}.png") as temporary:
            temporary.write_bytes(png)
    write_page(
        folder / "report.html",
        Path(__file__).with_name("report.html"),
        dict(plots.values()),
        summary=summary,
        gate_columns=GATE_COLUMNS,
        gates=[(gate.passed, gate_cells(gate)) for gate in summary.gates],
    )
    return None


def _entropy_plot(summary: ReclusterSummary) -> tuple[str, bytes]:
    figure, axes = new_plot()
    colours = require("matplotlib", "report").colormaps["turbo"](np.linspace(0.05, 0.95, len(summary.tables)))
    axes.set_prop_cycle(color=colours)  # a model may have more tables than the usual ten colours
    for table in summary.tables:
        columns = range(1, table.num_columns + 1)
        (line,) = axes.plot(columns, table.entropies, marker="o", label=table.table)
        axes.plot(columns, table.random_entropies, linestyle="--", color=line.get_color())
        axes.axhline(np.log(table.num_rows), linestyle=":", color=line.get_color())
    axes.set(xlabel="columns together", ylabel="entropy, nats", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right upper", fontsize="small", ncols=-(-len(summary.tables) // 18))
    caption = (
        "Entropies of the new pointers. As random as a hash (dashed), nothing was learned; far below log k (dotted) at "
        "1, or hardly more at 2 than at 1, columns have collapsed"
    )
    return caption, to_png(figure)


def _error_plot(summary: ReclusterSummary) -> tuple[str, bytes]:
    figure, axes = new_plot()
    names = [table.table for table in summary.tables]
    places = np.arange(len(names))
    for shift, label, values in (
        (-0.2, "the parent's clusters", [table.parent_error for table in summary.tables]),
        (0.2, "the new codewords", [table.error for table in summary.tables]),
    ):
        shares = [value / max(table.variance, 1e-30) for value, table in zip(values, summary.tables, strict=True)]
        axes.barh(places + shift, shares, height=0.4, label=label)
    axes.set(xlabel="mean squared distance over the variance of the embeddings", yticks=places, yticklabels=names)
    axes.invert_yaxis()
    axes.legend()
    return "How far today's embeddings are from the codewords that stand for them", to_png(figure)


def _size_plot(name: str, sizes: npt.NDArray[np.int64]) -> tuple[str, bytes]:
    figure, axes = new_plot()
    for column, counts in enumerate(sizes):
        axes.plot(np.sort(counts)[::-1], label=f"column {column}")
    axes.set(xlabel="codebook rows, the largest first", ylabel="IDs", yscale="symlog", ylim=(0, None))
    axes.legend()
    return f"IDs of each codebook row of {name}", to_png(figure)
