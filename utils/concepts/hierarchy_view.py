"""A hierarchy as an interactive picture for notebooks and pages, and as a PNG.

The interactive one is a drawing with a few lines of script and no network: pointing at a concept tells its facts, a
click lights up what it builds on and what builds on it. Without scripts it is still the drawing.
"""

import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.concepts.hierarchy import ConceptHierarchy
from utils.concepts.hierarchy_layout import HEIGHT, MOST_SHOWN, Box, Layout, Line, layered_layout
from utils.concepts.hierarchy_order import HierarchyError
from utils.concepts.hierarchy_page import SCRIPT, STYLE
from utils.concepts.hierarchy_parts import IS_A, RELATIONS, REQUIRES
from utils.growth.lineage_view import DARK
from utils.runtime.files import saving, write_atomic
from utils.runtime.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#7fa3c8", "#e0a37f", "#85bd99", "#b49bd2", "#cdb36a", "#d593b2", "#7fbcc1", "#a6adb5")
DARK_COLOURS = ("#3f6a98", "#a8623a", "#3f7f57", "#73569a", "#8a7028", "#954f70", "#397b80", "#59616a")
"""By domain, in the order of their names, the last for all that follow; as in the page's style."""
SAYINGS = {REQUIRES: ("first", "then"), IS_A: ("general", "special")}
"""What stands at either end of an arrow."""
MOST_NAMED = 12
"""Concepts that a card lists."""
PIXELS = 96
"""Per inch."""
HEAD = 7.0
"""Pixels of an arrow's head."""


def hierarchy_html(hierarchy: ConceptHierarchy) -> str:
    """Return the interactive picture as a piece of a page; a hierarchy too large for one says so.

    Only relations that do not follow from others are drawn.
    """
    if not 0 < len(hierarchy) <= MOST_SHOWN:
        said = f"{hierarchy!r}. " + (
            "It is empty." if not len(hierarchy) else f"A picture shows at most {MOST_SHOWN}: take a part of it with "
            "domain(name) or restricted(names)."
        )  # fmt: skip
        return f"<p>{escape(said)}</p>"
    layout = layered_layout(hierarchy)
    number = {box.name: place for place, box in enumerate(layout.boxes)}
    colour = colour_numbers(hierarchy)
    drawn = [_svg_line(line, place) for place, line in enumerate(layout.lines)]
    drawn += [
        _svg_box(box, place, colour[hierarchy.concept(box.name).domain]) for place, box in enumerate(layout.boxes)
    ]
    graph = {
        "names": [box.name for box in layout.boxes],
        "said": _cards(hierarchy, [box.name for box in layout.boxes]),
        "lines": [[number[line.relation.parent], number[line.relation.concept]] for line in layout.lines],
    }
    size = (
        f'width="{layout.width:.0f}" height="{layout.height:.0f}" viewBox="0 0 {layout.width:.0f} {layout.height:.0f}"'
    )
    return (
        f'<style>{STYLE}</style><div class="seedbed-hierarchy" data-graph="{escape(json.dumps(graph))}">'
        f"{_legend(hierarchy, colour)}"
        f'<div class="scroll"><svg {size} role="group" aria-label="hierarchy of concepts">{"".join(drawn)}</svg></div>'
        '<div class="card" aria-live="polite">Point at a concept to read about it; click it to see what it builds on '
        f"and what builds on it.</div><script>{SCRIPT}</script></div>"
    )


def save_hierarchy_html(hierarchy: ConceptHierarchy, path: str | Path) -> Path:
    """Write the interactive picture as a page that needs nothing else, and return its path.

    Raises:
        HierarchyError: It is too large, or the file cannot be written.
    """
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>Hierarchy of concepts</title>'
        "<style>body{margin:0;background:#fff}@media (prefers-color-scheme:dark){body{background:#16191d}}"
        ".seedbed-hierarchy .scroll{max-height:none}</style></head>"
        f"<body>{hierarchy_html(hierarchy)}</body></html>"
    )
    with saving(path, "the picture", HierarchyError) as file:
        write_atomic(file, page)
    return file


def colour_numbers(hierarchy: ConceptHierarchy) -> dict[str, int]:
    """Return the number of each domain's colour; the last one is shared by all that find none left."""
    return {name: min(place, len(COLOURS) - 1) for place, name in enumerate(hierarchy.domains())}


