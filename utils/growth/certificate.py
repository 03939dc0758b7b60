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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.adapters import ModelAdapter
from utils.growth.edits import Plan
from utils.growth.scratch import changed_by

DOUBLE_PARAMETERS = 20_000_000
"""Models up to this size are compared in float64 too."""
SAMPLES = 4
"""Samples of a batch whose answers are compared."""
DOUBLE_BOUND = Plan.double_bound
"""Largest change in float64, as a share of the answers' size, of what is exact but for rounding."""
EPSILON_BOUND = 1e-5
"""The same where a norm's epsilon stays, or where the model rounds to float32 on its way."""


@dataclass(frozen=True)
class Answers:
    """What a model answers to a batch."""

    logits: Tensor
    """Of the first samples."""
    double: Tensor | None
    """The same in float64; None where it was not computed."""
    loss: float | None
    """Mean loss of the batch in nats; None where there are no labels."""
    rounded: bool = False
    """The answer in float64 went through a narrower precision, such as a norm that computes in float32."""


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
    double_bound: float | None = None
    """What the change in float64 had to stay below; None where it was not measured."""

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
        if self.double_bound is not None and not (self.double_difference or 0.0) <= self.double_bound:
            double += f" where {self.double_bound:.0e} is the bound"
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


def answers(adapter: ModelAdapter, inputs: Mapping[str, Any], loss: Any = None, double: bool | None = None) -> Answers:
    """Let a model answer a batch; it comes back as it was.

    Args:
        adapter: The model.
        inputs: Keyword arguments of forward. Those as long as the main input are batches, and cut to a few samples.
        loss: Returns the batch's mean loss; called in eval mode without gradients. None leaves it out.
        double: Whether to answer in float64 too; None does so for models up to `DOUBLE_PARAMETERS`.
    """
    main = inputs.get(adapter.main_input)
    size = len(main) if isinstance(main, Tensor) and main.dim() else None
    few = {
        name: value[:SAMPLES] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
        for name, value in inputs.items()
    }
    double = adapter.num_parameters <= DOUBLE_PARAMETERS if double is None else double
    rounding = _Rounding()
    with adapter.isolated():
        logits = adapter.logits(few).detach().clone()
        measured = None if loss is None else float(loss())
        exact = _in_double(adapter, few, rounding) if double else None
    return Answers(logits, exact, measured, exact is not None and rounding.seen)


def certify(
    before: Answers, after: Answers, bound: float, outputs: int | None = None, double_bound: float = DOUBLE_BOUND
) -> Certificate:
    """Compare a model with the one before.

    Args:
        before: What it answered.
        after: What it answers now.
        bound: Largest change, as a share of the answers' size, in the model's own precision.
        outputs: Compare so many entries of the last axis, where there are more of them now.
        double_bound: Largest change in float64; more is allowed to a model that rounds to float32 on its way. A model
            that answered in float64 and no longer does has not kept its function.
    """
    new = after.logits if outputs is None else after.logits[..., :outputs]
    difference = changed_by(before.logits, new)
    double = None
    if before.double is not None:
        double = float("inf") if after.double is None else changed_by(before.double, after.double, outputs)
        double_bound = max(double_bound, EPSILON_BOUND) if before.rounded or after.rounded else double_bound
    equal = before.logits.shape == new.shape and torch.equal(before.logits, new)
    # Rounding grows with depth; in float64 what is left is the operator's own fault, or a norm's epsilon.
    passed = difference <= bound and (double is None or double <= double_bound)
    return Certificate(
        passed, equal, difference, double, bound, before.loss, after.loss, len(before.logits),
        double_bound=None if double is None else double_bound,
    )  # fmt: skip


class _Rounding(TorchDispatchMode):
    """Notes whether anything in float64 is made into a narrower real number.

    There a difference of a last place becomes one of float32's last place, now and then, whatever the operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.seen and any(_is_narrow(made) for made in tree_leaves(output)):
            given = tree_leaves((args, kwargs or {}))
            self.seen = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in given)
        return output


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _in_double(adapter: ModelAdapter, inputs: Mapping[str, Any], rounding: _Rounding) -> Tensor | None:
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
        with rounding:
            output = twin.logits(moved)
    except Exception:
        return None
    return output if output.dtype == torch.float64 else None
