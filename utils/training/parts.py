"""The parts of a run's state that training itself brings: counters, and Lightning's objects behind the protocol."""

from typing import Any

import torch
from torch import Tensor

from utils.training.state import MigrationError, ModelChange

KERNELS = ("fused", "foreach", "capturable")
"""Settings of an optimizer that say how it computes, and not what."""


class LightningPart:
    """The optimizer, its schedule or the gradient scaler as a part of the run's state."""

    def __init__(self, name: str, target: Any) -> None:
        """Wrap what has ``state_dict`` and ``load_state_dict``."""
        self.name, self.target = name, target

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""
        return dict(self.target.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over; how an optimizer computes is of this machine, not of the one that wrote the state."""
        if isinstance(self.target, torch.optim.Optimizer):
            pairs = zip(state["param_groups"], self.target.param_groups, strict=True)
            groups = [{**saved, **{n: own[n] for n in KERNELS if n in own}} for saved, own in pairs]
            state = {**state, "param_groups": groups}
        self.target.load_state_dict(state)

    def migrate(self, change: ModelChange) -> None:
        """Refuse: this version knows no operator that changes a model."""
        raise MigrationError(f"the {self.name} cannot follow a changed model in this version")


class Progress:
    """The counters of a run: steps, batches, sessions, the losses since the last row of metrics, the best loss.

    Attributes:
        step: Optimizer steps done.
        batches: Batches of this process done.
        sessions: How often the run was started or continued.
        seconds: Time spent, over all sessions.
        pending: Losses of the batches since the last row of metrics.
        measured: Held-out loss at `measured_step`, nan before the first.
        measured_step: Step of the last measurement.
        best: The lowest held-out loss so far.
        since_best: Measurements since then.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.step, self.batches, self.sessions = 0, 0, 0
        self.seconds = 0.0
        self.pending: list[Tensor] = []
        self.measured, self.measured_step = float("nan"), -1
        self.best, self.since_best = float("inf"), 0

    def note_measurement(self, loss: float) -> None:
        """Remember a held-out loss."""
        self.measured, self.measured_step = loss, self.step
        if loss < self.best:
            self.best, self.since_best = loss, 0
        else:
            self.since_best += 1

    @property
    def loss_now(self) -> float | None:
        """The held-out loss of the present weights, if it was measured."""
        return self.measured if self.measured_step == self.step else None

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        pending = torch.stack([loss.float() for loss in self.pending]) if self.pending else torch.zeros(0)
        names = ("step", "batches", "sessions", "seconds", "measured", "measured_step", "best", "since_best")
        return {**{name: getattr(self, name) for name in names}, "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting."""
        for name, value in state.items():
            setattr(self, name, list(value) if name == "pending" else value)

    def migrate(self, change: ModelChange) -> None:
        """A change of the model does not change what was counted."""
