"""When should a model grow? Signals that watch a run, and an arbiter that asks several of them to agree.

Everything that a trigger remembers is plain numbers: a run that is resumed decides as the uninterrupted one would.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from utils.adapters.objectives import IGNORED, REAL_VALUED
from utils.growth.benefit import LayerBenefit, total_benefit
from utils.growth.capacity import LayerCapacity
from utils.growth.config import GrowthConfig

SMOOTHED = 3
"""Measurements that uncertainty and benefit are averaged over: each is of a single batch."""
JUDGED_RATE = 0.05
"""Windows in which the learning rate is a smaller share of its peak say nothing about a plateau."""
MOST_PRESSURE = 1e6
"""Bound of a pressure: a loss that does not fall at all would make it infinite, which JSON cannot hold."""


@dataclass(frozen=True)
class Observation:
    """What is known about a run at one step; a trigger reads what it needs and ignores what is None."""

    step: int
    """Optimizer steps done."""
    loss: float | None = None
    """Training loss of the step, in nats."""
    rate_share: float = 1.0
    """Learning rate of the step as a share of the peak."""
    entropy: float | None = None
    """What `predictive_entropy` returned."""
    capacity: Sequence[LayerCapacity] | None = None
    """What `utils.growth.capacity.capacity` returned."""
    benefit: Sequence[LayerBenefit] | None = None
    """What `utils.growth.benefit.benefit` returned."""


@dataclass(frozen=True)
class Signal:
    """What one trigger says."""

    name: str
    """The trigger."""
    fired: bool
    """It asks for growth."""
    value: float | None
    """What it measured; None when there is nothing yet, or nothing to measure in this model."""
    threshold: float
    """The bound of its value."""
    pressure: float | None
    """How near it is to firing, on one scale for all triggers: 1 or more where it fires; None without a value."""
    why: str
    """The numbers in words."""

    def to_dict(self) -> dict[str, Any]:
        """Return the signal as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Decision:
    """Whether to grow now."""

    grow: bool
    """Grow."""
    step: int
    """Optimizer steps done."""
    signals: tuple[Signal, ...]
    """What every trigger said."""
    why: str
    """The reason, in a sentence."""

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as plain values."""
        return {**asdict(self), "signals": [signal.to_dict() for signal in self.signals]}


class Trigger(Protocol):
    """Watches a run and says when it would grow the model."""

    @property
    def name(self) -> str:
        """Its name in the settings."""

    @property
    def value(self) -> float | None:
        """What it measures now; None when there is nothing."""

    def observe(self, observation: Observation) -> None:
        """Take in what is known at a step."""

    def fires(self) -> Signal:
        """Say whether it asks for growth; changes nothing."""

    def reset(self) -> None:
        """Forget what was measured of the model before it grew."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything it remembers as plain numbers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""


