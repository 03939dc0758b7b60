"""The two panels of an accuracy matrix's picture: its cells, and the course of every task's score over the stream."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from utils.continual.accuracy_matrix import AccuracyMatrix
from utils.continual.matrix_parts import mean
from utils.growth.lineage_view import DARK, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a63b8")
"""Of the tasks' curves, told apart by colour-blind eyes (Okabe and Ito 2008); more tasks take shades in their order."""
SHADES = "viridis"
"""Palette of scores, dark for bad: its brightness alone tells the order."""
UNSEEN, LOST = ("#e4e7ea", "#2b3138"), ("#b03a06", "#f08f57")
"""Cells of tasks that were not trained yet, and what was forgotten, on light and on dark."""
PAGE = ("#ffffff", DARK["figure.facecolor"])
INK, FAINT = ("#14181c", "#e6e9ec"), ("#6d7780", "#8b96a1")
"""Text, and text that matters less, on light and on dark."""
WIDTHS, HEIGHT = {"matrix": 6.0, "course": 7.2}, 5.4
"""Inches of the panels."""
SIDE, STRETCH = 4.4, 5.6
"""Inches that the cells have, and that the course has, about."""
LABELS, CURVES, LABEL_LENGTH, CHARACTER = 20, 12, 18, 0.085
"""How many names fit along a side and beside curves, their characters, and inches of one."""
SMALLEST_CELL = 0.27
"""Inches of a cell in which a number can still be read."""
NOTE = "framed: just learned; grey: not trained yet\ndown a column: what becomes of a task as others follow"


def unit_name(matrix: AccuracyMatrix) -> str:
    """Return what the scores are, for an axis."""
    return {"accuracy": "accuracy, %", "nats": "loss, nats per token"}.get(matrix.unit, matrix.unit)


