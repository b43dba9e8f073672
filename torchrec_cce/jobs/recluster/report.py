"""What a reclustering job came to, as a page with plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from torchrec_cce.charts.chart import BarChart, Chart, Picture, Series
from torchrec_cce.charts.page import write_page, write_pictures
from torchrec_cce.errors import MissingExtraError
from torchrec_cce.extras import require
from torchrec_cce.files.atomic import atomic_path
from torchrec_cce.jobs.recluster.gates import Gate
from torchrec_cce.jobs.recluster.outcome import Outcome

GATE_COLUMNS = ("gate", "table", "figure", "must be", "")


def gate_cells(gate: Gate) -> tuple[str, ...]:
    """One row of a table of gates, as `GATE_COLUMNS` names them."""
    least = gate.threshold.startswith("min_")
    return (
        gate.threshold.removeprefix("min_").removeprefix("max_"),
        gate.table or "all",
        f"– ({gate.note})" if gate.value is None else f"{gate.value:.4g}",
        f"{'≥' if least else '≤'} {gate.bound:g}",
        "open" if gate.passed else "CLOSED",
    )


def write_report(folder: Path, outcome: Outcome, cluster_sizes: Mapping[str, npt.NDArray[np.int64]]) -> str | None:
    """Write `report.json` to `folder`, and where the libraries for it are installed also `report.html` and its plots.

    Args:
        cluster_sizes: table → [c, k], IDs of each codebook row.

    Returns:
        Why there is no page, if there is none.
    """
    with atomic_path(folder / "report.json") as temporary:
        temporary.write_text(outcome.to_json())
    try:
        for library in ("jinja2", "matplotlib.figure"):
            require(library, "report")
    except MissingExtraError as error:
        return str(error)
    pictures: list[Picture] = [_entropy_chart(outcome), _error_chart(outcome)]
    pictures += [_size_chart(number, *sizes) for number, sizes in enumerate(cluster_sizes.items())]
    write_page(
        folder / "report.html",
        Path(__file__).with_name("report.html"),
        pictures=write_pictures(folder, pictures).values(),
        outcome=outcome,
        gate_columns=GATE_COLUMNS,
        gates=[(gate.passed, gate_cells(gate)) for gate in outcome.gates],
    )
    return None


def _entropy_chart(outcome: Outcome) -> Chart:
    series = []
    for table in outcome.tables:
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


def _error_chart(outcome: Outcome) -> BarChart:
    def shares(errors: Sequence[float]) -> tuple[float, ...]:
        return tuple(error / max(table.variance, 1e-30) for error, table in zip(errors, outcome.tables, strict=True))

    return BarChart(
        name="errors",
        caption="How far today's embeddings are from the codewords that stand for them",
        x_label="mean squared distance over the variance of the embeddings",
        names=tuple(table.table for table in outcome.tables),
        bars={
            "the parent's clusters": shares([table.parent_error for table in outcome.tables]),
            "the new codewords": shares([table.error for table in outcome.tables]),
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
