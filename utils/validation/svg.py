"""Small pictures as inline SVG, which need no library and follow the page's colours."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP = 640, 120, 46, 18


def bar_chart(names: Sequence[str], values: Sequence[float], title: str) -> str:
    """Draw one bar per value on a logarithmic axis; hovering over a bar shows its name and value.

    Args:
        names: Label of each bar.
        values: Height of each bar; zeros and values that are not finite get no bar.
        title: Line above the chart.
    """
    logs = [math.log10(value) for value in values if math.isfinite(value) and value > 0]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high = max(high, low + 1)
    step = (WIDTH - LEFT) / len(values)
    bars = []
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        if not (math.isfinite(value) and value > 0):
            continue
        height = max(1.0, (math.log10(value) - low) / (high - low) * HEIGHT)
        bars.append(
            f'<rect x="{LEFT + index * step:.1f}" y="{TOP + HEIGHT - height:.1f}" width="{max(0.6, step * 0.85):.1f}" '
            f'height="{height:.1f}"><title>{escape(name)}: {value:.3g}</title></rect>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {TOP + HEIGHT + 4}" width="{WIDTH}" role="img" aria-label="{escape(title)}">'
        f'<text x="{LEFT}" y="11">{escape(title)} (log scale, {len(values)} in order)</text>'
        f'<text x="2" y="{TOP + 8}">1e{high}</text><text x="2" y="{TOP + HEIGHT}">1e{low}</text>{"".join(bars)}</svg>'
    )


def bar_list(names: Sequence[str], values: Sequence[float], labels: Sequence[str], title: str) -> str:
    """Draw one horizontal bar per value, its name before it and its label behind, in the given order.

    Args:
        names: What each bar stands for.
        values: Length of each bar, from 0.
        labels: Text behind each bar.
        title: What screen readers say.
    """
    row, left, room = 16, 250, 170
    largest = max(values, default=0.0) or 1.0
    lines = []
    for index, (name, value, label) in enumerate(zip(names, values, labels, strict=True)):
        top = index * row
        width = max(1.0, value / largest * room)
        short = name if len(name) <= 40 else f"{name[:12]}...{name[-25:]}"
        lines.append(
            f'<text x="{left - 6}" y="{top + 12}" text-anchor="end">{escape(short)}</text>'
            f'<rect x="{left}" y="{top + 3}" width="{width:.1f}" height="{row - 5}"><title>{escape(name)}: '
            f'{escape(label)}</title></rect><text x="{left + width + 6:.1f}" y="{top + 12}">{escape(label)}</text>'
        )
    height = row * len(names) + 4
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" aria-label="{escape(title)}">'
        f"{''.join(lines)}</svg>"
    )
