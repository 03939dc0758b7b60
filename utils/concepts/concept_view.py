"""Concepts as pictures and as parts of a page: what was measured, beside what chance or noise gives."""

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from utils.concepts.autoencoder import AutoencoderFit
from utils.concepts.checks import as_tensor, check_kind
from utils.concepts.direction import ConceptDirection
from utils.concepts.effect import ErasureEffect
from utils.concepts.features import FeatureView, Strongest
from utils.concepts.similarity import Similarity, SimilarityTable
from utils.continual.matrix_view import page_html, picture_html, table_html
from utils.growth.lineage_view import DARK
from utils.runtime.errors import ConfigError
from utils.runtime.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from utils.concepts.transfer import Transfer

BLUE, ORANGE, GREY = "#4878b0", "#d1662c", "#8a929b"
HEIGHT = 3.4
"""Inches."""
HEADLINE = 10
"""Characters per inch that surely fit at the size of a headline."""
SHOWN = 8
"""Features that a picture of examples shows."""


def direction_figure(found: ConceptDirection, dark: bool = False) -> "Figure":
    """Draw a concept's held-out AUROC with its interval, beside control concepts and random directions.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """

    def draw(axes: "list[Axes]") -> None:
        axis = axes[0]
        rows: list[tuple[str, str, tuple[float, ...]]] = [("the concept", BLUE, (found.auroc,))]
        rows.append(("permuted labels", ORANGE, found.controls))
        rows += [("random directions", GREY, found.random)] if found.random else []
        for place, (_, colour, values) in enumerate(rows):
            offsets = _spread(len(values))
            axis.scatter(values, [place + offset for offset in offsets], s=18 if place else 60, c=colour, zorder=3)
        low, high = found.interval
        axis.hlines(0, low, high, color=BLUE, linewidth=3, alpha=0.6)
        axis.axvline(max(found.controls), color=ORANGE, linewidth=1, linestyle="--")
        axis.axvline(0.5, color=GREY, linewidth=0.8)
        axis.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlim(min(0.4, min(min(values) for _, _, values in rows) - 0.03), 1.02)
        axis.set_xlabel("AUROC on held-out examples; the bar is the concept's 95% interval")

    where = f" in {found.layer}" if found.layer else ""
    return _figure(draw, f"Concept{where} {found.verdict}: cosine of two halves {found.stability:.2f}", 1, dark)


