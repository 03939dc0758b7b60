"""Pictures of a run's metrics."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.runtime.files import write_atomic
from utils.runtime.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN_COLOR, TREND_COLOR, VALIDATION_COLOR, BASELINE_COLOR = "#b9c9d1", "#5b7f92", "#d1662c", "#8a3b3b"
MARK_COLOR = "#7a6a9a"
METRICS = {
    "bits_per_byte": "Bits per byte, held out",
    "accuracy": "Accuracy, held out",
    "r2": "Explained variance (r2), held out",
}
"""Held-out numbers that are drawn beside the loss, the first that was measured."""


def metric_of(rows: Sequence[dict[str, Any]]) -> str | None:
    """Return the name of the held-out number that says more than the loss, if one was measured."""
    return next((name for name in METRICS if any(name in row for row in rows if row["split"] == "validation")), None)


def trend(values: Sequence[float]) -> list[float]:
    """Return a smoothed course: an average whose weights halve over a thirtieth of the values, without start-up bias.

    What comes later does not move what is drawn already.
    """
    keep = 0.5 ** (1 / max(1.0, len(values) / 30))
    result, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight if weight else math.nan)
    return result


def training_figure(
    rows: Sequence[dict[str, Any]], zlib_bits_per_byte: float | None = None, marks: Sequence[float] = ()
) -> "Figure":
    """Draw the loss, the held-out metric, the learning rate and the gradient norm over the steps.

    Args:
        rows: Rows of metrics.csv.
        zlib_bits_per_byte: Baseline to draw beside the bits per byte of a language model.
        marks: Steps at which the model grew, drawn as vertical lines.
    """
    require("matplotlib", "draw the training curves")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [row for row in rows if row["split"] == "train"]
    validation = [row for row in rows if row["split"] == "validation"]
    metric = metric_of(rows)
    figure = Figure(figsize=(11, 5.4) if metric else (11, 3), layout="constrained")
    panels = list(figure.subplots(2, 2).flat) if metric else list(figure.subplots(1, 3).flat)
    draw_losses(panels[0], train, validation, marks)
    for axis in panels[1:]:
        draw_marks(axis, marks)
    if metric:
        _draw_metric(panels[1], validation, metric, zlib_bits_per_byte)
    _draw_course(panels[-2], train, "learning_rate", "Learning rate")
    _draw_course(panels[-1], train, "gradient_norm", "Gradient norm, before clipping", smooth=True)
    for axis in panels:
        axis.title.set_fontsize(11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for axis in panels[-2:]:
        axis.set_xlabel("step")
    return figure


def draw_marks(axis: "Axes", marks: Sequence[float], name: str | None = None) -> None:
    """Draw a vertical line at each of some steps; `name` is for the legend."""
    for index, step in enumerate(marks):
        axis.axvline(step, color=MARK_COLOR, ls=(0, (4, 3)), lw=1, alpha=0.7, zorder=1, label=None if index else name)


def draw_losses(
    axis: "Axes",
    train: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]],
    marks: Sequence[float] = (),
) -> None:
    """Draw the training loss as it was and smoothed, the held-out loss, and where the model grew."""
    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    axis.plot(steps, losses, color=TRAIN_COLOR, lw=1, label="training")
    if len(losses) > 2:
        axis.plot(steps, trend(losses), color=TREND_COLOR, lw=1.8, label="training, smoothed")
    held = ([r["step"] for r in validation], [r["loss"] for r in validation])
    if validation:
        axis.plot(*held, "o-", ms=3.5, color=VALIDATION_COLOR, label="held out")
    draw_marks(axis, marks, "the model grew")
    axis.set(title="Loss")
    if train or validation:
        # The lines of events may run beneath it.
        axis.legend(framealpha=0.85, edgecolor="none", fontsize=9)


def _draw_metric(axis: "Axes", validation: Sequence[dict[str, Any]], metric: str, baseline: float | None) -> None:
    """Draw a held-out number, beside what zlib reaches on the same text."""
    measured = [row for row in validation if metric in row]
    points = ([r["step"] for r in measured], [r[metric] for r in measured])
    axis.plot(*points, "o-", ms=3.5, color=VALIDATION_COLOR, label="model")
    if metric == "bits_per_byte" and baseline is not None:
        axis.axhline(baseline, color=BASELINE_COLOR, ls="--", lw=1.2, label=f"zlib -9: {baseline:.2f}")
        axis.legend(frameon=False, fontsize=9)
    axis.set(title=METRICS[metric])


def _draw_course(axis: "Axes", train: Sequence[dict[str, Any]], name: str, title: str, smooth: bool = False) -> None:
    """Draw a number of the training rows."""
    known = [row for row in train if name in row]
    steps, values = [r["step"] for r in known], [r[name] for r in known]
    axis.plot(steps, values, color=TRAIN_COLOR if smooth else TREND_COLOR, lw=1 if smooth else 1.8)
    if smooth and len(values) > 2:
        axis.plot(steps, trend(values), color=TREND_COLOR, lw=1.8)
    axis.set(title=title)
    axis.set_ylim(bottom=0)


def figure_png(
    rows: Sequence[dict[str, Any]],
    zlib_bits_per_byte: float | None = None,
    dpi: int = 120,
    marks: Sequence[float] = (),
) -> bytes:
    """Return `training_figure` as PNG."""
    picture = io.BytesIO()
    training_figure(rows, zlib_bits_per_byte, marks).savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()


def save_training_figure(
    rows: Sequence[dict[str, Any]], path: Path, zlib_bits_per_byte: float | None = None, marks: Sequence[float] = ()
) -> None:
    """Draw `training_figure` into a PNG file."""
    write_atomic(path, figure_png(rows, zlib_bits_per_byte, marks=marks))
