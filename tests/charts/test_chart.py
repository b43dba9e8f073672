"""Charts as numbers, and what a picture shows of them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from torchrec_cce.charts.chart import MAX_SERIES, BarChart, Chart, Series, _draw, in_panels, visible_range

PNG = b"\x89PNG\r\n\x1a\n"


def chart(*series: Series, **changes: object) -> Chart:
    values = {"name": "c", "caption": "A chart", "x_label": "x", "y_label": "y", **changes}
    return Chart(series=series, **values)


@given(st.lists(st.floats(0.1, 0.9), min_size=1, max_size=20), st.booleans())
def test_the_better_three_quarters_are_always_visible(values: list[float], lower: bool) -> None:
    found = visible_range([Series(label="s", x=tuple(values), y=tuple(values))], lower_is_better=lower)
    assert found is not None
    low, high = found
    assert low < high
    best = sorted(values, reverse=not lower)
    assert all(low <= value <= high for value in best[: -(-3 * len(best) // 4)])


def test_one_that_diverged_does_not_press_the_others_together() -> None:
    series = Series(label="s", x=(1, 2, 3, 4, 5), y=(0.45, 0.46, 0.47, 0.46, 5.0))
    low, high = visible_range([series], lower_is_better=True) or (0, 0)
    assert low > 0.44
    assert high < 0.51
    shown = chart(series, y_range=(low, high))
    assert shown.text == "A chart; 1 points lie beyond the axis"
    assert chart(series).text == "A chart"
    assert visible_range([], lower_is_better=True) is None


def test_bars_and_levels_are_seen() -> None:
    series = [
        Series(label="curve", x=(1, 2, 3, 4), y=(0.45, 0.46, 0.47, 5.0), deviation=(0.1, 0.0, 0.0, 3.0)),
        Series(label="full", y=(0.2,), style="level"),
    ]
    low, high = visible_range(series, lower_is_better=True) or (0, 0)
    assert low < 0.2
    assert 0.55 < high < 1
    far = Series(label="full", y=(-5.0,), style="level")
    low, high = visible_range([series[0], far], lower_is_better=True) or (0, 0)
    assert 0.2 < low < 0.35
    assert visible_range([far], lower_is_better=True) == pytest.approx((-5.05, -4.95))
    alone = Series(label="curve", x=(1,), y=(0.5,))
    assert visible_range([alone, far], lower_is_better=True) == pytest.approx((-5.33, 0.83))


def test_the_legend_says_what_lies_beyond_the_axis() -> None:
    series = [Series(label="seen", x=(1,), y=(0.5,)), Series(label="far", x=(1,), y=(9.0,))]
    assert chart(*series, y_range=(0, 1)).to_png() != chart(*series).to_png()
    assert [chart(*series, y_range=(0, 1))._label(each) for each in series] == ["seen", "far (beyond the axis)"]


@pytest.mark.parametrize("log", [False, True])
def test_every_style_is_drawn_and_makes_a_difference(log: bool) -> None:
    curve = Series(label="curve", x=(1, 10), y=(1.0, 2.0), deviation=(0.1, 0.1))
    every = [
        curve,
        Series(label="bound", x=(1, 10), y=(1.2, 2.2), style="bound"),
        Series(label="reference", x=(1, 10), y=(1.5, 1.6), style="reference"),
        Series(label="points", x=(2, 5), y=(1.5, 1.1), style="points"),
        Series(label="level", y=(1.3,), style="level"),
        Series(label="level", y=(1.3,), deviation=(0.2,), style="level"),
        Series(label="line", x=(1, 10), y=(1.1, 1.2), style="line"),
        Series(label="", x=(1, 10), y=(1.6, 1.7), style="limit"),
    ]
    pictures = {chart(*every[:number], log_x=log, log_y=log, whole_x=not log).to_png() for number in range(1, 9)}
    assert len(pictures) == 8
    assert all(picture.startswith(PNG) for picture in pictures)


@given(st.integers(0, 40))
def test_panels_hold_all_in_order_and_none_too_many(count: int) -> None:
    parts = in_panels(range(count))
    assert [member for part in parts for member in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert len(sizes) == -(-count // MAX_SERIES)
    assert all(0 < size <= MAX_SERIES for size in sizes)


def test_one_point_on_a_logarithmic_axis() -> None:
    assert chart(Series(label="alone", x=(8112,), y=(0.45,)), log_x=True).to_png().startswith(PNG)


def test_zeros_are_seen_on_a_logarithmic_axis() -> None:
    """A plain logarithmic axis would end where the line falls to 0, as if there were fewer points."""
    counts = Series(label="counts", x=(0, 1, 2), y=(100, 10, 0), style="line")
    without = Series(label="counts", x=(0, 1), y=(100, 10), style="line")
    assert chart(counts, log_y=True)._y_scale == "symlog"
    assert chart(without, log_y=True)._y_scale == "log"
    assert chart(counts)._y_scale == "linear"
    assert chart(counts, log_y=True).to_png() != chart(without, log_y=True).to_png()


def test_more_lines_than_colours_all_differ() -> None:
    lines = [Series(label=str(number), x=(0, 1), y=(0, number), style="line") for number in range(MAX_SERIES + 1)]
    drawn = _draw(Figure().subplots(), lines)
    assert len({tuple(line.get_color()) for line in drawn}) == len(lines)


@pytest.mark.parametrize("stacked", [False, True])
def test_bars_stand_end_to_end_or_under_one_another(stacked: bool) -> None:
    bars = BarChart(
        name="b", caption="c", x_label="x", names=("first", "second"), bars={"a": (3, 1), "b": (2, 4)}, stacked=stacked
    )
    png = bars.to_png()
    assert png.startswith(PNG)
    assert png != replace(bars, stacked=not stacked).to_png()
    axes = Figure().subplots()
    bars.draw(axes)
    spans = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches)
    assert spans == ([(0, 1), (0, 3), (1, 5), (3, 5)] if stacked else [(0, 1), (0, 2), (0, 3), (0, 4)])
    heights = [(patch.get_y(), patch.get_y() + patch.get_height()) for patch in axes.patches]
    assert len(set(heights)) == (2 if stacked else 4)
    assert heights[0][0] < 0 < heights[0][1] or not stacked, "the bar lies at its name"
