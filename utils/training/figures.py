"""Pictures of a run's metrics."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.runtime.files import write_atomic
from utils.runtime.optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN_COLOR, VALIDATION_COLOR, BASELINE_COLOR = "#9db4c0", "#1f6f8b", "#c05746"


def training_figure(rows: Sequence[dict[str, Any]], zlib_bits_per_byte: float | None = None) -> "Figure":
    """Draw the loss, the held-out metric and the learning rate over the steps.

    Args:
        rows: Rows of metrics.csv.
        zlib_bits_per_byte: Baseline to draw beside the bits per byte of a language model.
    """
    require("matplotlib", "draw the training curves")
    from matplotlib.figure import Figure

    train = [row for row in rows if row["split"] == "train"]
    validation = [row for row in rows if row["split"] == "validation"]
    metric = next((name for name in ("bits_per_byte", "accuracy") if any(name in row for row in validation)), None)
    figure = Figure(figsize=(10, 3.2) if metric else (7, 3.2), layout="constrained")
    axes = figure.subplots(1, 3 if metric else 2)
    losses, rates = axes[0], axes[-1]
    losses.plot([r["step"] for r in train], [r["loss"] for r in train], color=TRAIN_COLOR, label="training")
    losses.plot(
        [r["step"] for r in validation],
        [r["loss"] for r in validation],
        "o-",
        ms=4,
        color=VALIDATION_COLOR,
        label="held out",
    )
    losses.set(xlabel="step", ylabel="loss (nats)", title="Loss")
    losses.legend(frameon=False)
    if metric:
        measured = [row for row in validation if metric in row]
        middle = axes[1]
        middle.plot([r["step"] for r in measured], [r[metric] for r in measured], "o-", ms=4, color=VALIDATION_COLOR)
        if metric == "bits_per_byte" and zlib_bits_per_byte is not None:
            middle.axhline(zlib_bits_per_byte, color=BASELINE_COLOR, ls="--", label="zlib -9")
            middle.legend(frameon=False)
        title = {"bits_per_byte": "Bits per byte, held out", "accuracy": "Accuracy, held out"}[metric]
        middle.set(xlabel="step", ylabel=metric.replace("_", " "), title=title)
    rates.plot([r["step"] for r in train], [r.get("learning_rate") for r in train], color=TRAIN_COLOR)
    rates.set(xlabel="step", title="Learning rate")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure


def save_training_figure(rows: Sequence[dict[str, Any]], path: Path, zlib_bits_per_byte: float | None = None) -> None:
    """Draw `training_figure` into a PNG file."""
    picture = io.BytesIO()
    training_figure(rows, zlib_bits_per_byte).savefig(picture, format="png", dpi=120)
    write_atomic(path, picture.getvalue())
