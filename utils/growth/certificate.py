"""What a growth event did to the function, measured on real batches.

Two answers are compared. In the model's own precision: are they equal, bit for bit, and how far apart otherwise? And,
where the model is small enough, in float64 on copies on the CPU, where rounding is out of the way and a wrong operator
shows. Both are taken in eval mode: dropout draws other masks for a larger model and is exact in expectation only.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.growth.scratch import changed_by

DOUBLE_PARAMETERS = 20_000_000
"""Models up to this size are compared in float64 too."""
SAMPLES = 4
"""Samples of a batch whose answers are compared."""
DOUBLE_BOUND = 1e-9
"""Largest change in float64, as a share of the answers' size, of what is exact but for rounding."""


@dataclass(frozen=True)
class Answers:
    """What a model answers to a batch."""

    logits: Tensor
    """Of the first samples."""
    double: Tensor | None
    """The same in float64; None where it was not computed."""
    loss: float | None
    """Mean loss of the batch in nats; None where there are no labels."""


@dataclass(frozen=True)
class Certificate:
    """How a grown model compares with the one before."""

    passed: bool
    """It is within the bounds."""
    equal: bool
    """All answers are equal, bit for bit."""
    difference: float
    """Largest change of an answer in the model's own precision, as a share of their size."""
    double_difference: float | None
    """The same in float64; None where it was not measured."""
    bound: float | None
    """What the change had to stay below; None where the loss decided."""
    loss_before: float | None
    """Loss of the batch before, in nats; None where there are no labels."""
    loss_after: float | None
    """After."""
    samples: int
    """Samples whose answers were compared."""
    distilled: int | None = None
    """Steps of distillation from the model before; None where the function was to be kept."""

    @property
    def jump(self) -> float | None:
        """By how much the loss rose, in nats; None where it was not measured."""
        if self.loss_before is None or self.loss_after is None:
            return None
        return self.loss_after - self.loss_before

    def describe(self) -> str:
        """Say it in one line."""
        exact = "bit-equal" if self.equal else f"largest change {self.difference:.1e} of the answers' size"
        double = "" if self.double_difference is None else f", {self.double_difference:.1e} in float64"
        if self.distilled is not None:
            bound = f"; {self.distilled} steps of distillation"
        else:
            bound = f" (bound {self.bound:.0e})"
        loss = "" if self.jump is None else f"; loss {self.loss_before:.6f} -> {self.loss_after:.6f}"
        return f"{'kept' if self.passed else 'NOT KEPT'}: {exact}{double}{bound}{loss}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Certificate":
        """Read what `to_dict` returned."""
        return cls(**values)


def answers(adapter: ModelAdapter, inputs: Mapping[str, Any], loss: Any = None) -> Answers:
    """Let a model answer a batch; it comes back as it was.

    Args:
        adapter: The model.
        inputs: Keyword arguments of forward, batch first.
        loss: Returns the batch's mean loss; called in eval mode without gradients. None leaves it out.
    """
    few = {
        name: value[:SAMPLES] if isinstance(value, Tensor) and value.dim() else value for name, value in inputs.items()
    }
    with adapter.isolated():
        logits = adapter.logits(few).detach().clone()
        measured = None if loss is None else float(loss())
        double = _in_double(adapter, few) if adapter.num_parameters <= DOUBLE_PARAMETERS else None
    return Answers(logits, double, measured)


def certify(before: Answers, after: Answers, bound: float, outputs: int | None = None) -> Certificate:
    """Compare a model with the one before.

    Args:
        before: What it answered.
        after: What it answers now.
        bound: Largest change, as a share of the answers' size, in the model's own precision.
        outputs: Compare so many entries of the last axis, where there are more of them now.
    """
    new = after.logits if outputs is None else after.logits[..., :outputs]
    difference = changed_by(before.logits, new)
    double = None
    if before.double is not None and after.double is not None:
        double = changed_by(before.double, after.double, outputs)
    equal = before.logits.shape == new.shape and torch.equal(before.logits, new)
    # Rounding grows with depth; in float64 what is left is the operator's own fault, or a norm's epsilon.
    passed = difference <= bound and (double is None or double <= max(bound, DOUBLE_BOUND))
    return Certificate(passed, equal, difference, double, bound, before.loss, after.loss, len(before.logits))


def _in_double(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the answer of a copy in float64 on the CPU; None where it does not compute in it."""
    twin = copy.copy(adapter)
    try:
        twin.module = copy.deepcopy(adapter.module).to("cpu").double().eval()
        moved = {
            name: value.to("cpu", torch.float64 if value.is_floating_point() else value.dtype)
            if isinstance(value, Tensor)
            else value
            for name, value in inputs.items()
        }
        output = twin.logits(moved)
    except Exception:
        return None
    return output if output.dtype == torch.float64 else None
