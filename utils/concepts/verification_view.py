"""A verified transfer as a picture, as a page's table and as text.

On the left what each student scores and what the teacher does, on the right V and what the same score makes of junk.
"""

import io
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.concepts.verification_result import VERIFIED, TransferVerification, said
from utils.continual.matrix_view import page_html, picture_html, table_html
from utils.growth.lineage_view import DARK
from utils.runtime.files import write_atomic
from utils.runtime.optional import require
from utils.validation.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARMS = {
    "teacher": "teacher",
    "package": "student + package",
    "labels_only": "student + labels alone",
    "before": "student as it was",
    "shuffled": "student + shuffled package",
    "junk": "student + other shuffled package",
}
"""What was scored, in the order shown."""
COLOURS = {
    "teacher": "#8a63b8", "package": "#3a8f5c", "labels_only": "#a8862c", "before": "#4878b0", "shuffled": "#7a8088",
    "junk": "#7a8088",
}  # fmt: skip
METRICS = {"auroc": "AUROC", "balanced_accuracy": "balanced accuracy"}
WIDTH, HEIGHT = 11.0, 3.6
"""Inches."""


def headline(result: TransferVerification) -> str:
    """Return the verdict in a line."""
    verdict = "verified" if result.verified else "undefined" if result.value is None else "not verified"
    score = "" if result.value is None else f", V = {said(result.value)}"
    return f"{result.concept}, {result.teacher} to {result.student}: {verdict}{score}"


def score_rows(result: TransferVerification) -> list[dict[str, str]]:
    """Return a row of text for each number."""
    rows = [
        {"what": f"{METRICS[result.metric]}: {ARMS[name]}", "mean and 95% interval": said(result.intervals[name])}
        for name in ARMS
        if name in result.intervals
    ]
    shares = {
        "V": result.value, "V of a junk package": result.junk, "V of labels alone": result.labels_only,
        "V of the student as it was": result.before, "beyond the student as it was": result.taught,
        "beyond labels alone": result.beyond_labels,
    }  # fmt: skip
    rows += [
        {"what": name, "mean and 95% interval": said(value)} for name, value in shares.items() if value is not None
    ]
    if result.interference is not None:
        rows.append({"what": "other task, points", "mean and 95% interval": said(result.interference, 2)})
    if (found := result.fidelity) is not None:
        rows.append({"what": "agreement with the teacher", "mean and 95% interval": f"{found.overall:.3f}"})
        where = f"the same where it is wrong ({found.wrong} samples)"
        rows.append(
            {"what": where, "mean and 95% interval": f"{found.student:.3f}; labels alone {found.labels_only:.3f}"}
        )
        rows.append({"what": "more of the teacher's mistakes than labels", "mean and 95% interval": said(found.more)})
    if (near := result.neighbours) is not None:
        told = f"{near['score']:.3f}, beyond chance {near['calibrated']:.3f} (p = {near['p_value']:.3g})"
        rows.append({"what": "neighbours in common with the teacher", "mean and 95% interval": told})
    return rows


def verification_text(result: TransferVerification) -> str:
    """Return verdict, reasons and all numbers."""
    rows = score_rows(result)
    width = max(len(row["what"]) for row in rows)
    table = [f"{row['what'].ljust(width)}  {row['mean and 95% interval']}" for row in rows]
    tested = f"{result.seeds} students, {result.test[0]} test samples with the concept and {result.test[1]} without"
    return "\n".join([headline(result), *result.reasons, "", tested, *table])


def verification_figure(result: TransferVerification, dark: bool = False) -> "Figure":
    """Draw what all score, and V beside its controls.

    Args:
        result: What was measured.
        dark: Light on dark.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("matplotlib", "draw a verified transfer")
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["dark_background", DARK] if dark else "default"):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for axis in (left, right):
            axis.set_facecolor("none")
            axis.spines[["top", "right"]].set_visible(False)
        _draw_scores(left, result)
        _draw_shares(right, result, dark)
        figure.suptitle(headline(result), x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    return figure


def _draw_scores(axis: "Axes", result: TransferVerification) -> None:
    """Draw what each student scores, with the intervals of the means."""
    names = [name for name in ARMS if name in result.intervals]
    for place, name in enumerate(reversed(names)):
        interval, colour = result.intervals[name], COLOURS[name]
        axis.plot(
            [interval.low, interval.high], [place, place], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt"
        )
        axis.plot(interval.mean, place, "D", color=colour, markersize=6)
        seeds = result.scores.get(name, ())
        axis.plot(seeds, [place + 0.24] * len(seeds), "|", color=colour, markersize=7)
    axis.axvline(0.5, color="#7a8088", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(names)), [ARMS[name] for name in reversed(names)])
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlabel(
        f"{METRICS[result.metric]} on {sum(result.test)} test samples; a tick for each of {result.seeds} students"
    )


def _draw_shares(axis: "Axes", result: TransferVerification, dark: bool) -> None:
    """Draw V, and that of labels alone, of the untaught student and of junk."""
    found = {"V": ("package", result.value), "labels alone": ("labels_only", result.labels_only),
             "as it was": ("before", result.before), "junk package": ("junk", result.junk)}  # fmt: skip
    shown: list[tuple[str, str, Interval]] = [(t, n, value) for t, (n, value) in found.items() if value is not None]
    if not shown:
        axis.text(0.5, 0.5, "V is undefined", ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    for place, (_, name, value) in enumerate(reversed(shown)):
        axis.plot([value.low, value.high], [place, place], color=COLOURS[name], linewidth=5, alpha=0.35,
                  solid_capstyle="butt")  # fmt: skip
        axis.plot(value.mean, place, "D", color=COLOURS[name], markersize=6)
    for where, style in ((0, "-"), (VERIFIED, ":"), (1, "-")):
        axis.axvline(where, color="white" if dark else "black", linewidth=0.7, linestyle=style)
    axis.set_yticks(range(len(shown)), [title for title, _, _ in reversed(shown)])
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.set_xlabel("0: shuffled package; 1: the teacher")


def verification_picture(result: TransferVerification, kind: str = "png", dark: bool = False) -> bytes:
    """Return `verification_figure` as a file: ``png`` or ``svg``.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: `kind` is something else.
    """
    if kind not in ("png", "svg"):
        raise ValueError(f"There are pictures of the kinds 'png' and 'svg', not {kind!r}.")
    picture, figure = io.BytesIO(), verification_figure(result, dark)
    figure.savefig(picture, format=kind, dpi=120, facecolor=figure.get_facecolor())
    return picture.getvalue()


def save_verification_figure(result: TransferVerification, path: str | Path) -> Path:
    """Draw `verification_figure` into a PNG or SVG file, by the end of its name, and return its path.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: The name ends otherwise.
        OSError: The file cannot be written.
    """
    path = Path(path)
    write_atomic(path, verification_picture(result, path.suffix.removeprefix(".").lower()))
    return path


def verification_html(result: TransferVerification) -> str:
    """Return verdict, picture and table; the picture is light or dark as the page is."""
    drawn = picture_html(partial(_png, result), "what students score, and how far they are on the way to the teacher")
    said_why = "".join(f"<li>{escape(reason)}</li>" for reason in result.reasons)
    return page_html(f"{drawn}<ul>{said_why}</ul>{table_html(score_rows(result))}")


def _png(result: TransferVerification, **options: Any) -> bytes:
    return verification_picture(result, "png", **options)
