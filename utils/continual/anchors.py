"""Weights on springs: each has an anchor and an importance, and is pulled back as strongly as it matters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils.continual.learner import Learner
from utils.training.state import ModelChange, Undo

Tensors = dict[str, Tensor]


def wide(parameter: Tensor) -> torch.dtype:
    """Return the precision in which something about a weight is summed up, at least float32."""
    return torch.promote_types(parameter.dtype, torch.float32)


def gradients_for(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return the gradients of a step; a parameter that took no part in it gets one of zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


class Anchors:
    """The quadratic ``1/2 strength sum_i importance_i (theta_i - anchor_i)^2``; two numbers for each weight.

    Attributes:
        importance: By the parameter's name, of its shape, at least float32.
        anchor: Likewise.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.importance: Tensors = {}
        self.anchor: Tensors = {}
        self._aligned: tuple[list[nn.Parameter], list[Tensor], list[Tensor]] | None = None

    def place(self, importance: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> None:
        """Take other importances and anchors, by the parameters' names."""
        self.importance, self.anchor, self._aligned = dict(importance), dict(anchor), None

    @torch.no_grad()
    def add(self, importance: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Add another quadratic around the present weights.

        The sum of quadratics is one again but for a constant: the importances add up, and the anchor is their weighted
        mean. ``sum_k F_k (theta - a_k)^2 = F (theta - a)^2 + constant`` with ``F = sum_k F_k`` and
        ``a = sum_k F_k a_k / F``.

        Args:
            importance: Of each parameter, by name, no entry negative.
            parameters: The weights around which it was found.
        """
        self._aligned = None
        for name, new in importance.items():
            present = parameters[name].detach().to(new)
            old = self.importance.get(name)
            if old is None:
                self.importance[name], self.anchor[name] = new.clone(), present.clone()
                continue
            total = old.to(new) + new
            share = torch.where(total > 0, new / total, torch.ones_like(new))
            self.importance[name], self.anchor[name] = total, torch.lerp(self.anchor[name].to(new), present, share)

    @torch.no_grad()
    def pull(self, learner: Learner, strength: float) -> None:
        """Add the quadratic's gradient, ``strength importance (theta - anchor)``, to that of a step."""
        if not self.importance or not strength:
            return
        parameters, importance, anchor = self._aligned or self._align(learner)
        gradients = gradients_for(parameters)
        stretched = torch._foreach_sub([parameter.detach() for parameter in parameters], anchor)
        if all(gradient.dtype == one.dtype for gradient, one in zip(gradients, importance, strict=True)):
            torch._foreach_addcmul_(gradients, stretched, importance, value=strength)
        else:
            torch._foreach_mul_(stretched, importance)
            torch._foreach_add_(gradients, stretched, alpha=strength)

    def _align(self, learner: Learner) -> tuple[list[nn.Parameter], list[Tensor], list[Tensor]]:
        """Put the weights, importances and anchors in one order, each on its weight's device."""
        parameters = {name: p for name, p in learner.parameters.items() if name in self.importance}
        for kept in (self.importance, self.anchor):
            kept.update({name: kept[name].to(p.device) for name, p in parameters.items()})
        self._aligned = (
            list(parameters.values()), [self.importance[n] for n in parameters], [self.anchor[n] for n in parameters]
        )  # fmt: skip
        return self._aligned

    def state_dict(self) -> dict[str, Any]:
        """Return both."""
        return {"importance": dict(self.importance), "anchor": dict(self.anchor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.place(*({name: v.clone() for name, v in state[kept].items()} for kept in ("importance", "anchor")))

    def migrate(self, change: ModelChange) -> Undo:
        """Follow a change of the model: what is new is held by nothing; a weight made larger matters less for it."""
        before = self.importance, self.anchor
        importance, anchor = {}, {}
        for name, parameter in change.parameters.items():
            how = change.of(name)
            if how.source not in self.importance:
                continue
            moved = how.carried(self.importance[how.source], how.factor**-2)
            if moved.shape == parameter.shape:
                place = self.anchor[how.source]
                importance[name], anchor[name] = moved, how.other_values(place, parameter.to(place))
        self.place(importance, anchor)
        return lambda: self.place(*before)

    @property
    def stored_floats(self) -> int:
        """How many numbers it holds."""
        return sum(one.numel() for kept in (self.importance, self.anchor) for one in kept.values())
