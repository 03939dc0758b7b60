"""Several runs of the same stream of tasks side by side: their matrices with one scale of colours, their numbers."""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.continual.accuracy_matrix import AccuracyMatrix, read_matrix
from utils.continual.matrix_panels import HEIGHT, WIDTHS, draw_matrix, score_scale, shortened, unit_name
from utils.continual.matrix_parts import MatrixError, mean
from utils.continual.matrix_view import headline, page_html, picture_html, table_html
from utils.growth.lineage_view import DARK
from utils.runtime.optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS, NAME_LENGTH = 2, 36
"""Matrices beside each other, and characters of a name above one."""
SCORES = {"forgetting": "forgetting", "learning_accuracy": "right after learning", "stability_gap": "worst drop"}
"""Numbers of the table behind the average, and what stands above them."""
COSTS = {"seconds": "seconds", "stored_samples": "samples kept", "stored_floats": "numbers kept"}


@dataclass(frozen=True, repr=False)
class MatrixComparison:
    """Accuracy matrices of one stream of tasks, by name; shows itself in a notebook."""

    matrices: Mapping[str, AccuracyMatrix]
    """What was measured, in the order in which it is shown."""

    def __post_init__(self) -> None:
        """Check that the matrices can be compared."""
        object.__setattr__(self, "matrices", dict(self.matrices))
        if not self.matrices:
            raise MatrixError("There is nothing to compare.", "Expected at least one matrix.", "Name a run.")
        (first, one), *others = self.matrices.items()
        for name, matrix in others:
            for what in ("tasks", "unit", "higher_is_better"):
                mine, its = getattr(one, what), getattr(matrix, what)
                if mine != its:
                    raise MatrixError(
                        f"The {what} of {first!r} and {name!r} differ: {mine!r} and {its!r}.",
                        "Expected runs of the same stream of tasks, measured in the same way.",
                        "Train both on the same data with the same split, tasks and seed.",
                    )

    @property
    def rows(self) -> list[dict[str, str]]:
        """A row of text for each run: its scores as they were at the end, and what the method took and kept."""
        found = []
        for name, matrix in self.matrices.items():
            summary = matrix.summary()
            average = matrix.average_accuracy if matrix.rows else mean(matrix.joint or ())
            row = {"": name, f"average {unit_name(matrix)}": matrix.said(average)}
            row |= {title: matrix.said(summary[key]) for key, title in SCORES.items()}
            row |= {title: _said(summary[key]) for key, title in COSTS.items()}
            found.append(row)
        # A column in which nobody has a number says nothing.
        empty = [title for title in found[0] if title and all(row[title] == "–" for row in found)]
        return [{title: text for title, text in row.items() if title not in empty} for row in found]

    def text(self) -> str:
        """Return the table as lines."""
        table = [list(self.rows[0]), *(list(row.values()) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for name, *numbers in table:
            right = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
        return "\n".join(lines)

    __str__ = text

    __repr__ = text

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold: each matrix by its name, see `AccuracyMatrix.to_dict`."""
        return {name: matrix.to_dict() for name, matrix in self.matrices.items()}

    def _repr_html_(self) -> str:
        """Show the matrices and the table."""
        alt = f"how good {', '.join(self.matrices)} are at every task after each task"
        return page_html(picture_html(partial(comparison_picture, self), alt) + table_html(self.rows))


def compare_matrices(runs: Mapping[str, Any]) -> MatrixComparison:
    """Put the accuracy matrices of several runs side by side.

    Args:
        runs: A run, its directory or an `AccuracyMatrix` by the name that stands above it.

    Raises:
        MatrixError: A run has no matrix, or learned another stream.
    """
    return MatrixComparison({name: _matrix_of(run) for name, run in runs.items()})


def _matrix_of(run: Any) -> AccuracyMatrix:
    return run if isinstance(run, AccuracyMatrix) else read_matrix(Path(getattr(run, "directory", run)))


def _said(value: float | None) -> str:
    """Return what something cost: whole from ten, a dash if nobody knows."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def comparison_figure(comparison: MatrixComparison, dark: bool = False) -> "Figure":
    """Draw the matrices two in a row, with the same colours for the same scores.

    Args:
        comparison: What to draw.
        dark: Light on dark.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("matplotlib", "draw accuracy matrices")
    import matplotlib.style
    from matplotlib.figure import Figure

    matrices = comparison.matrices
    across, scale = min(COLUMNS, len(matrices)), score_scale(*matrices.values())
    down = -(-len(matrices) // across)
    with matplotlib.style.context(["dark_background", DARK] if dark else "default"):
        figure = Figure(figsize=(across * WIDTHS["matrix"], down * HEIGHT), layout="constrained")
        panels: Any = figure.subfigures(down, across, squeeze=False)
        for (name, matrix), panel in zip(matrices.items(), panels.flat, strict=False):
            axis = panel.subplots()
            axis.set_facecolor("none")
            draw_matrix(axis, matrix, dark, scale)
            said = headline(matrix).rpartition(": ")[2]
            title = f"{shortened(name, NAME_LENGTH)}\n{said[:1].upper()}{said[1:]}"
            panel.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    return figure


def comparison_picture(comparison: MatrixComparison, dark: bool = False) -> bytes:
    """Return `comparison_figure` as PNG.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    picture, figure = io.BytesIO(), comparison_figure(comparison, dark)
    figure.savefig(picture, format="png", dpi=120, facecolor=figure.get_facecolor())
    return picture.getvalue()