class Plateau:
    """Fires when the loss has stopped falling: no window of the last few was better than the best before it.

    The improvement of a window is (best - mean) / best, where best is the lowest mean of any window before, divided by
    the window's mean learning rate as a share of the peak: at a tenth of the rate a tenth of the progress is no
    plateau. Windows below `JUDGED_RATE` are not judged.
    """

    name = "plateau"

    def __init__(self, window: int = 50, patience: int = 3, improvement: float = 0.005) -> None:
        """Start with nothing seen.

        Args:
            window: Losses that are averaged.
            patience: Windows in a row without improvement that make a plateau.
            improvement: Least relative improvement per window, at the peak rate.
        """
        self.window, self.patience, self.improvement = window, patience, improvement
        self.best: float | None = None
        self.recent: list[float] = []
        self.count, self.loss, self.rate = 0, 0.0, 0.0

    @property
    def value(self) -> float | None:
        """The largest improvement of the last `patience` judged windows; None before there are as many."""
        return max(self.recent) if len(self.recent) == self.patience else None

    def observe(self, observation: Observation) -> None:
        """Take in the loss of a step; a loss that is not finite is left out."""
        if observation.loss is None or not math.isfinite(observation.loss):
            return
        self.count, self.loss, self.rate = (
            self.count + 1,
            self.loss + observation.loss,
            self.rate + observation.rate_share,
        )
        if self.count < self.window:
            return
        mean, rate = self.loss / self.count, self.rate / self.count
        self.count, self.loss, self.rate = 0, 0.0, 0.0
        if self.best is not None and rate >= JUDGED_RATE:
            improvement = (self.best - mean) / max(abs(self.best), 1e-12) / rate
            self.recent = [*self.recent, improvement][-self.patience :]
        self.best = mean if self.best is None else min(self.best, mean)

    def fires(self) -> Signal:
        """Fire when the largest recent improvement is below the bound."""
        value = self.value
        if value is None:
            why = f"{len(self.recent)} of {self.patience} windows of {self.window} losses were judged"
            return Signal(self.name, False, None, self.improvement, None, why)
        near = self.improvement / value if value > 0 else MOST_PRESSURE
        why = (
            f"the best of the last {self.patience} windows improved the loss by {value:.2%} at the peak learning rate, "
            f"a plateau is below {self.improvement:.2%}"
        )
        return Signal(self.name, value < self.improvement, value, self.improvement, min(near, MOST_PRESSURE), why)

    def reset(self) -> None:
        """Judge anew, against the best loss so far."""
        self.recent = []
        self.count, self.loss, self.rate = 0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the unfinished window, the best mean and the recent improvements."""
        return {
            "best": self.best, "recent": list(self.recent), "count": self.count, "loss": self.loss, "rate": self.rate,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.best, self.recent = state["best"], list(state["recent"])
        self.count, self.loss, self.rate = state["count"], state["loss"], state["rate"]


class _Level:
    """Fires while the mean of the last few measurements is at or above a bound."""

    name, what, missing = "", "", ""

    def __init__(self, threshold: float) -> None:
        """Start with nothing seen; `threshold` is the bound."""
        self.threshold = threshold
        self.recent: list[float] = []

    @property
    def value(self) -> float | None:
        """The mean of the last `SMOOTHED` measurements; None before there are as many."""
        return math.fsum(self.recent) / SMOOTHED if len(self.recent) == SMOOTHED else None

    def take(self, measured: float | None) -> None:
        """Take in a measurement; what is None or not finite is left out."""
        if measured is not None and math.isfinite(measured):
            self.recent = [*self.recent, measured][-SMOOTHED:]

    def fires(self) -> Signal:
        """Fire at the bound and above."""
        value = self.value
        if value is None:
            why = f"{len(self.recent)} of {SMOOTHED} measurements" if self.recent else self.missing
            return Signal(self.name, False, None, self.threshold, None, why)
        why = f"{self.what} {value:.3g}, it fires from {self.threshold:.3g} on"
        pressure = min(value / self.threshold, MOST_PRESSURE)
        return Signal(self.name, value >= self.threshold, value, self.threshold, pressure, why)

    def reset(self) -> None:
        """Measure anew."""
        self.recent = []

    def state_dict(self) -> dict[str, Any]:
        """Return the last measurements."""
        return {"recent": list(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.recent = list(state["recent"])


class Uncertainty(_Level):
    """Fires while predictions are nearly uniform: see `predictive_entropy`. High only near random guessing."""

    name = "uncertainty"
    what = "the entropy of the predictions is, as a share of that of guessing,"
    missing = "no entropy was measured: there are no predicted classes yet, or the task has none"

    def observe(self, observation: Observation) -> None:
        """Take in an entropy."""
        self.take(observation.entropy)


class Benefit(_Level):
    """Fires while new hidden units would get a much larger gradient than the present weights have (GradMax)."""

    name = "benefit"
    what = "the largest gradient of new hidden units is, as a multiple of that of the present weights,"
    missing = "no benefit was measured: no feed-forward pair that trains was scored yet"

    def observe(self, observation: Observation) -> None:
        """Take in the scores of all feed-forward pairs together."""
        if observation.benefit is not None:
            self.take(total_benefit(observation.benefit))


class Saturation:
    """Fires while a layer uses nearly all of its width.

    Each layer is calibrated against its own early training. Noise fills every direction, so a layer counts only while
    it uses more of its width than it did at its lowest. And a layer of which more than a small share of the units has
    died since it was first measured has room without growth. A layer whose width changed is calibrated anew.
    """

    name = "saturation"

    def __init__(self, threshold: float = 0.75, dead_share: float = 0.05) -> None:
        """Start with nothing seen.

        Args:
            threshold: Effective rank over width from which on a layer is full.
            dead_share: Share of units that may have died in a layer that counts.
        """
        self.threshold, self.dead_share = threshold, dead_share
        self.early: dict[str, list[float]] = {}
        self.value: float | None = None
        self.layer = 0

    def observe(self, observation: Observation) -> None:
        """Take in a measurement of all layers."""
        if not observation.capacity:
            return
        self.value, self.layer = 0.0, 0
        seen: dict[str, list[float]] = {}
        for number, layer in enumerate(observation.capacity):
            key = f"{layer.kind}:{layer.where}"
            width, lowest, dead = self.early.get(key, [layer.width, math.inf, layer.dead])
            if width != layer.width:
                lowest, dead = math.inf, layer.dead
            if layer.share > lowest and layer.dead <= dead + self.dead_share and layer.share > self.value:
                self.value, self.layer = layer.share, number
            seen[key] = [layer.width, min(lowest, layer.share), dead]
        self.early = seen

    def fires(self) -> Signal:
        """Fire when the fullest layer that counts is at or above the bound."""
        if self.value is None:
            why = "no layer's rank was measured: none was found, or none yet"
            return Signal(self.name, False, None, self.threshold, None, why)
        if not self.value:
            why = "no layer uses more of its width than in early training"
        else:
            kind, _, name = list(self.early)[self.layer].partition(":")
            what = f"the hidden units of {name}" if kind == "feed_forward" else f"what {name} returns"
            why = f"the effective rank of {what} is {self.value:.0%} of the width, full is {self.threshold:.0%}"
        return Signal(
            self.name, self.value >= self.threshold, self.value, self.threshold, self.value / self.threshold, why
        )

    def reset(self) -> None:
        """Wait for a new measurement; the calibration of layers that did not grow stays."""
        self.value, self.layer = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the layers' calibration and the last value."""
        return {"early": {name: list(v) for name, v in self.early.items()}, "value": self.value, "layer": self.layer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.early = {name: list(values) for name, values in state["early"].items()}
        self.value, self.layer = state["value"], state["layer"]


class Arbiter:
    """Decides: enough triggers must agree, not too soon after the last time, and none twice for the same reason.

    Hysteresis: a trigger that led to an event or a rejected probe is disarmed, and its firing does not count, until at
    some later decision it does not fire and its pressure is at most `hysteresis`. The pressure is value / threshold,
    and for the plateau threshold / improvement. A trigger that has nothing to say stays disarmed.
    """

    def __init__(self, needed: int = 2, cooldown_steps: int = 200, hysteresis: float = 0.9) -> None:
        """Start at step 0, with all triggers armed; for the arguments see `GrowthConfig`."""
        self.needed, self.cooldown_steps, self.hysteresis = needed, cooldown_steps, hysteresis
        self.last, self.events = 0, 0
        self.disarmed: set[str] = set()

    def decide(self, step: int, signals: Sequence[Signal]) -> Decision:
        """Decide at a step; to be asked at every check, because triggers are armed again here.

        Args:
            step: Optimizer steps done.
            signals: What every trigger says.
        """
        for signal in signals:
            if signal.pressure is not None and not signal.fired and signal.pressure <= self.hysteresis:
                self.disarmed.discard(signal.name)
        asking = [s for s in signals if s.fired and s.name not in self.disarmed]
        measured = sum(s.value is not None for s in signals)
        why = (
            f"{len(asking)} of {len(signals)} triggers ask for growth, {self.needed} are needed"
            + (f" ({', '.join(s.name for s in asking)})" if asking else "")
            + (f"; {measured} have a value so far" if measured < self.needed else "")
        )
        since = step - self.last
        waiting = sorted(s.name for s in signals if s.fired and s.name in self.disarmed)
        if waiting:
            why += f"; {', '.join(waiting)} must be quiet once before counting again"
        agreed = len(asking) >= self.needed
        if agreed and since < self.cooldown_steps:
            why += f"; only {since} of {self.cooldown_steps} steps of cool-down have passed"
        return Decision(agreed and since >= self.cooldown_steps, step, tuple(signals), f"{why}.")

    def note(self, decision: Decision, grew: bool) -> None:
        """Take in what came of a decision to grow: an event, or a probe or an operator that was rejected."""
        self.last = decision.step
        self.events += grew
        self.disarmed |= {signal.name for signal in decision.signals if signal.fired}

    def scheduled(self, step: int) -> None:
        """Take in an event that a schedule asked for: the cool-down begins anew."""
        self.last = step
        self.events += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the last step, the number of events and the disarmed triggers."""
        return {"last": self.last, "events": self.events, "disarmed": sorted(self.disarmed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.last, self.events, self.disarmed = state["last"], state["events"], set(state["disarmed"])


def make_triggers(config: GrowthConfig) -> list[Trigger]:
    """Return the triggers that the settings name, in their order; none when nothing may grow by itself."""
    made: dict[str, Trigger] = {
        "plateau": Plateau(config.check_every_steps, config.patience, config.improvement),
        "uncertainty": Uncertainty(config.uncertainty_threshold),
        "saturation": Saturation(config.saturation_threshold, config.dead_share),
        "benefit": Benefit(config.benefit_threshold),
    }
    return [made[name] for name in config.triggers] if config.automatic else []


@torch.no_grad()
def predictive_entropy(task: str, logits: Tensor, labels: Tensor) -> float | None:
    """Return the mean entropy of the predictions over its largest value: 0 is certain, 1 is guessing.

    Args:
        task: One of `utils.adapters.TASKS`.
        logits: ``(..., classes)``; a single score answers yes or no.
        labels: ``(...)``; only answers whose label is not `IGNORED` count.

    Returns:
        From 0 to 1; None for tasks that predict numbers, and when no answer counts.
    """
    if task in REAL_VALUED:
        return None
    scores = logits.reshape(-1, logits.shape[-1])[labels.reshape(-1) != IGNORED].double()
    if not len(scores):
        return None
    if scores.shape[-1] == 1:
        scores = functional.pad(scores, (0, 1))
    entropies = torch.special.entr(scores.softmax(-1)).sum(-1)
    return float(entropies.mean()) / math.log(scores.shape[-1])
