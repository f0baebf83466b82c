"""Plots as SVG: well formed, in range, and safe with any label."""

import math
from xml.etree import ElementTree

import pytest

from pipelines.common.plots import Interval, Line, interval_plot, line_plot, ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0.12, 0.31, [0.15, 0.2, 0.25, 0.3]), (-3, 4, [-2, 0, 2, 4])],
)
def test_ticks_are_round_numbers_in_the_range(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_lines_of_a_panel_stay_in_it_and_are_named() -> None:
    lines = [Line("<b>first</b>", [(10, 20.0), (248, 80.0)]), Line("second", [(10, 0.0), (248, 100.0)], dashed=True)]
    plot = line_plot({"recall": lines}, "tokens", x_ticks=[10, 248], y_range=(0, 100), width=400, panel_height=100)
    root = ElementTree.fromstring(plot)
    assert [text.text for text in root.iter(f"{SVG}text")][-2:] == ["<b>first</b>", "second"]
    width, height = float(root.get("width") or 0), float(root.get("height") or 0)
    for polyline in root.iter(f"{SVG}polyline"):
        for point in (polyline.get("points") or "").split():
            x, y = map(float, point.split(","))
            assert 0 < x < width
            assert 0 < y < height


def test_points_that_are_not_finite_are_left_out() -> None:
    curves = {"loss": [Line("loss", [(1, 2.0), (2, math.nan), (3, 1.0)])], "none": [Line("none", [(1, math.inf)])]}
    root = ElementTree.fromstring(line_plot(curves, "step"))
    (polyline,) = root.iter(f"{SVG}polyline")
    assert len((polyline.get("points") or "").split()) == 2
    assert line_plot({"loss": [Line("loss", [(1, math.nan)])]}, "step") == ""


@pytest.mark.parametrize("points", [[(1, 2.0)], [(1, 2.0), (2, 2.0)], [(1, 0.0), (2, 0.0)]])
def test_one_point_and_a_constant_can_be_drawn(points: list[tuple[float, float]]) -> None:
    ElementTree.fromstring(line_plot({"loss": [Line("loss", points)]}, "step"))


def test_intervals_show_each_value_and_the_mean() -> None:
    rows = {"one": [Interval(1, 3, 2, [1.5, 2.5])], "two": [Interval(5, 5, 5, [5])]}
    root = ElementTree.fromstring(interval_plot(["text to image"], rows, "recall at 1"))
    assert len(list(root.iter(f"{SVG}circle"))) == 3
    means = [line for line in root.iter(f"{SVG}line") if line.get("class") == "mean"]
    assert float(means[0].get("x1") or 0) < float(means[1].get("x1") or 0)
