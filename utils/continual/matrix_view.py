"""The accuracy matrix of a stream of tasks as a picture, as a page's table and as text.

On the left what was measured after each task, on the right how every task fared meanwhile.
"""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.continual.accuracy_matrix import MATRIX_PICTURE, NUMBERS, AccuracyMatrix, read_matrix
from utils.continual.matrix_panels import HEIGHT, WIDTHS, draw_course, draw_matrix, shortened, unit_name
from utils.continual.matrix_parts import mean
from utils.growth.lineage_view import DARK
from utils.runtime.errors import MissingPackageError
from utils.runtime.files import write_atomic
from utils.runtime.optional import require
from utils.training.run_report import COLOUR_STYLE, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {"matrix": draw_matrix, "course": draw_course}
WIDEST_TEXT, NAME_LENGTH = 12, 12
"""Tasks up to which the text shows the whole matrix, and characters of a name in it."""
MEANINGS = {
    "average_accuracy": "on the tasks learned, now",
    "forgetting": "lost since its best, per task",
    "learning_accuracy": "right after learning a task",
    "backward_transfer": "what later tasks did for earlier ones",
    "forward_transfer": "what earlier tasks did for later ones",
    "stability_gap": "worst drop while a new task was learned",
    "worst_case_accuracy": "the new task now, old ones at their worst",
}
"""Tiles of the page."""


def matrix_figure(matrix: AccuracyMatrix, parts: Sequence[str] = ("matrix", "course"), dark: bool = False) -> "Figure":
    """Draw the matrix, the course of every task's score over the stream, or both side by side.

    Args:
        matrix: What was measured.
        parts: ``matrix``, ``course`` or both.
        dark: Light on dark.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: `parts` names something else.
    """
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"There are the parts {' and '.join(map(repr, PARTS))}, not {parts!r}.")
    require("matplotlib", "draw the accuracy matrix")
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["dark_background", DARK] if dark else "default"):
        widths = [WIDTHS[part] for part in parts]
        figure = Figure(figsize=(sum(widths), HEIGHT), layout="constrained")
        # Parts of their own, so that long names of one do not take room from the other.
        panels: Any = figure.subfigures(1, len(parts), width_ratios=widths, squeeze=False)
        for part, panel in zip(parts, panels[0], strict=True):
            axis = panel.subplots()
            axis.set_facecolor("none")
            PARTS[part](axis, matrix, dark)
        title = headline(matrix) if len(parts) > 1 else headline(matrix).replace(", ", ",\n")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    return figure


def headline(matrix: AccuracyMatrix) -> str:
    """Return how the stream went, in a line."""
    after = f"After {matrix.trained} of {len(matrix.tasks)} tasks"
    if not matrix.rows and matrix.joint is None:
        return f"{after}: nothing was measured yet"
    name, unit, points = {
        "accuracy": ("accuracy", " %", " points"), "nats": ("loss", " nats per token", " nats"),
    }.get(matrix.unit, (matrix.unit, "", ""))  # fmt: skip
    if not matrix.rows:
        joint = matrix.said(mean(matrix.joint or ()))
        return f"Trained on all {len(matrix.tasks)} tasks at once: average {name} {joint}{unit}"
    said = f"{after}: average {name} {matrix.said(matrix.average_accuracy)}{unit}"
    if math.isnan(matrix.forgetting):
        return said
    return f"{said}, forgetting {matrix.said(matrix.forgetting)}{points}"


def matrix_picture(
    matrix: AccuracyMatrix, kind: str = "png", parts: Sequence[str] = ("matrix", "course"), dark: bool = False
) -> bytes:
    """Return `matrix_figure` as a file: ``png`` or ``svg``.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: `kind` or `parts` is something else.
    """
    if kind not in ("png", "svg"):
        raise ValueError(f"There are pictures of the kinds 'png' and 'svg', not {kind!r}.")
    picture, figure = io.BytesIO(), matrix_figure(matrix, parts, dark)
    figure.savefig(picture, format=kind, dpi=120, facecolor=figure.get_facecolor())
    return picture.getvalue()