def _svg_box(box: Box, number: int, colour: int) -> str:
    """Return a concept as a group that can be pointed at and clicked."""
    return (
        f'<g data-node="{number}" tabindex="0" role="button" aria-label="{escape(box.name)}">'
        f"<title>{escape(box.name)}</title>"
        f'<rect class="c{colour}" x="{box.left:.1f}" y="{box.middle - HEIGHT / 2:.1f}" width="{box.width:.1f}" '
        f'height="{HEIGHT:.0f}" rx="6"/>'
        f'<text x="{box.left + box.width / 2:.1f}" y="{box.middle:.1f}">{escape(box.label)}</text></g>'
    )


def _svg_line(line: Line, number: int) -> str:
    """Return a relation as a curve with a head."""
    points = curve(line)
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for place in range(1, len(points), 3):
        path += "C" + " ".join(f"{x:.1f} {y:.1f}" for x, y in points[place : place + 3])
    x, y = line.points[-1]
    kind = " is" if line.relation.relation == IS_A else ""
    return (
        f'<path class="line{kind}" data-line="{number}" d="{path}"/>'
        f'<path class="head" data-line="{number}" d="M{x:.1f} {y:.1f}l{-HEAD} {-HEAD / 2}v{HEAD}z"/>'
    )


def curve(line: Line) -> list[tuple[float, float]]:
    """Return a relation's way as Bezier points: a start, then two handles and an end for each stretch."""
    (x, y), *rest = line.points
    points = [(x, y)]
    for number, (right, end) in enumerate(rest):
        # The last stretch ends at the foot of the arrow's head.
        stop = right - HEAD if number == len(rest) - 1 else right
        half = (stop - x) / 2
        points += [(x + half, y), (stop - half, end), (stop, end)]
        x, y = right, end
    return points


def _legend(hierarchy: ConceptHierarchy, colour: dict[str, int]) -> str:
    """Say what lines and colours mean, and how much there is."""
    parts = [f"<span>{len(hierarchy)} concepts</span>"]
    for relation in RELATIONS:
        if count := len(hierarchy.relations(relation)):
            kind = " is" if relation == IS_A else ""
            mark = (
                f'<svg width="34" height="10"><path class="line{kind}" d="M0 5H27"/>'
                '<path class="head" d="M34 5l-7 -3.5v7z"/></svg>'
            )
            first, then = SAYINGS[relation]
            parts.append(f"<span>{first} {mark}{then} ({relation}, {count})</span>")
    parts += [f'<span><i class="c{colour[name]}"></i>{escape(name)}</span>' for name in colour if name]
    return f'<p class="legend">{"".join(parts)}</p>'


def _cards(hierarchy: ConceptHierarchy, names: Sequence[str]) -> list[str]:
    """Return what is told about each concept, as plain text with line breaks."""
    levels = {relation: hierarchy.levels(relation) for relation in RELATIONS}
    used = [relation for relation in RELATIONS if hierarchy.relations(relation)]
    cards = []
    for name in names:
        concept = hierarchy.concept(name)
        facts = [f"domain: {concept.domain}"] if concept.domain else []
        facts += [f"level: {levels[relation][name]}" + (f" ({relation})" if len(used) > 1 else "") for relation in used]
        if concept.difficulty:
            facts.append(f"difficulty: {concept.difficulty:g}")
        facts += [f"{key}: {value}" for key, value in concept.facts.items()]
        lines = ["; ".join(facts)] if facts else []
        for relation in used:
            before = hierarchy.ancestors(name, relation)
            direct = hierarchy.parents(name, relation)
            if direct:
                more = f"; in all {len(before)}" if len(before) > len(direct) else ""
                lines.append(f"{relation}: {_listed(direct)}{more}")
            if after := hierarchy.descendants(name, relation):
                said = "is required by" if relation == REQUIRES else "kinds"
                lines.append(f"{said}: {_listed(after)}")
        cards.append("\n".join(lines) or "Nothing is related to it.")
    return cards


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def hierarchy_figure(hierarchy: ConceptHierarchy, dark: bool = False) -> "Figure":
    """Draw the hierarchy with matplotlib.

    Args:
        hierarchy: At most 300 concepts.
        dark: Light on dark.

    Raises:
        HierarchyError: It is empty or too large.
        MissingPackageError: matplotlib is not installed.
    """
    layout = layered_layout(hierarchy)
    require("matplotlib", "draw the hierarchy")
    import matplotlib.style
    from matplotlib.figure import Figure

    legend = 34.0
    with matplotlib.style.context(["dark_background", DARK] if dark else "default"):
        figure = Figure(figsize=(max(layout.width, 420.0) / PIXELS, (layout.height + legend) / PIXELS))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set(xlim=(0, max(layout.width, 420.0)), ylim=(layout.height, -legend))
        axis.set_axis_off()
        _draw(axis, layout, hierarchy, dark)
        _draw_legend(axis, hierarchy, dark, -legend / 2)
    return figure


