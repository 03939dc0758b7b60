"""Averaged gradient episodic memory: no step may raise the loss of remembered samples.

Chaudhry et al., Efficient Lifelong Learning with A-GEM (arXiv:1812.00420), equation 11: where the gradient g points
against the gradient r of a batch drawn from the memory (g·r < 0), it becomes g - (g·r / r·r) r, the nearest one that
does not; any other stays as it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils.continual.learner import Learner
from utils.continual.method import Method
from utils.runtime.errors import SeedbedError

LARGEST_SCALE = 2.0**16
"""The reference loss is multiplied by this in float16, whose smallest numbers its gradient would fall below."""


class ReferenceError(SeedbedError):
    """Remembered samples give no gradient that could be compared with."""


class AveragedGem(Method):
    """Take out of each gradient what would raise the loss of remembered samples.

    The reference gradient comes from as many samples of earlier tasks as a batch has new ones; of a stream without
    boundaries from any that are remembered. It costs one more pass forward and backward.
    """

    name = "agem"
    projects = True
    remembers = True
    policy = "reservoir"

    def __init__(self) -> None:
        """Start with the largest scale; it is halved where float16 overflows."""
        self.scale = LARGEST_SCALE
        self._count = 0

    def extra_loss(self, learner: Learner, batch: dict[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor | None:
        """Note how many samples a batch has; nothing is added."""
        self._count = len(labels)
        return None

    def change_gradient(self, learner: Learner) -> None:
        """Project the gradient of the step."""
        batch = self._earlier(learner, learner.settings.replayed or self._count)
        if batch is not None:
            parameters = list(learner.parameters.values())
            project(parameters, self._reference(learner, batch, parameters))

    def _earlier(self, learner: Learner, count: int) -> dict[str, Tensor] | None:
        """Draw remembered samples of earlier tasks; None while there are none."""
        if not learner.settings.boundaries:
            return learner.remembered(count) if len(learner.memory) else None
        if not learner.task.number:
            return None
        slots = learner.memory.slots
        slots = slots[learner.memory.about(slots)["times"] < learner.ends[learner.task.number - 1]]
        if not len(slots):
            return None
        generator = torch.Generator().manual_seed(learner.number("earlier tasks"))
        chosen = torch.randperm(len(slots), generator=generator)[:count]
        return learner.batch_of(learner.memory.read(slots[chosen]))

    def _reference(
        self, learner: Learner, batch: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]
    ) -> Sequence[Tensor | None]:
        """Return the gradient of remembered samples, but for a factor: its length does not matter."""
        kind = learner.adapter.device.type
        while True:
            with learner.precision():
                half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
                loss = learner.loss(batch)[0]
            found = torch.autograd.grad(loss * self.scale if half else loss, parameters, allow_unused=True)
            if not half or all(bool(one.isfinite().all()) for one in found if one is not None):
                return found
            self.scale /= 2
            if self.scale < 1:
                raise ReferenceError(
                    f"The gradient of remembered samples is not finite in float16 at step {learner.step + 1}, whatever "
                    "its scale.",
                    "Expected a gradient that the present one can be compared with.",
                    "Set TrainingConfig.precision to bf16-mixed or 32-true, or lower the learning rate.",
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the scale."""
        return {"scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the scale."""
        self.scale = state["scale"]


@torch.no_grad()
def project(parameters: Sequence[nn.Parameter], reference: Sequence[Tensor | None]) -> None:
    """Change gradients in place so that their product with a reference is not negative.

    Args:
        parameters: With their gradients; one without gets one where the reference has some and a part of it is due.
        reference: A gradient of each; None is zero.
    """
    pairs = [(p, r) for p, r in zip(parameters, reference, strict=True) if r is not None]
    for parameter, wanted in pairs:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(wanted)
    if not pairs:
        return
    gradients: list[Tensor] = [p.grad for p, _ in pairs if p.grad is not None]
    along = [r for _, r in pairs]
    # A product of two vectors reads each once; the foreach form would write a third.
    each = [torch.dot(g.reshape(-1), r.reshape(-1)) for g, r in zip(gradients, along, strict=True)]
    product = torch.stack(each).sum()
    if product.is_cuda:
        # Decided on the device, without waiting for it.
        length = torch.stack(torch._foreach_norm(along)).square().sum()
        factor = torch.where(product < 0, product / length, torch.zeros_like(product))
        torch._foreach_mul_(along, factor)
        torch._foreach_sub_(gradients, along)
    elif float(product) < 0:
        length = torch.stack([torch.dot(r.reshape(-1), r.reshape(-1)) for r in along]).sum()
        torch._foreach_add_(gradients, along, alpha=-float(product / length))
