"""Charts as numbers, the pictures that are drawn from nothing else, and pages with pictures that need no other file.

A report holds a `Chart`, a `BarChart` or a `HeatMap`, writes its numbers as JSON and draws it with `to_png`.
"""

import base64
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from torchrec_cce.extras import require
from torchrec_cce.files.atomic import atomic_path

_T = TypeVar("_T")

MAX_SERIES = 8
"""The number of curves in one panel that can still be told apart."""
_MOST_FOR_LEVELS = 3
"""A picture may be this many times as high as its curves to show the levels too."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4fa3", "#8c564b")
"""Okabe and Ito's, which the colour-blind can tell apart, and two more."""
_MARKERS = "osD^vP*X"
_GREY = "#777777"
_LEGEND_ROWS = 18

Style = Literal["curve", "line", "points", "bound", "limit", "reference", "level"]
"""`curve` is a coloured line with markers, `line` has none, and `points` are markers alone. `bound` is a dashed and
`limit` a dotted line in the colour of the series before. `reference` is a thin grey line, and `level` a dashed grey
horizontal line at its only y."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    label: str
    """What the legend calls it; a series with an empty label is not in the legend."""
    y: tuple[float, ...]
    x: tuple[float, ...] = ()
    """As many as `y`. A level has a marker here, or none."""
    deviation: tuple[float, ...] = ()
    """Half the length of each error bar, or of a level's band; empty if there are none."""
    style: Style = "curve"
    runs: tuple[tuple[str, ...], ...] = ()
    """For each y, the runs that it is made of; empty where nothing was trained."""


@dataclass(frozen=True, kw_only=True)
class Picture(ABC):
    """What a report draws."""

    name: str
    """The name of the picture's file, without its ending."""
    caption: str

    @property
    def text(self) -> str:
        """What stands below the picture."""
        return self.caption

    @abstractmethod
    def to_png(self) -> bytes:
        """Draw the picture. Raises MissingExtraError."""


@dataclass(frozen=True, kw_only=True)
class Chart(Picture):
    """Lines over one pair of axes."""

    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    """Values of 0 are shown too: below 1 the axis is linear then."""
    whole_x: bool = False
    """Whether the ticks of x are whole numbers only."""
    y_range: tuple[float, float] | None = None
    """The part of the y axis that is shown; None shows all of it."""

    @property
    def text(self) -> str:
        """The caption, and how many points the axis leaves out."""
        if self.y_range is None:
            return self.caption
        low, high = self.y_range
        hidden = sum(not low <= y <= high for series in self.series for y in series.y)
        return f"{self.caption}; {hidden} points lie beyond the axis" if hidden else self.caption

    def to_png(self) -> bytes:
        figure = _new_figure()
        axes = figure.subplots()
        lines = _draw(axes, self.series)
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        if self.log_x:
            _log_ticks(axes)
        axes.set_yscale(self._y_scale)
        if self.y_range is not None:
            axes.set_ylim(*self.y_range)
        if self.whole_x:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        # In the order in which the curves end, so that the eye finds a name where its line is.
        order = sorted(range(len(lines)), key=lambda at: _height(self.series[at]), reverse=True)
        named = [at for at in order if self.series[at].label]
        _add_legend(figure, [lines[at] for at in named], [self._label(self.series[at]) for at in named])
        return _to_png(figure)

    @property
    def _y_scale(self) -> str:
        if not self.log_y:
            return "linear"
        return "symlog" if any(y == 0 for series in self.series for y in series.y) else "log"

    def _label(self, series: Series) -> str:
        """The label of a series, which says so where the axis leaves out all of it."""
        if self.y_range is None or any(self.y_range[0] <= y <= self.y_range[1] for y in series.y):
            return series.label
        return f"{series.label} (beyond the axis)"