def _draw(axis: "Axes", layout: Layout, hierarchy: ConceptHierarchy, dark: bool) -> None:
    """Draw lines, then boxes over them."""
    from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
    from matplotlib.path import Path as Curve

    grey = "#75808b" if dark else "#8a949e"
    for line in layout.lines:
        points = curve(line)
        codes = [Curve.MOVETO, *[Curve.CURVE4] * (len(points) - 1)]
        style: Any = (0, (4, 3)) if line.relation.relation == IS_A else "solid"
        axis.add_patch(PathPatch(Curve(points, codes), fill=False, ec=grey, lw=1.1, ls=style, zorder=1))
        x, y = line.points[-1]
        head = [(x, y), (x - HEAD, y - HEAD / 2), (x - HEAD, y + HEAD / 2)]
        axis.add_patch(Polygon(head, closed=True, fc=grey, ec="none", zorder=1))
    colour, palette = colour_numbers(hierarchy), DARK_COLOURS if dark else COLOURS
    for box in layout.boxes:
        fill = palette[colour[hierarchy.concept(box.name).domain]]
        axis.add_patch(
            FancyBboxPatch(
                (box.left, box.middle - HEIGHT / 2), box.width, HEIGHT, boxstyle="round,pad=0,rounding_size=6",
                fc=fill, ec="none", zorder=2,
            )
        )  # fmt: skip
        # A dollar would begin a formula.
        label = box.label.replace("$", r"\$")
        axis.text(box.left + box.width / 2, box.middle, label, ha="center", va="center", fontsize=8.5, zorder=3)


def _draw_legend(axis: "Axes", hierarchy: ConceptHierarchy, dark: bool, y: float) -> None:
    """Say what lines and colours mean."""
    from matplotlib.patches import Rectangle

    palette, x = DARK_COLOURS if dark else COLOURS, 12.0
    for relation in RELATIONS:
        if hierarchy.relations(relation):
            style: Any = (0, (4, 3)) if relation == IS_A else "solid"
            axis.plot([x, x + 30], [y, y], ls=style, lw=1.1, color="#75808b" if dark else "#8a949e")
            said = f"{SAYINGS[relation][0]} → {SAYINGS[relation][1]} ({relation})"
            axis.text(x + 36, y, said, va="center", fontsize=8)
            x += 60 + 6.0 * len(said)
    for name, number in colour_numbers(hierarchy).items():
        if name:
            axis.add_patch(Rectangle((x, y - 6), 12, 12, fc=palette[number], ec="none"))
            axis.text(x + 17, y, name.replace("$", r"\$"), va="center", fontsize=8)
            x += 40 + 6.0 * len(name)


def save_hierarchy_figure(hierarchy: ConceptHierarchy, path: str | Path, dark: bool = False) -> Path:
    """Write the drawing as a PNG and return its path.

    Raises:
        HierarchyError: It is empty or too large, the name does not end in .png, or the file cannot be written.
        MissingPackageError: matplotlib is not installed.
    """
    if Path(str(path)).suffix.lower() != ".png":
        raise HierarchyError(
            f"The picture is to be written to {path}.", "Expected a name that ends in .png.", "Name it so."
        )
    figure, picture = hierarchy_figure(hierarchy, dark), io.BytesIO()
    figure.savefig(picture, format="png", dpi=144, facecolor=figure.get_facecolor())
    with saving(path, "the picture", HierarchyError) as file:
        write_atomic(file, picture.getvalue())
    return file
