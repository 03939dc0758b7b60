"""One growth event, whole or not at all: the model, every part of the run that must follow, and the certificate."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from utils.adapters import ModelAdapter
from utils.growth.certificate import DOUBLE_BOUND, Certificate, answers, certify
from utils.growth.distillation import Lesson, teacher_of
from utils.growth.edits import GrowthError, GrowthRefusedError, Plan
from utils.growth.lineage import GrowthEvent
from utils.growth.planning import forget_sizes
from utils.growth.surgery import Surgery
from utils.runtime.seeding import isolated_streams
from utils.training.state import MigrationError, ModelChange, Undo

TOLERANCE = 1e-5
"""Largest change of an answer, as a share of the answers' size, in the model's own precision."""
TOLERANCES = {"torch.float32": TOLERANCE, "torch.float64": 1e-9, "torch.bfloat16": 2e-2, "torch.float16": 5e-3}
"""By precision; half precision rounds longer sums to other neighbours."""


class GrowthUndoneError(GrowthError):
    """A growth event was made, measured and taken back.

    Attributes:
        certificate: What was measured; None when a part of the run could not follow.
    """

    def __init__(self, found: str, expected: str, action: str, certificate: Certificate | None = None) -> None:
        """Say what happened."""
        self.certificate = certificate
        super().__init__(found, expected, action)


@dataclass(frozen=True)
class Grown:
    """A growth event that was made."""

    event: GrowthEvent
    """Its record."""
    change: ModelChange
    """What the parts of the run followed."""
    undo: Undo
    """Takes it back: the very same parameters, optimizer state and numbers; good until the next training step."""


def grow_by(
    adapter: ModelAdapter,
    plan: Plan,
    inputs: Mapping[str, Any],
    loss: Callable[[], float] | None = None,
    migrate: Callable[[ModelChange], Undo] | None = None,
    seed: int = 0,
    step: int = 0,
    mean: bool = False,
    tolerance: float | None = None,
    why: str = "asked for",
    signals: tuple[dict[str, Any], ...] = (),
    agree: Callable[[bool], bool] = bool,
    teach: Callable[[ModelAdapter], Lesson] | None = None,
    number: int = 0,
) -> Grown:
    """Let a model grow, and everything that remembers something about it; or leave all as it was.

    Args:
        adapter: The model; it stays the same object.
        plan: See `utils.growth.planning.plan_growth`.
        inputs: A real batch, as keyword arguments of forward.
        loss: Returns the mean loss of a batch; called in eval mode without gradients.
        migrate: Lets the parts of a run follow, such as `RunState.migrate`.
        seed: Seed of what is drawn.
        step: Optimizer steps done.
        mean: New entries of second moments are the mean of the tensor's; zero otherwise.
        tolerance: Largest change of an answer as a share of their size; None takes that of the model's precision.
        why: For the lineage.
        signals: What the triggers said, for the lineage.
        agree: Tells whether any of the processes that train together says yes.
        teach: Distils from the model before, given as an adapter of a copy; needed by a plan that is approximate.
        number: Of the event in the lineage, so that two at one step draw different numbers.

    Raises:
        GrowthUndoneError: A part cannot follow, or the function is not kept; everything is as it was.
        GrowthRefusedError: A parameter has hooks or is of a kind of its own, or there is nothing to distil from.
        LineageError: The plan does not fit the model.
    """
    started = time.perf_counter()
    approximate = plan.promise == "approximate"
    if approximate and (teach is None or loss is None):
        raise GrowthRefusedError(
            f"{plan.describe()} would change the function.",
            "Expected data to distil from.",
            "Use utils.train with growth={'approximate': True, ...}, or grow another part.",
        )
    teacher = teacher_of(adapter) if approximate else None
    values = {name: p.detach().clone() for name, p in adapter.module.named_parameters()} if approximate else {}
    before, parameters = answers(adapter, inputs, loss), adapter.num_parameters
    # A model in half precision may hand on its answer in float32, and the other way round.
    rounding = max(TOLERANCES.get(str(dtype), TOLERANCE) for dtype in (adapter.real_dtype, before.logits.dtype))
    bound = rounding if tolerance is None else tolerance
    # What a norm's gain and epsilon change is rounded to the model's precision, which float64 shows as it is; where
    # nothing but sums is cut otherwise, no tolerance excuses an operator's own fault.
    double_bound = plan.double_bound if plan.double_bound <= DOUBLE_BOUND else max(plan.double_bound, bound)
    surgery = Surgery(adapter.module, plan, seed, step, mean, number)
    followed: Undo | None = None

    def undo() -> None:
        if followed is not None:
            followed()
        surgery.undo()
        forget_sizes(adapter)
        with torch.no_grad():
            for name, value in values.items():
                adapter.module.get_parameter(name).copy_(value)

    try:
        forget_sizes(adapter)
        with isolated_streams():
            if migrate is not None:
                followed = migrate(surgery.change)
            lesson = teach(teacher) if teacher is not None and teach is not None else None
            after = answers(adapter, inputs, loss, before.double is not None)
        certificate = certify(before, after, bound, plan.outputs, double_bound)
        if lesson is not None:
            # What was distilled is measured by what it costs, not by single answers.
            certificate = replace(certificate, passed=lesson.learned, bound=None, distilled=lesson.steps)
    except MigrationError as error:
        undo()
        raise GrowthUndoneError(
            f"{plan.describe()} was taken back: {error.found}", "Expected every part of the run to follow.",
            "Use AdamW or another optimizer that keeps its state by parameter, or train without growth.",
        ) from error  # fmt: skip
    except BaseException:
        undo()
        raise
    if agree(not certificate.passed):
        undo()
        raise GrowthUndoneError(
            f"{plan.describe()} was taken back: {certificate.describe()}.",
            "Expected the loss to come back within a hundredth."
            if approximate
            else f"Expected no answer to change by more than {bound:.0e} of the answers' size.",
            "Grow another part, or allow an approximate step with a higher tolerance.",
            certificate,
        )
    if plan.promise == "exact" and not (certificate.equal and not certificate.double_difference):
        # The lineage says what was measured: the sums were cut otherwise after all.
        plan = replace(plan, promise="bounded")
    event = GrowthEvent(
        step, seed, plan, certificate, why, parameters, adapter.num_parameters, time.perf_counter() - started, signals
    )
    return Grown(event, surgery.change, undo)
