"""The lineage of a run as a picture and a table: what there was when, how large, and what growth did to the loss."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.growth.edits import LineageError
from utils.growth.lineage import GrowthEvent, read_lineage
from utils.growth.lineage_course import Bar, Row, course
from utils.runtime.errors import MissingPackageError, RunError
from utils.runtime.files import write_atomic
from utils.runtime.optional import require
from utils.training.figures import draw_losses
from utils.training.growth_rows import events_before, growth_table, said_difference, said_growth, said_jump, table_rows
from utils.training.metrics import read_metrics
from utils.training.run import GROWTH_PICTURE, METRICS, read_record
from utils.training.run_report import COLOUR_STYLE, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "depth": "#4878b0", "feed_forward": "#d1662c", "heads": "#3a8f5c", "residual": "#8a63b8", "vocabulary": "#a8862c",
    "classes": "#b8527a", "expert": "#3e8f95", "channels": "#9a6a4a",
}  # fmt: skip
"""Colour by operator."""
DARK = {"figure.facecolor": "#16191d", "axes.facecolor": "#16191d"}
"""Settings of a dark picture, as matplotlib names them; the colour of the reports' dark pages."""
OTHER_COLOUR, OLD_COLOUR = "#7a8088", "#a9b3bc"
"""Of an operator that is not in `COLOURS`, and of what was there at the beginning."""
WIDTH = 11.0
"""Inches."""
ROW_HEIGHT, LINE_HEIGHT, CHARACTER = 0.2, 0.2, 0.068
"""Inches of a row of the architecture, a line of the key, and a character of the labels."""
LABEL_LENGTH, MOST_SAID = 24, 28
"""Characters of a row's name, and of what grew in the key."""


NEVER = "The model of this run never grew."


@dataclass(frozen=True, repr=False)
class LineageView:
    """A lineage that shows itself in a notebook."""

    directory: Path
    """The run."""
    events: tuple[GrowthEvent, ...] = field(repr=False)
    """Its lineage."""
    older: int = 0
    """How many of the events came before the run's first step."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The events as plain values, see `lineage_table`."""
        return lineage_table(self.events, self.older)

    def figure(self, dark: bool = False) -> "Figure":
        """Return `lineage_figure`."""
        return lineage_figure(self.directory, dark)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"directory": str(self.directory), "rows": self.rows}

    def __str__(self) -> str:
        """Return a line per event."""
        return "\n".join(event.describe() for event in self.events) or NEVER

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show picture and table; the picture is light or dark as the page is."""
        if not self.events:
            return f"<p>{NEVER}</p>"
        try:
            light, dark = (base64.b64encode(_png(self.figure(dark))).decode("ascii") for dark in (False, True))
        except MissingPackageError as error:
            drawn = f"<p>{escape(str(error))}</p>"
        else:
            drawn = (
                '<picture><source media="(prefers-color-scheme:dark)" '
                f'srcset="data:image/png;base64,{dark}"><img alt="how the model grew" style="width:100%" '
                f'src="data:image/png;base64,{light}"></picture>'
            )
        return f'<style>{STYLE}{COLOUR_STYLE}</style><div class="seedbed-run">{drawn}{growth_table(self.rows)}</div>'


def lineage_table(events: Iterable[GrowthEvent], older: int = 0) -> list[dict[str, Any]]:
    """Return the events as rows of plain values, see `utils.training.growth_rows.table_rows`.

    Args:
        events: A lineage.
        older: How many of them came before the first step of the run.
    """
    return table_rows([event.to_dict() for event in events], older)


def show_lineage(run: Any) -> LineageView:
    """Return the lineage of a run, for a notebook to show; one that never grew says so.

    Args:
        run: A `Run`, or its directory.

    Raises:
        LineageError: There is no run, or its lineage is damaged.
    """
    directory = Path(getattr(run, "directory", run))
    events = read_lineage(directory)
    try:
        parameters = read_record(directory)["model"].get("parameters")
    except RunError as error:
        if not events:
            raise LineageError(
                f"{directory} holds no growth events. {error.found}",
                "Expected the directory of a run whose model grew.",
                "Train with growth={...} in the settings, or look at another run.",
            ) from None
        parameters = None
    older = events_before([event.to_dict() for event in events], parameters)
    return LineageView(directory, tuple(events), older)


def save_lineage_figure(run: Any) -> Path:
    """Draw `lineage_figure` into ``growth.png`` in the run's directory, and return its path.

    Raises:
        LineageError: The run never grew, or its lineage is damaged.
        MissingPackageError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    path = Path(getattr(run, "directory", run)) / GROWTH_PICTURE
    write_atomic(path, _png(lineage_figure(run)))
    return path


