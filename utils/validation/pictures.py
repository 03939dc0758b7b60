"""Small pictures inside a report: self-contained HTML, no drawing library, readable in light and dark.

Lines and bars are SVG that takes the page's colours. Heat maps are PNG files written here, a few hundred bytes each,
because a thousand rectangles of SVG would be larger than the rest of the report.
"""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, TOP = 640, 150, 52, 20
COLOURS = np.array(
    [(13, 8, 60), (62, 25, 118), (122, 40, 123), (182, 60, 108), (230, 99, 79), (250, 158, 59), (252, 225, 110)],
    dtype=float,
)
"""Dark to light, even steps in lightness."""
STROKES = ("#4878b0", "#d1793a", "#4f9a5b", "#b5557d", "#8a75b8")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4")


@dataclass(frozen=True)
class Picture:
    """One picture with its title and what to see in it."""

    title: str
    """Line above the picture."""
    content: str
    """Self-contained HTML: an ``svg``, an ``img`` with its data inside, or styled text."""
    caption: str = ""
    """What to see in it."""

    def html(self) -> str:
        """Return the picture as one HTML element."""
        below = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        return f"<figure><b>{escape(self.title)}</b>{self.content}{below}</figure>"


def png(pixels: np.ndarray) -> bytes:
    """Encode pixels as a PNG file.

    Args:
        pixels: ``(height, width, 3)`` of type uint8.
    """
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 1:] = pixels.reshape(height, 3 * width)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(rows.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map numbers to colours; what is not finite becomes grey.

    Returns:
        ``(*values.shape, 3)`` of type uint8.
    """
    finite = np.isfinite(values)
    share = np.clip((np.where(finite, values, low) - low) / max(high - low, 1e-30), 0, 1) * (len(COLOURS) - 1)
    index = np.minimum(share.astype(int), len(COLOURS) - 2)
    rest = (share - index)[..., None]
    mixed = COLOURS[index] * (1 - rest) + COLOURS[index + 1] * rest
    return np.where(finite[..., None], mixed, 128).round().astype(np.uint8)


def heat_image(values: np.ndarray, label: str, size: int, low: float | None = None, high: float | None = None) -> str:
    """Return a matrix as an ``img`` of `size` pixels on its longer side.

    Args:
        values: ``(rows, columns)``.
        label: Text for those who cannot see it.
        size: Pixels of the longer side on the page.
        low: Value of the darkest colour; the smallest finite one by default.
        high: Value of the lightest colour; the largest finite one by default.
    """
    finite = values[np.isfinite(values)]
    if low is None:
        low = float(finite.min()) if finite.size else 0.0
    if high is None:
        high = float(finite.max()) if finite.size else 1.0
    data = base64.b64encode(png(colours(values, low, high))).decode()
    rows, columns = values.shape
    width, height = (
        (size, max(8, size * rows // columns)) if columns >= rows else (max(8, size * columns // rows), size)
    )
    return (
        f'<img alt="{escape(label)}" title="{escape(label)}" width="{width}" height="{height}" '
        f'style="image-rendering:pixelated" src="data:image/png;base64,{data}">'
    )


def heat_map(
    values: np.ndarray, title: str, caption: str = "", low: float | None = None, high: float | None = None
) -> Picture:
    """Return a matrix as a picture with its range below."""
    image = heat_image(values, title, 280, low, high)
    finite = values[np.isfinite(values)]
    extent = f"dark {finite.min():.3g} to light {finite.max():.3g}" if finite.size else "nothing finite"
    return Picture(title, image, f"{caption} {extent}.".strip())


def heat_grid(maps: Mapping[str, np.ndarray], title: str, caption: str = "", size: int = 110) -> Picture:
    """Return several matrices side by side, each with its name."""
    cells = "".join(
        f'<span style="display:inline-block;margin:2px 8px 2px 0;text-align:center;font-size:10px">'
        f"{heat_image(values, name, size)}<br>{escape(name)}</span>"
        for name, values in maps.items()
    )
    return Picture(title, f"<div>{cells}</div>", caption)


def line_chart(
    positions: Sequence[float], series: Mapping[str, Sequence[float]], title: str, across: str, caption: str = ""
) -> Picture:
    """Draw one line per series, told apart by colour and dashes; hovering over a point shows its numbers.

    Args:
        positions: Common places on the horizontal axis.
        series: Values of each line.
        title: Line above.
        across: What the horizontal axis is.
        caption: What to see.
    """
    values = [v for line in series.values() for v in line if math.isfinite(v)]
    low, high = min([0.0, *values]), max(values, default=1.0)
    high = high if high > low else low + 1.0
    left, right = min(positions), max(positions)
    span = (right - left) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - left) / span * (WIDTH - LEFT - 10), TOP + HEIGHT * (1 - (y - low) / (high - low))

    marks, legend = [], []
    for number, (name, line) in enumerate(series.items()):
        stroke, dash = STROKES[number % len(STROKES)], DASHES[number % len(DASHES)]
        spots = [(*place(x, y), x, y) for x, y in zip(positions, line, strict=True) if math.isfinite(y)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _, _ in spots)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-dasharray="{dash}"/>')
        marks += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{stroke}"><title>{escape(name)} at {x:g}: {y:.4g}'
            "</title></circle>"
            for a, b, x, y in spots
        ]
        legend.append(f'<tspan fill="{stroke}" dx="10">{escape(name)}</tspan>')
    bottom = TOP + HEIGHT
    content = (
        f'<svg viewBox="0 0 {WIDTH} {bottom + 18}" width="{WIDTH}" role="img" aria-label="{escape(title)}">'
        f'<text x="{LEFT - 10}" y="12">{"".join(legend)}</text>'
        f'<text x="2" y="{TOP + 8}">{high:.3g}</text><text x="2" y="{bottom}">{low:.3g}</text>'
        f'<line x1="{LEFT}" y1="{bottom}" x2="{WIDTH - 10}" y2="{bottom}" stroke="#8888"/>'
        f'<text x="{LEFT}" y="{bottom + 14}">{left:g}</text><text x="{WIDTH - 40}" y="{bottom + 14}">{right:g}</text>'
        f'<text x="{WIDTH // 2 - 40}" y="{bottom + 14}">{escape(across)}</text>{"".join(marks)}</svg>'
    )
    return Picture(title, content, caption)


def token_strip(names: Sequence[str], values: Sequence[float], title: str, caption: str = "") -> Picture:
    """Show tokens in a row, shaded by their value: one hue for what raises the answer, another for what lowers it."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0
    spans = []
    for name, value in zip(names, values, strict=True):
        share = abs(value) / largest * 0.7 if math.isfinite(value) else 0.0
        hue = "72,120,176" if value > 0 else "209,121,58"
        spans.append(
            f'<span title="{value:.4g}" style="display:inline-block;padding:2px 5px;margin:1px;border-radius:3px;'
            f'background:rgba({hue},{share:.2f})">{escape(name)}</span>'
        )
    return Picture(title, f"<div>{''.join(spans)}</div>", caption)