def effect_figure(effect: ErasureEffect, dark: bool = False) -> "Figure":
    """Draw what erasing a concept costs, beside what erasing random directions does.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """

    def draw(axes: "list[Axes]") -> None:
        axis, drops = axes[0], [effect.before - value for value in effect.random]
        axis.hist(drops, bins=min(30, max(8, len(drops) // 4)), color=GREY, label=f"{len(drops)} random directions")
        axis.axvline(effect.drop, color=BLUE, linewidth=2.5, label="the concept")
        axis.set_xlabel(f"lost of {effect.behaviour}; {effect.before:.3f} before")
        axis.set_ylabel("random directions")
        axis.legend(frameon=False)

    return _figure(draw, f"Erased in {effect.layer}: {effect.drop:.3f} lost, p = {effect.p_value:.3g}", 1, dark)


def similarity_figure(found: Similarity | Sequence[Sequence[Similarity]], dark: bool = False) -> "Figure":
    """Draw one similarity over its distribution under chance, or those of several layers as a table of colours.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ConfigError: There is none.
    """
    if isinstance(found, Similarity):
        return _figure(partial(_draw_null, found), _headline(found), 1, dark)
    rows = [list(row) for row in found]
    if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
        raise ConfigError(
            "There are no similarities to draw.", "Expected rows of equal length.", "Compare some layers."
        )
    title = f"{rows[0][0].measure}, calibrated; * where p is at most 0.05"
    return _figure(partial(_draw_grid, rows, dark), title, 1, dark, max(HEIGHT, 0.45 * len(rows) + 1.4))


def autoencoder_figure(fit: AutoencoderFit, dark: bool = False) -> "Figure":
    """Draw the course of an autoencoder's training: the error of its batches and the share of dead features.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """

    def draw(axes: "list[Axes]") -> None:
        steps, errors, dead = (list(column) for column in zip(*fit.losses, strict=True))
        axes[0].plot(steps, errors, color=BLUE)
        axes[0].axhline(fit.error, color=BLUE, linestyle="--", linewidth=1)
        axes[0].axhline(1 - fit.principal, color=ORANGE, linestyle=":", linewidth=1.2)
        axes[0].set_yscale("log")
        least = min(*errors, fit.error, 1 - fit.principal)
        axes[0].set_ylim(max(1e-6, least * 0.7), max(*errors, 1.0) * 1.3)
        axes[0].set_title(
            f"normalised squared error\n-- held out {fit.error:.3f}, .. {fit.config.active} components "
            f"{1 - fit.principal:.3f}", loc="left", fontsize=9,
        )  # fmt: skip
        axes[1].plot(steps, [100 * share for share in dead], color=ORANGE)
        axes[1].set_ylim(0, max(5.0, 110 * max(dead)))
        axes[1].set_title("dead features, % of all", loc="left", fontsize=9)
        for axis in axes:
            axis.set_xlabel("step")

    title = f"{fit.autoencoder.features} features, {fit.l0:.1f} active: {fit.explained_variance:.1%} of the variance"
    return _figure(draw, title, 2, dark)


def feature_figure(view: FeatureView, images: Tensor, dark: bool = False) -> "Figure":
    """Draw the images that each feature is strongest on, a row for each feature.

    Args:
        view: The features of a layer.
        images: ``(n, channels, height, width)`` or ``(n, height, width)``, in the order of the examples.
        dark: Light on dark.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ConfigError: They are no images, or fewer than the examples.
    """
    check_kind(view, FeatureView, "view", "Give what layer_features or strongest_features returned.")
    images = as_tensor(images)
    features = [feature for feature in view.features if feature.strongest][:SHOWN]
    last = max((place.example for feature in features for place in feature.strongest), default=-1)
    if not isinstance(images, Tensor):
        raise ConfigError(
            f"The images are a {type(images).__name__}.",
            "Expected a tensor or an array (n, height, width), with 1 or 3 channels or none.",
            "Give the images that the features were found on.",
        )
    if images.ndim == 4 and images.shape[1] in (1, 3):
        images = images.movedim(1, -1).squeeze(-1)
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)) or last >= len(images) or last < 0:
        raise ConfigError(
            f"There are images of the shape {tuple(images.shape)}, and features of example {last}.",
            "Expected (n, height, width), with 1 or 3 channels or none, and every example.",
            "Give the images that the features were found on.",
        )
    require("matplotlib", "draw features")
    import matplotlib.style
    from matplotlib.figure import Figure

    columns = max(len(feature.strongest) for feature in features)
    with matplotlib.style.context(["dark_background", DARK] if dark else "default"):
        figure = Figure(figsize=(1.6 + 0.95 * columns, 0.95 * len(features) + 0.6), layout="constrained")
        axes: Any = figure.subplots(len(features), columns, squeeze=False)
        for row, feature in zip(axes, features, strict=True):
            for axis in row:
                axis.axis("off")
            for axis, place in zip(row, feature.strongest, strict=False):
                shown = images[place.example].float()
                span = (shown.max() - shown.min()).clamp_min(1e-9)
                axis.imshow(((shown - shown.min()) / span).cpu().numpy(), cmap="gray")
            row[0].text(
                -0.25, 0.5, f"{feature.number}\non {feature.density:.0%}", transform=row[0].transAxes, ha="right",
                va="center", fontsize=9,
            )  # fmt: skip
        figure.suptitle("Features and where they are strongest", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def figure_png(draw: Callable[..., "Figure"], dark: bool = False) -> bytes:
    """Return a picture as a file.

    Args:
        draw: One of the functions here with its arguments; is given ``dark``.
        dark: Light on dark.
    """
    picture, figure = io.BytesIO(), draw(dark=dark)
    figure.savefig(picture, format="png", dpi=110, facecolor=figure.get_facecolor())
    return picture.getvalue()


def shown_html(draw: Callable[..., "Figure"], said: str) -> str:
    """Return a picture over the same in words, as a part of a page."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in said.splitlines())
    return page_html(picture_html(partial(figure_png, draw), said.splitlines()[0]) + lines)


def told_html(title: str, told: Mapping[str, Any], said: Sequence[str] = ()) -> str:
    """Return facts as a table under a title, with sentences beneath, as a part of a page."""
    rows = [{"": name, "value": str(value)} for name, value in told.items()]
    # Values are words too, which wrap.
    table = table_html(rows).replace('<td class="number">', '<td style="white-space:normal;overflow-wrap:anywhere">')
    table = table.replace('<th class="number">value</th>', "<th></th>")
    return page_html(f"<p><b>{escape(title)}</b></p>{table}" + "".join(f"<p>{escape(line)}</p>" for line in said))


def similarity_html(rows: SimilarityTable) -> str:
    """Return the calibrated similarities of layers as a table, a row for each layer of the first model."""
    return page_html(f"<p>{escape(rows.headline)}</p>{table_html(rows.table())}")


def transfer_html(made: "Transfer") -> str:
    """Return what a student learned and kept as a table, with the course of its losses in words."""
    told = {
        "read from": f"{made.readout.side} of {made.readout.layer} of {made.readout.adapter.name}",
        "steps": made.config.steps, "parameters that took part": f"{made.trained:,}",
        "answers of its own that changed": f"{made.changed:.2%} of {made.measured_on}",
        "before the weights went back": f"{made.changed_unbounded:.2%}",
        "share of the change kept": f"{made.mixture:.0%}",
    }  # fmt: skip
    if made.history:
        first, last = made.history[0], made.history[-1]
        told |= {f"loss, {name}": f"{first[name]:.3g}, at the end {last[name]:.3g}" for name in first if name != "step"}
    return told_html("What the student learned", told, str(made).splitlines())


def feature_html(view: FeatureView) -> str:
    """Return features as a table with the places where each is strongest."""
    rows = [
        {
            "feature": str(feature.number),
            "active on": f"{feature.density:.2%}",
            "mean strength": f"{feature.mean:.2f}",
            "energy": f"{feature.energy:.1%}",
            "strongest": "  |  ".join(map(_said, feature.strongest)),
        }
        for feature in view.features
    ]
    where = f" of <code>{escape(view.layer)}</code>" if view.layer else ""
    return page_html(f"<p>{len(rows)} of {view.total} features{where}</p>{table_html(rows)}")


def _figure(
    draw: Callable[["list[Axes]"], None], title: str, panels: int, dark: bool, height: float = HEIGHT
) -> "Figure":
    require("matplotlib", "draw concepts")
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["dark_background", DARK] if dark else "default"):
        width = 4.2 * panels + 3.0 * (panels == 1)
        figure = Figure(figsize=(width, height), layout="constrained")
        axes: Any = figure.subplots(1, panels, squeeze=False)
        for axis in axes[0]:
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_facecolor("none")
        draw(list(axes[0]))
        wrapped = textwrap.fill(title, int(width * HEADLINE))
        figure.suptitle(wrapped, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _draw_null(found: Similarity, axes: "list[Axes]") -> None:
    axis = axes[0]
    axis.hist(found.null, bins=25, color=GREY, label=f"{len(found.null)} permutations of the samples")
    axis.axvline(found.critical, color=ORANGE, linestyle="--", linewidth=1.2, label="chance, one time in twenty")
    axis.axvline(found.score, color=BLUE, linewidth=2.5, label="measured")
    if not math.isnan(found.uncorrected):
        axis.axvline(found.uncorrected, color=BLUE, linewidth=1, linestyle=":", label="usual, uncorrected CKA")
    axis.set_xlabel(found.measure)
    axis.set_ylabel("permutations")
    axis.legend(frameon=False, fontsize=8)


def _draw_grid(rows: list[list[Similarity]], dark: bool, axes: "list[Axes]") -> None:
    axis = axes[0]
    values = torch.tensor([[found.calibrated for found in row] for row in rows])
    picture = axis.imshow(values.numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for i, row in enumerate(rows):
        for j, found in enumerate(row):
            colour = "black" if found.calibrated > 0.6 else "white"
            axis.text(j, i, f"{found.calibrated:.2f}{'*' if found.significant else ''}", ha="center", va="center",
                      color=colour, fontsize=9)  # fmt: skip
    axis.set_xticks(range(len(rows[0])), [found.layers[1] or str(j) for j, found in enumerate(rows[0])], rotation=30)
    axis.set_yticks(range(len(rows)), [row[0].layers[0] or str(i) for i, row in enumerate(rows)])
    axis.set_xlabel("layers of the second model")
    axis.set_ylabel("layers of the first")
    axis.figure.colorbar(picture, ax=axis)


def _headline(found: Similarity) -> str:
    verdict = "more alike than chance" if found.significant else "not more alike than chance"
    return f"{found.measure} {found.score:.3f}, calibrated {found.calibrated:.3f}: {verdict} (p = {found.p_value:.3g})"


def _spread(count: int) -> list[float]:
    """Return offsets that keep points of one row apart, the same for the same number."""
    return [0.0] if count == 1 else [0.28 * math.sin(2.4 * number) for number in range(count)]


def _said(place: Strongest) -> str:
    if any(place.text):
        before, here, after = place.text
        return f"{before}[{here}]{after}"
    return f"{place.example}" + (f" at {place.position}" if place.position >= 0 else "")
