"""The report of an experiment: a page, its pictures, and the numbers that both are made of."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchrec_cce.experiments.chart import Chart
from torchrec_cce.experiments.collapse import Collapse, collapses
from torchrec_cce.experiments.curve import Curve, Point, compressed, curves_of, full_table
from torchrec_cce.experiments.entropy_history import entropy_charts, entropy_histories
from torchrec_cce.experiments.experiment_tables import (
    Table,
    collapse_table,
    compression_table,
    failures_table,
    pareto_table,
    points_table,
)
from torchrec_cce.experiments.factor import Compression, compression
from torchrec_cce.experiments.heat_map import HeatMap
from torchrec_cce.experiments.pareto import Candidate, candidates_of, pareto_front
from torchrec_cce.experiments.pareto_chart import pareto_chart
from torchrec_cce.experiments.quality_charts import quality_charts, strategy_charts
from torchrec_cce.experiments.results import Results
from torchrec_cce.experiments.strategy import strategies_of
from torchrec_cce.experiments.theory_charts import convergence_chart, expectation_chart, factorization_map
from torchrec_cce.files.atomic import atomic_path, write_json
from torchrec_cce.files.page import data_url, write_page

Picture = Chart | HeatMap


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    title: str
    lines: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExperimentReport:
    """All that is told of an experiment."""

    title: str
    results: Results
    curves: tuple[Curve, ...]
    """Trials at tuned rates."""
    full: Point | None
    compression: tuple[Compression, ...]
    """Empty without full tables to compare with."""
    candidates: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    collapses: tuple[Collapse, ...]
    charts: Mapping[str, tuple[Picture, ...]]
    """Subject → pictures."""

    @classmethod
    def of(cls, results: Results, *, title: str, runs: Path | None = None) -> "ExperimentReport":
        """Work everything out.

        Args:
            runs: the folder that holds those of the runs, for what they measured meanwhile; None if there is none.
        """
        curves = curves_of(results.chosen)
        full = full_table(curves)
        candidates = candidates_of(results.trials)
        front = pareto_front(candidates)
        strategies = strategies_of(curves)
        charts: dict[str, Sequence[Picture]] = {
            "BCE": quality_charts(curves, "BCE"),
            "AUC": quality_charts(curves, "AUC"),
            "clusterings": [*strategy_charts(strategies, full, "BCE"), *strategy_charts(strategies, full, "AUC")],
            "bytes": [pareto_chart(candidates, front)] if candidates else [],
            "entropies": [] if runs is None else entropy_charts(entropy_histories(curves, runs)),
            "theory": [factorization_map(), convergence_chart(), expectation_chart()],
        }
        return cls(
            title=title,
            results=results,
            curves=tuple(curves),
            full=full,
            compression=() if full is None else tuple(compression(curve, full) for curve in compressed(curves)),
            candidates=tuple(candidates),
            front=tuple(front),
            collapses=tuple(collapses(curves)),
            charts={subject: tuple(pictures) for subject, pictures in charts.items()},
        )

    @property
    def about(self) -> dict[str, str]:
        """Facts that belong beside the numbers."""
        versions = sorted({json.dumps(trial.versions, sort_keys=True) for trial in self.results.trials})
        return {
            "trials": f"{len(self.results.trials)}, {len(self.results.chosen)} of them at tuned rates; "
            f"{len(self.results.failures)} without a result",
            "full tables": "none were run"
            if self.full is None
            else f"test BCE {self.full.test_bce}, AUC {self.full.test_auc}, {self.full.first.full_bytes:,} bytes",
            "versions": "; ".join(", ".join(f"{k} {v}" for k, v in json.loads(one).items()) for one in versions),
        }

    @property
    def pictures(self) -> list[Picture]:
        return [picture for pictures in self.charts.values() for picture in pictures]

    def sections(self) -> list[Section]:
        """What the page shows, in its order."""
        nothing = () if self.curves else ("No trial at a tuned rate has a result.",)
        without_full = () if self.full else ("No full tables were run, so that there is nothing to compare with.",)
        found = [
            Section(title="Test BCE against parameters", lines=nothing, pictures=self.charts["BCE"]),
            Section(title="Test AUC against parameters", pictures=self.charts["AUC"]),
            Section(
                title="Compression at the quality of full tables",
                lines=without_full,
                tables=(compression_table(self.compression),) if self.compression else (),
            ),
            Section(
                title="What to configure for a budget of bytes",
                tables=(pareto_table(self.front),) if self.front else (),
                pictures=self.charts["bytes"],
            ),
            Section(title="Strategies for CCE", pictures=self.charts["clusterings"]),
            Section(
                title="Entropies of the largest table's pointers",
                tables=(collapse_table(self.collapses),) if self.collapses else (),
                pictures=self.charts["entropies"],
            ),
            Section(title="Everything that was run", tables=(points_table(self.curves),) if self.curves else ()),
            Section(
                title="Trials without a result",
                tables=(failures_table(self.results.failures),) if self.results.failures else (),
            ),
            Section(title="Theory", pictures=self.charts["theory"]),
        ]
        return [section for section in found if section.lines or section.tables or section.pictures]

    def as_dict(self) -> dict[str, Any]:
        """Every number of the page, and the runs that it is made of."""
        return {
            "title": self.title,
            "about": self.about,
            "trials": [_without(asdict(trial), "config") for trial in self.results.trials],
            "failures": [asdict(failure) for failure in self.results.failures],
            "curves": [_curve(curve) for curve in self.curves],
            "compression": [asdict(one) for one in self.compression],
            "candidates": [asdict(one) for one in self.candidates],
            "pareto_front": [one.label for one in self.front],
            "entropies": [asdict(one) for one in self.collapses],
            "tables": [asdict(table) for section in self.sections() for table in section.tables],
            "pictures": [
                {"kind": "chart" if isinstance(picture, Chart) else "heat map", **asdict(picture)}
                for picture in self.pictures
            ],
        }


def write_experiment_report(folder: Path, report: ExperimentReport) -> None:
    """Write `report.json`, and `report.html` with its pictures, which are also in `pictures/`, to `folder`.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed; `report.json` is there all the same.
    """
    write_json(folder / "report.json", report.as_dict(), indent=2, strict=True)
    drawn = {picture.name: picture.to_png() for picture in report.pictures}
    for name, png in drawn.items():
        with atomic_path(folder / "pictures" / f"{name}.png") as temporary:
            temporary.write_bytes(png)
    sections = [
        {
            "title": section.title,
            "lines": section.lines,
            "tables": section.tables,
            "pictures": [
                {"name": picture.name, "text": picture.text, "url": data_url(drawn[picture.name])}
                for picture in section.pictures
            ],
        }
        for section in report.sections()
    ]
    write_page(
        folder / "report.html",
        Path(__file__).with_name("experiment.html"),
        {},
        title=report.title,
        about=report.about,
        sections=sections,
    )


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "name": curve.name,
        "method": curve.method,
        "points": [
            {
                "cap": point.first.cap,
                "parameters": point.first.parameters,
                "test_bce": asdict(point.test_bce),
                "test_auc": asdict(point.test_auc),
                "validation_bce": asdict(point.validation_bce),
                "validation_auc": asdict(point.validation_auc),
                "runs": point.runs,
            }
            for point in curve.points
        ],
    }


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}