def save_matrix_figure(directory: str | Path, matrix: AccuracyMatrix | None = None) -> Path:
    """Draw `matrix_figure` into ``accuracy_matrix.png`` of a run's directory, and return its path.

    Args:
        directory: The run.
        matrix: What to draw; None for the one in the directory.

    Raises:
        MatrixError: There is no matrix, or its file is damaged.
        MissingPackageError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    path = Path(directory) / MATRIX_PICTURE
    write_atomic(path, matrix_picture(read_matrix(directory) if matrix is None else matrix))
    return path


def task_rows(matrix: AccuracyMatrix) -> list[dict[str, str]]:
    """Return a row of text for each trained task: learned, best, now, forgotten, and the worst drop meanwhile."""
    rows, drops = [], matrix.drops
    for j in range(matrix.trained):
        row = {"task": matrix.tasks[j], "learned": matrix.said(matrix.rows[j][j])}
        row["best"] = matrix.said(matrix.best(scores[j] for scores in matrix.rows))
        row["now"] = matrix.said(matrix.rows[-1][j])
        row["forgotten"] = matrix.said(matrix.forgotten[j] if j < matrix.trained - 1 else math.nan)
        if drops:
            row["worst drop"] = matrix.said(max((drop.size for drop in drops if drop.old == j), default=math.nan))
        rows.append(row)
    return rows


def matrix_html(matrix: AccuracyMatrix) -> str:
    """Return picture, numbers and a table of the tasks; the picture is light or dark as the page is."""
    drawn = picture_html(partial(matrix_picture, matrix), "how good the model is at every task after each task")
    unit = " %" if matrix.unit == "accuracy" else ""
    tiles = "".join(
        f'<div class="tile"><b>{matrix.said(getattr(matrix, name))}{unit}</b><span>{name.replace("_", " ")}: '
        f"{meaning}</span></div>"
        for name, meaning in MEANINGS.items()
        if not math.isnan(getattr(matrix, name))
    )
    return page_html(f'{drawn}<div class="tiles">{tiles}</div>{table_html(task_rows(matrix))}')


def page_html(shown: str) -> str:
    """Return a part of a page in the style of the reports."""
    return f'<style>{STYLE}{COLOUR_STYLE}</style><div class="seedbed-run">{shown}</div>'


def picture_html(draw: Callable[..., bytes], alt: str) -> str:
    """Return a picture that is light or dark as the page is, or a sentence where it cannot be drawn.

    Args:
        draw: Returns the picture as PNG; is given ``dark``.
        alt: What the picture shows.
    """
    try:
        light, dark = (base64.b64encode(draw(dark=dark)).decode("ascii") for dark in (False, True))
    except MissingPackageError as error:
        return f"<p>{escape(str(error))}</p>"
    return (
        '<picture><source media="(prefers-color-scheme:dark)" '
        f'srcset="data:image/png;base64,{dark}"><img alt="{escape(alt)}" '
        f'style="width:100%" src="data:image/png;base64,{light}"></picture>'
    )


def table_html(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows of text as a table, the first column being names and the others numbers; empty without rows."""
    if not rows:
        return ""
    kinds = ["", *[' class="number"'] * (len(rows[0]) - 1)]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(rows[0], kinds, strict=True))
    cells = (zip(row.values(), kinds, strict=True) for row in rows)
    body = "".join(f"<tr>{''.join(f'<td{kind}>{escape(text)}</td>' for text, kind in row)}</tr>" for row in cells)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def matrix_text(matrix: AccuracyMatrix) -> str:
    """Return the matrix and what follows from it; above a dozen tasks a line for each task instead."""
    unit = "accuracy in percent" if matrix.unit == "accuracy" else unit_name(matrix)
    if len(matrix.tasks) <= WIDEST_TEXT:
        lines = [f"{unit}, on each task (columns) after training on each task (rows)"]
        table = [["", *matrix.tasks]]
        table += [["untrained", *map(matrix.said, matrix.untrained)]] if matrix.untrained else []
        table += [[name, *map(matrix.said, row)] for name, row in zip(matrix.tasks, matrix.rows, strict=False)]
        table += [["all at once", *map(matrix.said, matrix.joint)]] if matrix.joint else []
    else:
        lines, rows = [f"{unit}, on each task"], task_rows(matrix)
        table = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
    cells = [[shortened(cell, NAME_LENGTH) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    known = [name for name in NUMBERS if not math.isnan(getattr(matrix, name))]
    word = "accuracy" if matrix.higher_is_better else "loss"
    numbers = [
        f"{name.replace('_', ' ').replace('accuracy', word)} {matrix.said(getattr(matrix, name), 2)}" for name in known
    ]
    return "\n".join([*lines, "", f"{matrix.trained} of {len(matrix.tasks)} tasks trained", *numbers])
