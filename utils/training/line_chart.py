"""Curves as inline SVG, which needs no library and follows the page's colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 230, 52, 10, 24, 34
MOST_POINTS = 300
COLOURS = 8
"""How many series have a colour of their own (the classes c0 to c7)."""


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    """Number of the colour."""
    main: bool = False
    """Drawn thicker and on top."""
    faint: bool = False
    """Drawn thin and pale, such as raw values beside their trend."""


def line_chart(
    series: Sequence[Series],
    title: str,
    unit: str = "step",
    baseline: tuple[str, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Draw curves over common axes; points that are not finite are left out. Empty when there is nothing to draw.

    Args:
        series: The curves.
        title: Line above the chart.
        unit: What the horizontal axis counts.
        baseline: Name and height of a dashed line.
        marks: Places of vertical lines, and what they say when pointed at.
    """
    curves = [(one, thinned([(x, y) for x, y in one.points if math.isfinite(y)])) for one in series]
    curves = sorted(((one, points) for one, points in curves if points), key=lambda pair: (pair[0].main, pair[0].faint))
    if not curves:
        return ""
    xs = [*(x for _, points in curves for x, _ in points), *(x for x, _ in marks)]
    solid = [y for one, points in curves if not one.faint for _, y in points] or [
        y for _, points in curves for _, y in points
    ]
    ys = [*solid, *([baseline[1]] if baseline else [])]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(0.0, *xs), max(*xs, x_ticks[0] + 1e-9)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low or 1) * across,
            TOP + down - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low or 1) * down,
        )

    parts = [f'<text class="title" x="{LEFT}" y="14">{escape(title)}</text>']
    for value in y_ticks:
        _, height = place(x_low, value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{height + 3.5:.1f}" text-anchor="end">{number(value)}</text>'
        )
    for value in x_ticks:
        if value <= x_high:
            width, _ = place(value, y_low)
            parts.append(
                f'<text x="{width:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{number(value)}</text>'
            )
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(unit)}</text>')
    if baseline:
        _, height = place(x_low, baseline[1])
        parts.append(
            f'<line class="baseline" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
            f'<text x="{WIDTH - RIGHT}" y="{height - 4:.1f}" text-anchor="end">{escape(baseline[0])}</text>'
        )
    for x, said in marks:
        width, _ = place(x, y_low)
        parts.append(
            f'<line class="mark" x1="{width:.1f}" x2="{width:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            f"<title>{escape(said)}</title></line>"
        )
    for one, points in curves:
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        kind = " main" if one.main else " faint" if one.faint else ""
        last = f"{escape(one.name)}: {number(points[-1][1])} at {escape(unit)} {number(points[-1][0])}"
        parts.append(
            f'<polyline class="c{one.colour % COLOURS}{kind}" points="{drawn}"><title>{last}</title></polyline>'
            if len(points) > 1
            else _dot(one.colour % COLOURS, place(*points[0]), last)
        )
    label = escape(title)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _dot(colour: int, place: tuple[float, float], label: str) -> str:
    """Return a curve of one point."""
    x, y = place
    return f'<circle class="c{colour} dot" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{label}</title></circle>'


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most `most` points, the first and the last among them; each stands for the mean of its stretch."""
    if len(points) <= most:
        return list(points)
    size = len(points) / (most - 2)
    result = [points[0]]
    for index in range(most - 2):
        part = points[int(index * size) : max(int((index + 1) * size), int(index * size) + 1)]
        result.append((part[-1][0], sum(y for _, y in part) / len(part)))
    return [*result[:-1], points[-1]]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers that cover a range.

    Example:
        >>> ticks(0, 230)
        [0.0, 50.0, 100.0, 150.0, 200.0, 250.0]
    """
    span = high - low if high > low else abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10, 20) if span / (size * factor) <= wanted)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """Return a number for an axis, short."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
