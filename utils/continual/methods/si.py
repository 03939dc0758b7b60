"""Synaptic intelligence: what a weight did for the loss while it moved is how much it matters.

Zenke et al., Continual Learning Through Synaptic Intelligence (arXiv:1703.04200): each step adds to a weight's path
integral ``omega = -sum gradient * change`` (equation 3, the share of the loss's fall that is its own). After a task its
importance grows by ``omega / (Delta^2 + xi)`` with the way Delta that it went in the task and the damping xi = 0.1
(equation 5); the loss gets ``c sum_i Omega_i (theta_i - theta~_i)^2`` around the weights at the end of the last task
(equation 4).

The gradient is that of the loss before this penalty is added and before clipping; the change is what the optimizer made
of it. Importances below zero, of weights that moved uphill all in all, are set to zero: they would push weights away.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils.continual.anchors import Anchors, Tensors, gradients_for, wide
from utils.continual.learner import Learner
from utils.continual.method import Method
from utils.training.state import ModelChange, Undo

DAMPING = 0.1


class SI(Method):
    """Pull each weight back to where the last task left it, as strongly as it helped the loss on its way.

    Attributes:
        anchors: Where weights were at the end of the last task, and how much they matter.
        path: The path integral of each weight in the present task, in nats.
        tasks: How many have ended.
    """

    name = "si"
    holds = True
    needs_boundaries = True
    penalty = 1.0

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.anchors = Anchors()
        self.path: Tensors = {}
        self.tasks = 0
        self._forget_step()

    def _forget_step(self) -> None:
        """Forget the order of the weights and the step in progress."""
        self._live: list[nn.Parameter] = []
        self._paths: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._open = False

    def begin_task(self, learner: Learner) -> None:
        """Note where the weights are when the first task begins."""
        if not self.path:
            self._begin_path(learner)
            places = {name: p.detach().to(wide(p), copy=True) for name, p in learner.parameters.items()}
            self.anchors.place({name: torch.zeros_like(one) for name, one in places.items()}, places)

    def _begin_path(self, learner: Learner) -> None:
        self.path = {name: torch.zeros_like(p, dtype=wide(p)) for name, p in learner.parameters.items()}
        self._forget_step()

    @torch.no_grad()
    def change_gradient(self, learner: Learner) -> None:
        """Note the gradient and the weights before the step, and add the penalty's gradient."""
        if not self._live:
            self._align(learner)
        gradients = gradients_for(self._live)
        torch._foreach_copy_(self._gradients, gradients)
        torch._foreach_copy_(self._weights, [parameter.detach() for parameter in self._live])
        self._open = True
        if self._live and self._live[0].device.type != "cpu":
            # A gradient scaler leaves out a step whose gradient overflowed: infinity times no change is no number.
            for gradient in self._gradients:
                gradient.nan_to_num_(0.0, 0.0, 0.0)
        if self.tasks:
            strength = learner.settings.penalty
            self.anchors.pull(learner, 2 * (self.penalty if strength is None else strength))

    def _align(self, learner: Learner) -> None:
        """Put the weights, their paths and the copies of a step in one order, on the weights' devices."""
        # What has only begun to be trained, such as what grew, has an empty path.
        self.path = {
            name: self.path[name].to(p.device) if name in self.path else torch.zeros_like(p, dtype=wide(p))
            for name, p in learner.parameters.items()
        }
        self._live, self._paths = list(learner.parameters.values()), list(self.path.values())
        self._gradients = [torch.empty_like(path) for path in self._paths]
        self._weights = [torch.empty_like(path) for path in self._paths]

    @torch.no_grad()
    def after_step(self, learner: Learner) -> None:
        """Add the step to the path."""
        if self._open:
            torch._foreach_sub_(self._weights, [parameter.detach() for parameter in self._live])
            torch._foreach_addcmul_(self._paths, self._gradients, self._weights)
            self._open = False

    @torch.no_grad()
    def end_task(self, learner: Learner) -> None:
        """Turn the path into importance, and begin another from here."""
        importance, places = {}, {}
        for name, parameter in learner.parameters.items():
            path = self.path[name].to(parameter.device)
            places[name] = parameter.detach().to(path, copy=True)
            start, known = (kept.get(name) for kept in (self.anchors.anchor, self.anchors.importance))
            way = torch.zeros_like(path) if start is None else places[name] - start.to(path)
            gained = path / (way.square() + DAMPING)
            importance[name] = (gained if known is None else known.to(path) + gained).clamp_(min=0)
        self.anchors.place(importance, places)
        self.tasks += 1
        self._begin_path(learner)

    def state_dict(self) -> dict[str, Any]:
        """Return paths, importances and anchors."""
        return {"anchors": self.anchors.state_dict(), "path": dict(self.path), "tasks": self.tasks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.anchors.load_state_dict(state["anchors"])
        self.path = {name: path.clone() for name, path in state["path"].items()}
        self.tasks = state["tasks"]
        self._forget_step()

    def migrate(self, change: ModelChange) -> Undo:
        """Let all three follow; what is new begins with an empty path where it is."""
        undo_anchors = self.anchors.migrate(change)
        before = self.path, self._live, self._paths, self._gradients, self._weights, self._open
        path = dict(self.path)
        if self._open:
            # The step that has just been made, with the weights that it made.
            for name, gradient, weight in zip(path, self._gradients, self._weights, strict=True):
                path[name] = torch.addcmul(path[name], gradient, weight - change.before[name].detach())
        self.path = {}
        for name, parameter in change.parameters.items():
            how = change.of(name)
            if not parameter.requires_grad:
                continue
            empty = torch.zeros_like(parameter, dtype=wide(parameter))
            moved = how.carried(path[how.source]) if how.source in path else empty
            self.path[name] = moved if moved.shape == parameter.shape else empty
            if name not in self.anchors.anchor:
                place = parameter.detach().to(wide(parameter), copy=True)
                self.anchors.anchor[name], self.anchors.importance[name] = place, torch.zeros_like(place)
        self._forget_step()

        def undo() -> None:
            undo_anchors()
            self.path, self._live, self._paths, self._gradients, self._weights, self._open = before

        return undo

    @property
    def stored_floats(self) -> int:
        """How many numbers it keeps between steps: three for each trained weight."""
        return self.anchors.stored_floats + sum(path.numel() for path in self.path.values())