def lineage_figure(run: Any, dark: bool = False) -> "Figure":
    """Draw the architecture, the number of parameters and the losses over the steps, and a key to the events.

    Args:
        run: A `Run`, or its directory.
        dark: Light on dark.

    Raises:
        LineageError: The run never grew, or its lineage is damaged.
        MissingPackageError: matplotlib is not installed.
    """
    require("matplotlib", "draw the lineage")
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    view = show_lineage(run)
    if not view.events:
        raise LineageError(
            f"{view.directory} holds no growth events.",
            "Expected the directory of a run whose model grew.",
            "Train with growth={...} in the settings, or look at another run.",
        )
    try:
        measured = read_metrics(view.directory / METRICS)
    except (OSError, ValueError, KeyError):
        measured = []
    end = float(max([1, *(row["step"] for row in measured), *(e.step for e in view.events[view.older :])]))
    rows, table = course(view.events, view.older, end), view.rows
    columns = 1 if len(table) <= 8 else 2
    lines = -(-len(table) // columns)
    heights = [max(4, len(rows) + 1) * ROW_HEIGHT + 0.35, 1.1, 2.4]
    key_height = (lines + 2.4) * LINE_HEIGHT
    with matplotlib.style.context(["dark_background", DARK] if dark else "default"):
        figure = Figure(figsize=(WIDTH, sum(heights) + 1.1 + key_height), layout=ConstrainedLayoutEngine(w_pad=0.1))
        made: Any = figure.subfigures(2, 1, height_ratios=[sum(heights) + 1.1, key_height])
        panels, below = made
        for part in (panels, below):
            part.set_facecolor("none")
        parts, sizes, losses = panels.subplots(3, 1, height_ratios=heights)
        for axis in (parts, sizes, losses):
            axis.set_xlim(0, end * 1.01)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_facecolor("none")
            for row, event in zip(table, view.events, strict=True):
                if row["step"]:
                    axis.axvline(event.step, color=_colour(row["operator"]), ls=(0, (4, 3)), lw=1, alpha=0.8, zorder=1)
        _draw_parts(parts, rows, view, end, heights[0])
        _draw_sizes(sizes, view, end)
        draw_losses(
            losses,
            [row for row in measured if row["split"] == "train"],
            [row for row in measured if row["split"] == "validation"],
        )
        for line in losses.lines:
            if dark and line.get_label() == "training":
                line.set_alpha(0.45)
        losses.set(title="", ylabel="loss, nats", xlabel="step")
        if not measured:
            losses.text(0.5, 0.5, "nothing was measured yet", transform=losses.transAxes, ha="center", va="center")
        _draw_key(below.add_axes((0, 0, 1, 1)), table, columns, lines)
        parts.set_title(_title(view), loc="left", fontsize=11, pad=26)
        panels.align_ylabels([sizes, losses])
    return figure


def _title(view: LineageView) -> str:
    """Say how far the model grew in the run."""
    during, last = view.events[view.older :], view.events[-1].parameters_after
    begun = during[0].parameters_before if during else last
    return f"{begun:,} → {last:,} parameters in {len(during)} growth event{'s' * (len(during) != 1)}"


def _colour(operator: str) -> str:
    return COLOURS.get(operator, OTHER_COLOUR)


def _tint(colour: str, share: float) -> str:
    """Mix a colour with white; bars look alike on every background."""
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(share * part + (1 - share) * 255):02x}" for part in parts)


def _draw_parts(axis: "Axes", rows: Sequence[Row], view: LineageView, end: float, height: float) -> None:
    """Draw a bar for each stretch of each part, block 0 lowest and what became wider beneath; number the events."""
    blocks = [row for row in rows if row.operator == "depth"]
    wider = [row for row in rows if row.operator != "depth"]
    gap = 0.5 if blocks and wider else 0.0
    heights = [*(float(number) for number in range(len(blocks))), *(-1 - gap - number for number in range(len(wider)))]
    across = WIDTH - 3.2
    for row, place in zip([*blocks, *wider], heights, strict=True):
        for order, bar in enumerate(row.bars):
            old = bar.event is None and row.operator == "depth"
            share = 1.0 if row.operator == "depth" else 0.4 + 0.6 * (order + 1) / len(row.bars)
            colour = OLD_COLOUR if old else _tint(_colour(row.operator), share)
            axis.barh(place, bar.end - bar.begin, left=bar.begin, height=0.74, zorder=2, lw=0, color=colour)
            said = _said_bar(bar, view.events)
            if len(said) * CHARACTER + 0.12 < across * (bar.end - bar.begin) / end:
                axis.annotate(
                    said, (bar.begin, place), (4, 0), textcoords="offset points", va="center", fontsize=7.5,
                    color="#14181c" if old or share < 0.85 else "white", zorder=3,
                )  # fmt: skip
    axis.set_yticks(heights, [_label(row) for row in (*blocks, *wider)], fontsize=8)
    axis.set_ylim(-len(wider) - gap - 0.6, max(len(blocks), 1) - 0.4)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelbottom=False)
    axis.spines["left"].set_visible(False)
    marked = [(number, event) for number, event in enumerate(view.events, 1) if number > view.older]
    at = spread([float(event.step) for _, event in marked], 0.24 / across * end, 0.0, end)
    for (number, event), place in zip(marked, at, strict=True):
        colour = _colour(event.plan.operator)
        axis.annotate(
            str(number), (event.step, 1), (place, 1 + 0.22 / height), xycoords=axis.get_xaxis_transform(),
            textcoords=axis.get_xaxis_transform(), ha="center", va="center", fontsize=7.5, color="white",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 0, "shrinkB": 0},
            bbox={"boxstyle": "round,pad=0.25", "fc": colour, "ec": "none"},
        )  # fmt: skip


