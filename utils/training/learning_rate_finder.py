"""A learning rate from a range test: a copy of the model is trained while the rate rises, and the loss is watched.

The test is that of Smith (arXiv:1506.01186, section 3.3): too small a rate changes nothing, a good one lets the loss
fall, too large a one lets it rise again. Taken is the rate at which the loss falls fastest, at most a part of the one
at which it has stopped falling. Where the curve does not show that, no number is given.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import pairwise
from typing import Any

from utils.adapters import ModelAdapter, ModelSpec
from utils.loading import LoadedModel, load_model
from utils.runtime.errors import RunError
from utils.runtime.optional import require
from utils.runtime.progress import progress_bar
from utils.training.config import AUTO, TrainingConfig
from utils.training.dataset_utilities import prepare_data
from utils.training.prepared_data import PreparedData

STEPS = 100
"""Optimizer steps of a test."""
LOWEST, HIGHEST = 1e-6, 1.0
"""The rates between which a test looks: AdamW moves every weight by about the rate in each step."""
WIDTH = 3.0
"""Deviation, in steps, of the Gaussian that smooths the losses."""
CLEAR_FALL, CLEAR_SHARE = 3.0, 0.01
"""A fall counts when it is so many deviations of a single loss, and this share of the first losses."""
LEAST_STEPS = 8
"""A loss that stops falling within so few steps has not been looked at from below."""
BEGUN, NEARLY = 0.25, 0.1
"""The loss is on its way down after the first share of the whole fall, and has stopped when the second is left."""
FROM_THE_TURN = 2.0
"""The suggestion is at most the rate at which the loss stops falling, divided by this."""
DIVERGED = 2.0
"""The test ends when the loss is this many times what it was at first."""


@dataclass(frozen=True, repr=False)
class LearningRateSuggestion:
    """What a range test showed; shows itself in a notebook."""

    learning_rate: float | None
    """The suggestion; None when the curve shows no clear one."""
    reason: str
    """Why this one, or why none."""
    rates: tuple[float, ...]
    """The learning rate of the update before each loss."""
    losses: tuple[float, ...]
    """The loss after that update, on the run's own batches."""
    smoothed: tuple[float, ...]
    """The same without most of the noise."""
    ended: str
    """How the test ended: at the largest rate, or because the loss diverged."""

    @property
    def clear(self) -> bool:
        """Whether there is an answer."""
        return self.learning_rate is not None

    def check(self) -> "LearningRateSuggestion":
        """Return this suggestion if there is one.

        Raises:
            RunError: There is none.
        """
        if not self.clear:
            raise RunError(
                f"No learning rate was found: {self.reason}.",
                "Expected a loss that falls clearly at some rate and rises again, or stops falling, at a larger one.",
                "Set learning_rate to a number; 3e-4 to 2e-3 is usual for new models, 1e-5 to 1e-4 for trained ones.",
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def text(self) -> str:
        """Return the suggestion with its reason."""
        return f"learning rate {f'{self.learning_rate:.2g}' if self.learning_rate else 'not found'}: {self.reason}"

    __repr__ = text

    def _repr_html_(self) -> str:
        """Show the curve in a notebook."""
        from utils.training.line_chart import Series, line_chart
        from utils.training.run_report import COLOUR_STYLE, STYLE

        places = [math.log10(rate) for rate in self.rates]
        # What comes after a divergence would press the rest of the curve flat.
        shown = [min(loss, 1.2 * max(self.smoothed[:LEAST_STEPS], default=loss)) for loss in self.losses]
        curves = [
            Series("loss", list(zip(places, shown, strict=True)), 1, faint=True),
            Series("smoothed", [(x, min(y, max(shown))) for x, y in zip(places, self.smoothed, strict=True)], 1, True),
        ]
        if self.learning_rate is not None:
            place = min(range(len(places)), key=lambda i: abs(self.rates[i] - (self.learning_rate or 0)))
            curves.append(Series("suggestion", [(math.log10(self.learning_rate), self.smoothed[place])], 0))
        picture = line_chart(curves, "Loss while the learning rate rises", "log10 of the learning rate")
        return (
            f'<style>{STYLE}{COLOUR_STYLE}</style><div class="seedbed-run"><p><b>{escape(self.text())}</b></p>'
            f'<p class="soft">{len(self.losses)} steps; {escape(self.ended)}. Thin is the loss of each step, thick the '
            f"smoothed one{', the dot the suggestion' if self.clear else ''}.</p>"
            f'<div style="max-width:640px">{picture}</div></div>'
        )


def find_learning_rate(
    model: "LoadedModel | ModelAdapter | Any",
    data: Any = "builtin:python-docs",
    config: TrainingConfig | None = None,
    *,
    spec: ModelSpec | None = None,
    progress: bool = True,
) -> LearningRateSuggestion:
    """Look for a learning rate by training a copy of the model for about 100 steps while the rate rises.

    Example:
        >>> find_learning_rate("example:gpt", config=TrainingConfig(batch_size=8))  # doctest: +SKIP

    Args:
        model: A loaded model, a reference for it, an adapter or a module. It is left as it is.
        data: A data reference, or prepared data.
        config: How the run is to train; the steps take the same samples, losses, precision and clipping.
        spec: Facts about the model that override detection.
        progress: Show a progress bar.

    Returns:
        The suggestion; its ``learning_rate`` is None when the curve shows no clear one.

    Raises:
        SeedbedError: The model, the data or the settings cannot be used.
    """
    adapter, prepared, config = ready(model, data, config, spec)
    from utils.training.trial_steps import run_steps

    if config.batch_size == AUTO:
        from utils.training.batch_size_finder import find_batch_size

        config = find_batch_size(adapter, prepared, config).applied(config)
    ratio = (HIGHEST / LOWEST) ** (1 / (STEPS - 1))
    losses: list[float] = []
    settings = config.with_changes(learning_rate=HIGHEST)

    with progress_bar(STEPS + 1, "Looking for a learning rate", progress) as bar:

        def after(loss: float) -> bool:
            losses.append(loss)
            bar.update(1)
            return _diverged(losses)

        # One step more than there are rates: a loss is measured before the update of its step.
        finite = run_steps(
            adapter, prepared, settings, STEPS + 1, share=lambda step: ratio ** (min(step, STEPS - 1) - STEPS + 1),
            after=after,
        )  # fmt: skip
    rates = [LOWEST * ratio**number for number in range(STEPS)]
    diverged = not finite or _diverged(losses)
    return suggestion(rates[: len(losses) - 1], losses[1:], diverged)


def suggestion(rates: Sequence[float], losses: Sequence[float], diverged: bool = False) -> LearningRateSuggestion:
    """Read a learning rate from the curve of a range test, or say why it shows none.

    Args:
        rates: Learning rates, each larger than the one before by the same factor.
        losses: The loss after an update with each.
        diverged: Whether the test ended because the loss did.
    """
    finite = [pair for pair in zip(rates, losses, strict=True) if math.isfinite(pair[1])]
    rates, losses = [rate for rate, _ in finite], [loss for _, loss in finite]
    smooth = smoothed(losses)
    ended = f"ended at a rate of {rates[-1]:.2g}" if rates else "ended at once"
    ended = "ended where the loss diverged" if diverged else ended

    def answer(rate: float | None, reason: str) -> LearningRateSuggestion:
        return LearningRateSuggestion(rate, reason, tuple(rates), tuple(losses), tuple(smooth), ended)

    if len(losses) < LEAST_STEPS:
        return answer(None, f"the loss diverged within {len(losses)} steps, at {(rates or [LOWEST])[-1]:.1g} or less")
    first = statistics.median(losses[:LEAST_STEPS])
    lowest = min(smooth)
    # Beyond the lowest point large rates make losses jump, which says nothing about how sure the fall is.
    fall, noise = first - lowest, _noise(losses[: max(smooth.index(lowest) + 1, 3 * LEAST_STEPS)])
    if fall <= max(CLEAR_FALL * noise, CLEAR_SHARE * abs(first)):
        return answer(None, f"the loss fell by {max(fall, 0.0):.2g} from {first:.3g}, which may be chance")
    # Where the curve is nearly flat, noise decides which of its points is the lowest.
    turn = next(i for i, loss in enumerate(smooth) if loss <= lowest + NEARLY * fall)
    if turn < LEAST_STEPS:
        return answer(None, f"the loss rises again from a rate of {rates[turn]:.1g} on, with no step below to look at")
    if smooth[-1] == lowest and not diverged:
        return answer(None, f"the loss is still falling at {rates[-1]:.2g}, the largest rate that was tried")
    # Only where the loss is on its way down: before that, slopes are noise.
    begun = max((i for i in range(1, turn) if smooth[i] >= first - BEGUN * fall), default=1)
    steepest = rates[min(range(begun, turn), key=lambda i: smooth[i + 1] - smooth[i - 1])]
    limit = rates[turn] / FROM_THE_TURN
    where = f"the loss falls fastest at {steepest:.2g} and stops falling at {rates[turn]:.2g}"
    return answer(float(f"{min(steepest, limit):.2g}"), where)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return each loss as the mean of those around it, weighted by a Gaussian of deviation `WIDTH`."""
    reach = math.ceil(3 * WIDTH)
    weights = [math.exp(-0.5 * (offset / WIDTH) ** 2) for offset in range(-reach, reach + 1)]
    result = []
    for centre in range(len(losses)):
        # The same number of losses on both sides, or a slope at the ends would move them.
        near = min(reach, centre, len(losses) - 1 - centre)
        used = weights[reach - near : reach + near + 1]
        around = losses[centre - near : centre + near + 1]
        result.append(sum(w * loss for w, loss in zip(used, around, strict=True)) / sum(used))
    return result


def ready(
    model: Any, data: Any, config: TrainingConfig | None, spec: ModelSpec | None
) -> tuple[ModelAdapter, PreparedData, TrainingConfig]:
    """Return what a run would train, on what and how.

    Raises:
        SeedbedError: The model, the data or the settings cannot be used.
    """
    require("pytorch_lightning", "train", "pytorch-lightning")
    config = config or TrainingConfig()
    if isinstance(model, str):
        model = load_model(model)
    adapter = model if isinstance(model, ModelAdapter) and spec is None else ModelAdapter(model, spec=spec)
    prepared = prepare_data(adapter, data, config)
    return adapter, prepared, config


def _noise(losses: Sequence[float]) -> float:
    """Return the deviation of a single loss from its neighbours, whatever the curve does slowly."""
    steps = [abs(after - before) for before, after in pairwise(losses)]
    # The median of the absolute value of a normal number is 0.6745 deviations; a difference has two of them.
    return statistics.median(steps) / 0.6745 / math.sqrt(2)


def _diverged(losses: Sequence[float]) -> bool:
    """Tell whether going on would show nothing new."""
    if not math.isfinite(losses[-1]):
        return True
    if len(losses) <= LEAST_STEPS:
        return False
    first = statistics.median(losses[:LEAST_STEPS])
    recent = statistics.median(losses[-3:])
    return recent > first + max((DIVERGED - 1) * abs(first), 10 * _noise(losses[:LEAST_STEPS]))
