"""A chart as numbers, and the picture that is drawn from nothing else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torchrec_cce.extras import require
from torchrec_cce.files.page import to_png

_T = TypeVar("_T")

MAX_SERIES = 8
"""Curves in one panel that can still be told apart."""
_MOST_FOR_LEVELS = 3
"""Heights of the curves that a picture may have for the sake of a level."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4fa3", "#8c564b")
"""Okabe and Ito's, which the colour-blind can tell apart, and two more."""
_MARKERS = "osD^vP*X"
_GREY = "#777777"

Style = Literal["curve", "reference", "level", "points", "bound"]
"""A coloured line with markers; a thin grey line; a horizontal line at the one y; markers alone; a dashed line in the
colour of the series before."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    label: str
    y: tuple[float, ...]
    x: tuple[float, ...] = ()
    """As many as `y`; none for a level."""
    deviation: tuple[float, ...] = ()
    """Half the length of each bar, or of a level's band; none where there are none."""
    style: Style = "curve"
    runs: tuple[tuple[str, ...], ...] = ()
    """For each y, the runs that it is made of; none where nothing was trained."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over one pair of axes."""

    name: str
    """Of the picture's file, without its ending."""
    caption: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    whole_x: bool = False
    """Ticks at whole numbers only."""
    y_range: tuple[float, float] | None = None
    """What is shown; all that there is if None."""

    @property
    def text(self) -> str:
        """The caption, and how many points the axis leaves out."""
        if self.y_range is None:
            return self.caption
        low, high = self.y_range
        hidden = sum(not low <= y <= high for series in self.series for y in series.y)
        return f"{self.caption}; {hidden} points lie beyond the axis" if hidden else self.caption

    def to_png(self) -> bytes:
        """Draw it. Raises MissingExtraError."""
        figure = require("matplotlib.figure", "report").Figure(figsize=(9, 4.8), layout="constrained")
        axes = figure.subplots()
        lines = _draw(axes, self.series)
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        if self.log_x:
            _log_ticks(axes)
        axes.set_yscale("log" if self.log_y else "linear")
        if self.y_range is not None:
            axes.set_ylim(*self.y_range)
        if self.whole_x:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        # In the order in which the curves end, so that the eye finds a name where its line is.
        order = sorted(range(len(lines)), key=lambda at: _height(self.series[at]), reverse=True)
        figure.legend(
            [lines[at] for at in order],
            [self._label(self.series[at]) for at in order],
            loc="outside right upper",
            frameon=False,
            fontsize=9,
        )
        return to_png(figure)

    def _label(self, series: Series) -> str:
        """Its own, and where the axis leaves out all of it, that."""
        if self.y_range is None or any(self.y_range[0] <= y <= self.y_range[1] for y in series.y):
            return series.label
        return f"{series.label} (beyond the axis)"


def in_panels(members: Sequence[_T]) -> list[Sequence[_T]]:
    """Parts of at most `MAX_SERIES`, about equally large."""
    count = -(-len(members) // MAX_SERIES)
    size = -(-len(members) // count) if count else 1
    return [members[start : start + size] for start in range(0, len(members), size)]


def visible_range(charted: Sequence[Series], *, lower_is_better: bool) -> tuple[float, float] | None:
    """The range of y in which the better three quarters of all points fill half of the picture or more.

    A run that nearly diverged would press all others into one line. The bars of what is seen are in it, and levels,
    unless they would take most of the picture. None without points.
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


def _draw(axes: Any, series: Sequence[Series]) -> list[Any]:
    """What stands for each series in a legend."""
    lines = []
    number = -1
    for one in series:
        if one.style in ("curve", "points"):
            number += 1
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        if one.style == "level":
            lines.append(axes.axhline(one.y[0], linestyle="--", linewidth=1.4, color=_GREY))
            if any(one.deviation):
                half = one.deviation[0]
                axes.axhspan(one.y[0] - half, one.y[0] + half, color=_GREY, alpha=0.12, linewidth=0)
        elif one.style == "bound":
            lines.extend(axes.plot(one.x, one.y, linestyle="--", linewidth=1.2, color=colour))
        elif one.style == "reference":
            lines.extend(axes.plot(one.x, one.y, marker=".", linewidth=1.2, color=_GREY))
        elif one.style == "points":
            lines.extend(axes.plot(one.x, one.y, marker=marker, markersize=6, linestyle="", alpha=0.75, color=colour))
        else:
            bars = one.deviation or None
            lines.append(axes.errorbar(one.x, one.y, yerr=bars, marker=marker, markersize=6, capsize=3, color=colour))
    return lines


def _log_ticks(axes: Any) -> None:
    """1k, 2k, 5k, …: matplotlib's own write powers of ten over one another."""
    ticker = require("matplotlib.ticker", "report")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _height(series: Series) -> float:
    return series.y[-1] if series.y and math.isfinite(series.y[-1]) else -math.inf