def shortened(name: str, length: int = LABEL_LENGTH) -> str:
    """Return a name without its middle where it is too long: ends, such as numbers, tell names apart."""
    tail = max(1, length // 4)
    return name if len(name) <= length else f"{name[: length - 1 - tail]}…{name[-tail:]}"


def borders(matrix: AccuracyMatrix) -> list[float]:
    """Return where each finished task ended: optimizer steps, or 1, 2, ... where those are not known."""
    return [float(end) for end in matrix.ends or range(1, matrix.trained + 1)]


def course_of(matrix: AccuracyMatrix, task: int) -> list[tuple[float, float]]:
    """Return everything that was measured on a task as (place, score), in the order of the stream.

    Args:
        matrix: What was measured.
        task: Number of the task, from 0.
    """
    points = [] if matrix.untrained is None else [(0.0, matrix.untrained[task])]
    points += list(zip(borders(matrix), (row[task] for row in matrix.rows), strict=True))
    for place, moment in zip(_places(matrix), matrix.within, strict=True):
        if task < len(moment.scores):
            points.append((place, moment.scores[task]))
    return sorted((point for point in points if math.isfinite(point[1])), key=lambda point: point[0])


def _places(matrix: AccuracyMatrix) -> list[float]:
    """Return where each measurement within a task stands; evenly spread where the ends of tasks are not known."""
    if matrix.ends or not matrix.rows:
        return [float(moment.step) for moment in matrix.within]
    tasks = [moment.task for moment in matrix.within]
    return [task + (i - tasks.index(task) + 1) / (tasks.count(task) + 1) for i, task in enumerate(tasks)]


def seen_average(matrix: AccuracyMatrix) -> list[float]:
    """Return after each task the mean score on the tasks trained so far."""
    return [mean(row[: i + 1]) for i, row in enumerate(matrix.rows)]


def draw_matrix(axis: "Axes", matrix: AccuracyMatrix, dark: bool, scale: Any = None) -> None:
    """Draw a cell for each task (columns) after training on each task (rows), the averages, and what was forgotten.

    Args:
        axis: Where.
        matrix: What was measured.
        dark: Light on dark.
        scale: How bright scores are; None for the matrix's own `score_scale`.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    count, scale = len(matrix.tasks), score_scale(matrix) if scale is None else scale
    shades = colormaps[SHADES if matrix.higher_is_better else f"{SHADES}_r"]
    cell = SIDE / (count + 1.5)
    numbered = cell >= SMALLEST_CELL
    size, places = min(10.5, 72 * cell / 3.6), 1 if cell > 0.4 or matrix.unit != "accuracy" else 0
    ink, faint, unseen = INK[dark], FAINT[dark], UNSEEN[dark]
    first = [matrix.untrained] if matrix.untrained is not None and numbered else []
    lines = [*first, *matrix.rows]
    fills: list[list[Any]] = []
    for row, scores in enumerate(lines, -len(first)):
        fills.append([to_rgba(unseen)] * count)
        for column, score in enumerate(scores):
            if math.isnan(score):
                continue
            seen = column <= row
            if seen:
                fills[-1][column] = colour = shades(scale(score))
                bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 0.5
            if numbered:
                axis.text(
                    column + 0.5, row + 0.5, matrix.said(score, places), ha="center", va="center",
                    color=(INK[0] if bright else "white") if seen else faint, fontsize=size if seen else 0.88 * size,
                    fontweight="bold" if column == row else None,
                )  # fmt: skip
        if row >= 0:
            axis.add_patch(Rectangle((row, row), 1, 1, fc="none", ec=ink, lw=2 if numbered else 0.8, zorder=3))
    if lines:
        # One mesh: thousands of single cells would take seconds.
        edge: dict[str, Any] = {"edgecolors": PAGE[dark], "lw": 1} if numbered else {}
        axis.pcolormesh(range(count + 1), range(-len(first), matrix.trained + 1), fills, zorder=0.5, **edge)
    for row in range(matrix.trained, count):
        axis.add_patch(Rectangle((0, row), count, 1, fc="none", ec=faint, lw=0.7, ls=":", alpha=0.6))
    # Room for the averages and for what was forgotten, in cells.
    room = max(0.4, min(1.1, 0.7 / cell)) if numbered else 0.05
    axis.set(xlim=(-0.05, count + room), ylim=(count + room, -len(first) - 0.05))
    if numbered:
        _write_margins(axis, matrix, size, places, room, dark)
    else:
        _add_bar(axis, matrix, scale, shades)
    _name_cells(axis, matrix, cell, bool(first))
    axis.text(0, -0.02, NOTE, transform=axis.transAxes, fontsize=8.5, color=faint, va="top")


def score_scale(*matrices: AccuracyMatrix) -> Any:
    """Return how bright the scores of matrices of one unit are, as matplotlib's ``Normalize``.

    Shares have the whole scale. Others reach from the best score to the worst, which is at least that of a task which
    was not trained yet: dark means that nothing of a task is left.
    """
    from matplotlib.colors import Normalize

    if matrices[0].unit == "accuracy":
        return Normalize(0, 1)
    rows = [(i, row) for matrix in matrices for i, row in enumerate(matrix.rows)]
    seen = [score for i, row in rows for score in row[: i + 1] if math.isfinite(score)]
    unseen = [score for i, row in rows for score in row[i + 1 :] if math.isfinite(score)]
    ends = [*seen, mean(unseen)] if seen and unseen else seen
    return Normalize(min(ends), max(ends)) if ends else Normalize(0, 1)


def _name_cells(axis: "Axes", matrix: AccuracyMatrix, cell: float, untrained: bool) -> None:
    """Write the tasks' names along both sides, as many as fit."""
    every = -(-len(matrix.tasks) // LABELS)
    names = [(j + 0.5, shortened(name)) for j, name in list(enumerate(matrix.tasks))[::every]]
    turned = max(len(name) for _, name in names) * CHARACTER > cell * every
    axis.set_xticks(
        [at for at, _ in names], [name for _, name in names], fontsize=9, rotation_mode="anchor",
        rotation=40 if turned else 0, ha="left" if turned else "center",
    )  # fmt: skip
    lines = [*([(-0.5, "untrained")] if untrained else []), *names]
    axis.set_yticks([at for at, _ in lines], [name for _, name in lines], fontsize=9)
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel(f"{unit_name(matrix)}, on held-out data of", fontsize=10, labelpad=8)
    axis.set_ylabel("after training on", fontsize=10)


def _write_margins(axis: "Axes", matrix: AccuracyMatrix, size: float, places: int, room: float, dark: bool) -> None:
    """Write the average of the tasks seen at the end of each row, and what was forgotten of each task at the bottom."""
    count, ink = len(matrix.tasks), INK[dark]
    for row, average in enumerate(seen_average(matrix)):
        said = matrix.said(average, places)
        axis.text(count + 0.55 * room, row + 0.5, said, ha="center", va="center", fontsize=size, color=ink)
    if matrix.rows:
        axis.text(count + 0.55 * room, -0.1, "mean", ha="center", va="bottom", fontsize=min(size, 9), color=ink)
    for column, lost in enumerate(matrix.forgotten):
        if not math.isnan(lost):
            said = matrix.said(abs(lost), places)
            sign = "−" if (lost > 0) == matrix.higher_is_better else "+"
            axis.text(
                column + 0.5, count + 0.5 * room, sign * (float(said) != 0) + said, ha="center", va="center",
                fontsize=size, color=LOST[dark] if lost > 0 else ink,
            )  # fmt: skip
    if matrix.trained > 1:
        axis.text(-0.06 * room, count + 0.5 * room, "forgotten", ha="right", va="center", fontsize=9, color=LOST[dark])


def _add_bar(axis: "Axes", matrix: AccuracyMatrix, scale: Any, shades: Any) -> None:
    """Draw which colour is which score, in place of numbers."""
    from matplotlib.cm import ScalarMappable

    bar = axis.figure.colorbar(ScalarMappable(scale, shades), ax=axis, shrink=0.7, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(unit_name(matrix), fontsize=9)
    if matrix.unit == "accuracy":
        bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])


def draw_course(axis: "Axes", matrix: AccuracyMatrix, dark: bool) -> None:
    """Draw how good the model was at every task, all along the stream, with a line where one task ends."""
    from matplotlib import colormaps

    count, many = len(matrix.tasks), len(matrix.tasks) > len(COLOURS)
    shades = [colormaps[SHADES](0.2 * dark + (0.92 - 0.2 * dark) * j / max(count - 1, 1)) for j in range(count)]
    colours: list[Any] = shades if many else list(COLOURS)
    ends, factor = borders(matrix), 100 if matrix.unit == "accuracy" else 1
    courses = [[(x, factor * y) for x, y in course_of(matrix, j)] for j in range(count)]
    last = max([1.0, *ends, *(x for points in courses for x, _ in points)])
    labels = []
    for j, (name, points) in enumerate(zip(matrix.tasks, courses, strict=True)):
        begin = 0.0 if j == 0 else ends[j - 1] if j <= len(ends) else math.inf
        early, late = [p for p in points if p[0] <= begin], [p for p in points if p[0] >= begin]
        axis.plot(*_columns(early), ":", color=colours[j], lw=1, alpha=0.3 if many else 0.55, zorder=2)
        axis.plot(*_columns(late), color=colours[j], lw=1.1 if many else 1.9, alpha=0.85 if many else 1, zorder=3)
        if not many:
            axis.plot(*_columns([p for p in late if p[0] in ends[j:]]), "o", color=colours[j], ms=4.5, zorder=4)
        if late and j < max(matrix.trained, 1):
            labels.append((late[-1][1], shortened(name), colours[j]))
    averages = [factor * value for value in seen_average(matrix)]
    for end in ends if count <= LABELS else []:
        axis.axvline(end, color=FAINT[dark], lw=0.8, alpha=0.6, zorder=1)
    style = "--" if many else "s--"
    axis.plot(ends, averages, style, color=INK[dark], lw=1.8, ms=4, zorder=5, label="mean of the tasks trained so far")
    axis.set_xlim(0, last)
    if factor == 100:
        axis.set_ylim(-2, 103)
    axis.set_ylabel(unit_name(matrix) + ("" if matrix.higher_is_better else " (lower is better)"))
    axis.set_xlabel("step" if matrix.ends else "tasks trained")
    if not matrix.ends:
        axis.set_xticks(range(0, int(last) + 1, max(1, -(-int(last) // 10))))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.22)
    _name_stretches(axis, matrix, ends, last, colours, INK[dark])
    if count <= CURVES:
        _label_ends(axis, sorted(labels, key=lambda label: label[0]))
    if ends:
        axis.legend(loc="upper right", bbox_to_anchor=(1, -0.09), frameon=False, fontsize=9)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _name_stretches(
    axis: "Axes", matrix: AccuracyMatrix, ends: list[float], last: float, colours: list[Any], ink: str
) -> None:
    """Mark above the course which task was trained when, with as many names as fit."""
    across, free = axis.get_xaxis_transform(), 0.0
    for j, (begin, end) in enumerate(zip([0.0, *ends], [*ends, last], strict=True)):
        if j >= len(matrix.tasks) or end <= begin:
            continue
        axis.axvspan(begin, end, ymin=1.0, ymax=1.025, color=colours[j], clip_on=False, lw=0)
        # A name may be as wide as its stretch; short names of short stretches stand apart from each other.
        name = shortened(matrix.tasks[j], max(9, int(STRETCH * (end - begin) / last / CHARACTER)))
        wide = last * len(name) * CHARACTER / STRETCH
        middle = (begin + end) / 2
        if middle - wide / 2 >= free:
            axis.text(middle, 1.035, name, ha="center", va="bottom", fontsize=9, color=colours[j], transform=across)
            free = middle + wide / 2
    axis.text(-0.015, 1.012, "training", ha="right", va="center", fontsize=9, color=ink, transform=axis.transAxes)


def _label_ends(axis: "Axes", labels: list[tuple[float, str, Any]]) -> None:
    """Write the tasks' names beside the ends of their curves, moved apart."""
    low, high = axis.get_ylim()
    places = spread([value for value, _, _ in labels], 0.044 * (high - low), low, high)
    across = axis.get_yaxis_transform()
    for (value, name, colour), place in zip(labels, places, strict=True):
        axis.annotate(
            name, (1, value), (1.04, place), xycoords=across, textcoords=across, fontsize=9, color=colour, va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)},
        )  # fmt: skip
