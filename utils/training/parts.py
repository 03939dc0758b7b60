"""The parts of a run's state that training itself brings: counters, and Lightning's objects behind the protocol."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from utils.training.optimizer_migration import migrate_optimizer
from utils.training.sharding import divided_state
from utils.training.state import ModelChange, Undo

KERNELS = ("fused", "foreach", "capturable")
"""Settings of an optimizer that say how it computes, and not what."""


class LightningPart:
    """The optimizer, its schedule or the gradient scaler as a part of the run's state."""

    def __init__(self, name: str, target: Any, grouping: Callable[[], list[dict[str, Any]]] | None = None) -> None:
        """Wrap what has ``state_dict`` and ``load_state_dict``.

        Args:
            name: For messages.
            target: The object.
            grouping: Returns an optimizer's groups as a session that starts with the present model would make them.
        """
        self.name, self.target, self.grouping = name, target, grouping

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""
        return dict(self.target.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over; how an optimizer computes is of this machine, not of the one that wrote the state."""
        if isinstance(self.target, torch.optim.Optimizer):
            state = _regrouped(state, self.target)
            pairs = zip(state["param_groups"], self.target.param_groups, strict=True)
            groups = [{**saved, **{n: own[n] for n in KERNELS if n in own}} for saved, own in pairs]
            state = divided_state({**state, "param_groups": groups}, self.target)
        self.target.load_state_dict(state)

    def migrate(self, change: ModelChange) -> Undo | None:
        """Follow a change of the model; a gradient scaler has nothing that belongs to a parameter."""
        if isinstance(self.target, LambdaLR):
            return _schedule_followed(self.target)
        if isinstance(self.target, torch.optim.Optimizer):
            return migrate_optimizer(self.target, change, None if self.grouping is None else self.grouping())
        return None


def _schedule_followed(schedule: LambdaLR) -> Undo:
    """Let a schedule drive as many groups as its optimizer has; all of them have the same rate."""
    before = schedule.base_lrs, schedule.lr_lambdas
    count = len(schedule.optimizer.param_groups)
    schedule.base_lrs = [schedule.base_lrs[0]] * count
    schedule.lr_lambdas = [schedule.lr_lambdas[0]] * count

    def undo() -> None:
        schedule.base_lrs, schedule.lr_lambdas = before

    return undo


def _regrouped(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state in the groups of another that holds the same parameters by name.

    Which parameters decay may be decided otherwise now than by the version that wrote the state.
    """
    own = [group.get("param_names") for group in optimizer.param_groups]
    saved = [group.get("param_names") for group in state["param_groups"]]
    if own == saved or None in own or None in saved:
        return state
    numbers = {
        name: number
        for group in state["param_groups"]
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    if sorted(numbers) != sorted(name for names in own for name in names or ()):
        return state
    groups: list[dict[str, Any]] = []
    moved: dict[int, Any] = {}
    for group in optimizer.param_groups:
        names: list[str] = group["param_names"]
        first = sum(len(earlier["params"]) for earlier in groups)
        # The rate and what else changes is the same in all groups; only the decay is a group's own.
        kept = {**state["param_groups"][0], "weight_decay": group["weight_decay"], "param_names": names}
        groups.append({**kept, "params": list(range(first, first + len(names)))})
        moved |= {first + i: state["state"][numbers[n]] for i, n in enumerate(names) if numbers[n] in state["state"]}
    return {**state, "state": moved, "param_groups": groups}


class Progress:
    """The counters of a run: steps, batches, sessions, the losses since the last row of metrics, the best loss.

    Losses are kept by step, not by batch: a step is the same samples whatever a session cuts it into.


    Attributes:
        step: Optimizer steps done.
        batches: Batches of this process done.
        sessions: How often the run was started or continued.
        seconds: Time spent, over all sessions.
        pending: Mean losses of the steps since the last row of metrics.
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