@dataclass(frozen=True, kw_only=True)
class BarChart(Picture):
    """Horizontal bars, several for each name."""

    x_label: str
    names: tuple[str, ...]
    """From top to bottom."""
    bars: dict[str, tuple[float, ...]]
    """Legend → the length of its bar for each name."""
    stacked: bool = False
    """Whether the bars of a name stand end to end, in place of under one another."""

    def to_png(self) -> bytes:
        figure = _new_figure(height=max(4.8, 1 + 0.3 * len(self.names)))
        axes = figure.subplots()
        drawn = self.draw(axes)
        axes.set(xlabel=self.x_label, yticks=range(len(self.names)), yticklabels=self.names)
        axes.invert_yaxis()
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        _add_legend(figure, drawn, list(self.bars))
        return _to_png(figure)

    def draw(self, axes: Any) -> list[Any]:
        """Draw the bars alone; returns what stands for each kind of them in a legend."""
        height = 0.8 if self.stacked else 0.8 / len(self.bars)
        ends = [0.0] * len(self.names)
        drawn = []
        for number, lengths in enumerate(self.bars.values()):
            shift = 0.0 if self.stacked else (number - (len(self.bars) - 1) / 2) * height
            places = [place + shift for place in range(len(self.names))]
            colour = _COLOURS[number % len(_COLOURS)]
            drawn.append(axes.barh(places, lengths, height=height, left=ends if self.stacked else 0, color=colour))
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        return drawn


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One matrix."""

    title: str
    values: tuple[tuple[float, ...], ...]
    """Row by row."""


@dataclass(frozen=True, kw_only=True)
class HeatMap(Picture):
    """Matrices side by side, in one scale of colours."""

    matrices: tuple[Matrix, ...]

    def to_png(self) -> bytes:
        figure = _new_figure(height=4.2)
        widths = [len(matrix.values[0]) for matrix in self.matrices]
        tallest = max(len(matrix.values) for matrix in self.matrices)
        every = figure.subplots(1, len(self.matrices), width_ratios=widths, squeeze=False)[0]
        extreme = max(abs(value) for matrix in self.matrices for row in matrix.values for value in row)
        for axes, matrix in zip(every, self.matrices, strict=True):
            picture = axes.imshow(matrix.values, cmap="RdBu_r", vmin=-extreme, vmax=extreme)
            axes.set_title(matrix.title, fontsize=10)
            axes.set(xticks=[], yticks=[], ylim=(tallest - 0.5, -0.5))  # cells of one size in all of them
            axes.spines[:].set_visible(False)
        figure.colorbar(picture, ax=list(every), shrink=0.8)
        return _to_png(figure)


def in_panels(members: Sequence[_T]) -> list[Sequence[_T]]:
    """Split `members` into parts of at most `MAX_SERIES`, about equally large."""
    count = -(-len(members) // MAX_SERIES)
    size = -(-len(members) // count) if count else 1
    return [members[start : start + size] for start in range(0, len(members), size)]


def visible_range(charted: Sequence[Series], *, lower_is_better: bool) -> tuple[float, float] | None:
    """The range of y in which the better three quarters of all points fill half of the picture or more.

    A run that nearly diverged would press all others into one line. The error bars of the points that are seen are in
    the range, and levels are too, unless they would take most of the picture. None if there are no points.
    """
    levels = [y for series in charted if series.style == "level" for y in series.y]
    curves = [y for series in charted if series.style != "level" for y in series.y]
    values = sorted(curves or levels, reverse=not lower_is_better)
    if not values:
        return None
    best, usual, worst = values[0], values[(3 * len(values) - 1) // 4], values[-1]
    end = best + 2 * (usual - best)
    end = min(end, worst) if lower_is_better else max(end, worst)
    low, high = min(best, end), max(best, end)
    ends = [low, high]
    for series in charted:
        for y, deviation in zip(series.y, series.deviation, strict=False):
            if low <= y <= high:
                ends += [y - deviation, y + deviation]
    height = max(ends) - min(ends)
    with_levels = [*ends, *levels]
    if not height or max(with_levels) - min(with_levels) <= _MOST_FOR_LEVELS * height:
        ends = with_levels
    margin = 0.06 * (max(ends) - min(ends)) or 0.01 * abs(best) or 0.01
    return min(ends) - margin, max(ends) + margin


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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]), autoescape=True
    )
    text = environment.get_template(template.name).render(**values)
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def _new_figure(*, height: float = 4.8) -> Any:
    return require("matplotlib.figure", "report").Figure(figsize=(9, height), layout="constrained")


def _to_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _add_legend(figure: Any, lines: Sequence[Any], labels: Sequence[str]) -> None:
    columns = max(1, -(-len(labels) // _LEGEND_ROWS))
    figure.legend(lines, labels, loc="outside right upper", frameon=False, fontsize=9, ncols=columns)


def _draw(axes: Any, charted: Sequence[Series]) -> list[Any]:
    """Draw each series; returns what stands for each in a legend."""
    lines = []
    colours = _colours(sum(series.style in ("curve", "line", "points") for series in charted))
    number = -1
    for series in charted:
        if series.style in ("curve", "line", "points"):
            number += 1
        colour, marker = colours[number], _MARKERS[number % len(_MARKERS)]
        if series.style == "level":
            lines.append(axes.axhline(series.y[0], linestyle="--", linewidth=1.4, color=_GREY))
            axes.plot(series.x, series.y[: len(series.x)], marker="o", linestyle="", color=_GREY)
            if any(series.deviation):
                half = series.deviation[0]
                axes.axhspan(series.y[0] - half, series.y[0] + half, color=_GREY, alpha=0.12, linewidth=0)
        elif series.style in ("bound", "limit"):
            dashes = "--" if series.style == "bound" else ":"
            lines.extend(axes.plot(series.x, series.y, linestyle=dashes, linewidth=1.2, color=colour))
        elif series.style == "reference":
            lines.extend(axes.plot(series.x, series.y, marker=".", linewidth=1.2, color=_GREY))
        elif series.style == "line":
            lines.extend(axes.plot(series.x, series.y, linewidth=1.4, color=colour))
        elif series.style == "points":
            look = {"marker": marker, "markersize": 6, "linestyle": "", "alpha": 0.75}
            lines.extend(axes.plot(series.x, series.y, color=colour, **look))
        else:
            bars = series.deviation or None
            lines.append(
                axes.errorbar(series.x, series.y, yerr=bars, marker=marker, markersize=6, capsize=3, color=colour)
            )
    return lines


def _colours(count: int) -> Sequence[Any]:
    """A colour for each of `count` lines: the distinct ones while there are enough of them."""
    if count <= len(_COLOURS):
        return _COLOURS
    spectrum = require("matplotlib", "report").colormaps["turbo"]
    return [spectrum(0.05 + 0.9 * number / (count - 1)) for number in range(count)]


def _log_ticks(axes: Any) -> None:
    """1k, 2k, 5k, …: matplotlib's own write powers of ten over one another."""
    ticker = require("matplotlib.ticker", "report")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _height(series: Series) -> float:
    return series.y[-1] if series.y and math.isfinite(series.y[-1]) else -math.inf