def _said_bar(bar: Bar, events: Sequence[GrowthEvent]) -> str:
    """Return what is written into a bar: how wide the part is, or how its block began."""
    if bar.size is not None:
        return f"{bar.size:,}"
    return "from the beginning" if bar.event is None else f"{bar.event}: {events[bar.event - 1].plan.promise}"


def _label(row: Row) -> str:
    """Name a row; a long name keeps its end, which tells parts apart."""
    name = row.label if len(row.label) <= LABEL_LENGTH else f"…{row.label[1 - LABEL_LENGTH :]}"
    return name if row.operator == "depth" else f"{row.operator.replace('_', ' ')}: {name}"


def _draw_sizes(axis: "Axes", view: LineageView, end: float) -> None:
    """Draw the number of parameters as a step curve."""
    from matplotlib.ticker import EngFormatter

    during = view.events[view.older :]
    first = view.events[0].parameters_before if not view.older else view.events[view.older - 1].parameters_after
    steps = [0.0, *(float(event.step) for event in during), end]
    counts = [first, *(event.parameters_after for event in during), view.events[-1].parameters_after]
    axis.step(steps, counts, where="post", lw=2, color="#5b7f92", zorder=3)
    axis.fill_between(steps, counts, step="post", alpha=0.18, color="#5b7f92", lw=0)
    axis.set_ylim(0, max(counts) * 1.12)
    axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    axis.locator_params(axis="y", nbins=4)
    axis.set_ylabel("parameters")
    axis.tick_params(axis="x", labelbottom=False)
    axis.grid(axis="y", alpha=0.25)


def _draw_key(axis: "Axes", table: Sequence[Mapping[str, Any]], columns: int, lines: int) -> None:
    """Write a line for each event: what grew, how large the model became, what the certificate says."""
    axis.set_axis_off()
    axis.set(xlim=(0, WIDTH), ylim=(lines + 0.2, -2.2))
    note = "Change of the answers, as a share of their size, and of the loss, in nats, at the moment of each event:"
    axis.text(0.15, -1.7, note, fontsize=8, alpha=0.7, va="center")
    stops = (0.22, 0.45, 1.15, 3.1, 4.0, 4.75) if columns == 2 else (0.22, 0.5, 1.5, 4.0, 5.3, 6.6)
    heads = ("", "step", "what grew", "parameters", "answers", "loss")
    for column in range(columns):
        for stop, head in zip(stops, heads, strict=True):
            axis.text(column * WIDTH / 2 + stop, -0.5, head, fontsize=8, alpha=0.7, va="center")
    for index, row in enumerate(table):
        column, line = divmod(index, lines)
        left, said = column * WIDTH / 2, said_growth(row)
        cells = (
            "before" if row["step"] is None else f"{row['step']:,}",
            said if len(said) <= MOST_SAID else f"{said[: MOST_SAID - 1]}…",
            f"{row['parameters']:,}",
            said_difference(row),
            said_jump(row),
        )
        axis.text(
            left + stops[0], line + 0.5, str(index + 1), fontsize=7.5, color="white", ha="center", va="center",
            bbox={"boxstyle": "round,pad=0.25", "fc": _colour(row["operator"]), "ec": "none"},
        )  # fmt: skip
        for stop, text in zip(stops[1:], cells, strict=True):
            axis.text(left + stop, line + 0.5, text, fontsize=8, va="center")


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move numbers as little as their order allows until neighbours are a gap apart and all are within bounds.

    Args:
        places: Ascending.
        gap: Smallest distance; it shrinks where there is no room.
        low: Lowest place.
        high: Highest place.
    """
    if not places:
        return []
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap if moved else low))
    limit = high
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved


def _png(figure: "Figure") -> bytes:
    """Return a figure as PNG, with its background."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, facecolor=figure.get_facecolor())
    return picture.getvalue()
