"""Plots as SVG text, without a plotting library: lines over a quantity, and intervals side by side.

A plot is a whole SVG file, and can also be put into a report's HTML as it is: it then takes the colours of the page.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

COLOURS = ("#6b7280", "#3f63e8", "#c2571a", "#1d8f5f")
STYLE = """
.plot { font: 12px system-ui, sans-serif; }
.plot text { fill: var(--muted, #57606a); }
.plot .title { fill: var(--ink, #171a21); }
.plot .ground { fill: var(--surface, #ffffff); }
.plot .grid { stroke: var(--line, #d9dde4); }
.plot .mean { stroke: var(--ink, #171a21); stroke-width: 2; }
"""
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 26, 40
"""Margins of a panel, for the numbers, the title and the name of the axis."""


@dataclass(frozen=True)
class Line:
    """A quantity as a line through its points."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 1
    """Position in `COLOURS`, modulo their number."""
    dashed: bool = False


@dataclass(frozen=True)
class Interval:
    """A mean with its interval, and the values that it is the mean of."""

    low: float
    high: float
    mean: float
    values: Sequence[float]


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to coordinates."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_plot(
    panels: Mapping[str, Sequence[Line]],
    x_label: str,
    x_ticks: Sequence[float] | None = None,
    y_range: tuple[float, float] | None = None,
    width: int = 640,
    panel_height: int = 130,
) -> str:
    """Panels of lines, one below the other, that share their x axis. Lines of one panel are named in a legend.

    Args:
        panels: lines by the title of their panel.
        x_label: name of the x axis.
        x_ticks: values to mark on the x axis; round numbers if None.
        y_range: lowest and highest value of the y axis; that of each panel's lines if None.
        width: of the plot, in pixels.
        panel_height: height of the drawing area of a panel, in pixels.

    Returns:
        SVG text; empty if no line has a finite point. Other points, and panels without any, are left out.
    """
    panels = {title: finite for title, lines in panels.items() if (finite := _finite(lines))}
    if not panels:
        return ""
    xs = [x for lines in panels.values() for line in lines for x, _ in line.points]
    x = _axis(0 if y_range else min(xs), max(xs), LEFT, width - RIGHT)
    top = 0.0
    parts = []
    for title, lines in panels.items():
        ys = [y for line in lines for _, y in line.points]
        low, high = y_range or (min(ys), max(ys))
        y = _axis(low, high, top + TOP + panel_height, top + TOP)
        parts.append(_text(LEFT, top + TOP - 9, title, "start", "title"))
        parts += [_grid(x.start, x.end, y.at(tick), y.at(tick)) for tick in ticks(y.low, y.high)]
        parts += [_text(LEFT - 8, y.at(tick) + 4, f"{tick:g}", "end") for tick in ticks(y.low, y.high)]
        parts += [_polyline(line, x, y) for line in lines]
        top += TOP + panel_height + 4
    parts += [_text(x.at(tick), top + 12, f"{tick:g}") for tick in (x_ticks or ticks(x.low, x.high))]
    parts.append(_text((x.start + x.end) / 2, top + 30, x_label))
    top += BOTTOM
    for line in (line for lines in panels.values() if len(lines) > 1 for line in lines):
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + 32}" y1="{top + 4}" y2="{top + 4}" {_stroke(line)}/>')
        parts.append(_text(LEFT + 40, top + 8, line.label, "start"))
        top += 18
    return _svg(width, top, f"{', '.join(filter(None, panels))} against {x_label}".strip(), parts)


def interval_plot(columns: Sequence[str], rows: Mapping[str, Sequence[Interval]], x_label: str) -> str:
    """One panel for each column, side by side; in it, a row's interval as a bar, its mean and each value.

    Args:
        columns: titles of the panels.
        rows: intervals by the label of the row, one for each column.
        x_label: name of the x axis of every panel.
    """
    row_height, panel_width = 26, 200
    left = 24 + 7 * max(map(len, rows))
    bottom = TOP + row_height * len(rows)
    parts = [
        _text(left - 10, TOP + row_height * (place + 0.5) + 4, label, "end", "title")
        for place, label in enumerate(rows)
    ]
    for number, column in enumerate(columns):
        start = left + number * (panel_width + 24)
        intervals = [row[number] for row in rows.values()]
        shown = [value for item in intervals for value in (item.low, item.high, *item.values)]
        x = _axis(min(shown), max(shown), start + 8, start + panel_width - 8)
        parts.append(_text(start + panel_width / 2, TOP - 9, column, style="title"))
        parts += [_grid(start, start + panel_width, side, side) for side in (TOP, bottom)]
        for tick in ticks(x.low, x.high, 4):
            parts += [_grid(x.at(tick), x.at(tick), TOP, bottom), _text(x.at(tick), bottom + 16, f"{tick:g}")]
        parts.append(_text(start + panel_width / 2, bottom + 33, x_label))
        for place, item in enumerate(intervals):
            y = TOP + row_height * (place + 0.5)
            bar = f'x1="{x.at(item.low):.1f}" x2="{x.at(item.high):.1f}" y1="{y}" y2="{y}"'
            parts.append(f'<line {bar} stroke="#9aa4b2" stroke-width="6"/>')
            parts += [
                f'<circle cx="{x.at(value):.1f}" cy="{y}" r="3.5" fill="{COLOURS[1]}" fill-opacity="0.6"/>'
                for value in item.values
            ]
            mean = f"{x.at(item.mean):.1f}"
            parts.append(f'<line class="mean" x1="{mean}" x2="{mean}" y1="{y - 8}" y2="{y + 8}"/>')
    width = left + len(columns) * (panel_width + 24)
    return _svg(width, bottom + BOTTOM, f"{', '.join(columns)}: {x_label}", parts)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, in at most `most` steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * power) <= most)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _axis(low: float, high: float, start: float, end: float) -> Axis:
    """A scale that is not empty, also if all values are the same."""
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    return Axis(low, high, start, end)


def _finite(lines: Sequence[Line]) -> list[Line]:
    kept = [replace(line, points=[point for point in line.points if math.isfinite(point[1])]) for line in lines]
    return [line for line in kept if line.points]


def _polyline(line: Line, x: Axis, y: Axis) -> str:
    points = [(x.at(a), y.at(b)) for a, b in sorted(line.points)]
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" {_stroke(line)}/>'
    through = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    return f'<polyline points="{through}" {_stroke(line)}><title>{escape(line.label)}</title></polyline>'


def _stroke(line: Line) -> str:
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    return f'fill="none" stroke="{COLOURS[line.colour % len(COLOURS)]}" stroke-width="2"{dash}'


def _grid(x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "label") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, description: str, parts: Sequence[str]) -> str:
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" {box} role="img" aria-label="{escape(description)}">'
    ground = '<rect class="ground" width="100%" height="100%"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", ground, *parts, "</svg>\n"])
