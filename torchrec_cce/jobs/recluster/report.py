"""What a reclustering job came to, as a page with plots."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import MissingExtraError
from torchrec_cce.extras import require
from torchrec_cce.files.atomic import atomic_path, write_json
from torchrec_cce.files.page import new_plot, to_png, write_page
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
    write_json(folder / "report.json", outcome, strict=True)
    try:
        for library in ("jinja2", "matplotlib.figure"):
            require(library, "report")
    except MissingExtraError as error:
        return str(error)
    plots = {"entropies": _entropy_plot(outcome), "errors": _error_plot(outcome)}
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
        outcome=outcome,
        gate_columns=GATE_COLUMNS,
        gates=[(gate.passed, gate_cells(gate)) for gate in outcome.gates],
    )
    return None


def _entropy_plot(outcome: Outcome) -> tuple[str, bytes]:
    figure, axes = new_plot()
    colours = require("matplotlib", "report").colormaps["turbo"](np.linspace(0.05, 0.95, len(outcome.tables)))
    axes.set_prop_cycle(color=colours)  # a model may have more tables than the usual ten colours
    for table in outcome.tables:
        columns = range(1, table.num_columns + 1)
        (line,) = axes.plot(columns, table.entropies, marker="o", label=table.table)
        axes.plot(columns, table.random_entropies, linestyle="--", color=line.get_color())
        axes.axhline(np.log(table.num_rows), linestyle=":", color=line.get_color())
    axes.set(xlabel="columns together", ylabel="entropy, nats", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right upper", fontsize="small", ncols=-(-len(outcome.tables) // 18))
    caption = (
        "Entropies of the new pointers. As random as a hash (dashed), nothing was learned; far below log k (dotted) at "
        "1, or hardly more at 2 than at 1, columns have collapsed"
    )
    return caption, to_png(figure)


def _error_plot(outcome: Outcome) -> tuple[str, bytes]:
    figure, axes = new_plot()
    names = [table.table for table in outcome.tables]
    places = np.arange(len(names))
    for shift, label, values in (
        (-0.2, "the parent's clusters", [table.parent_error for table in outcome.tables]),
        (0.2, "the new words", [table.error for table in outcome.tables]),
    ):
        shares = [value / max(table.variance, 1e-30) for value, table in zip(values, outcome.tables, strict=True)]
        axes.barh(places + shift, shares, height=0.4, label=label)
    axes.set(xlabel="mean squared distance over the variance of the embeddings", yticks=places, yticklabels=names)
    axes.invert_yaxis()
    axes.legend()
    return "How far today's embeddings are from the words that stand for them", to_png(figure)


def _size_plot(name: str, sizes: npt.NDArray[np.int64]) -> tuple[str, bytes]:
    figure, axes = new_plot()
    for column, counts in enumerate(sizes):
        axes.plot(np.sort(counts)[::-1], label=f"column {column}")
    axes.set(xlabel="codebook rows, the largest first", ylabel="IDs", yscale="symlog", ylim=(0, None))
    axes.legend()
    return f"IDs of each codebook row of {name}", to_png(figure)
