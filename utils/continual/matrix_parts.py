"""What an accuracy matrix is made of: costs of tasks, scores measured during them, and the checks of both."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

from utils.runtime.errors import SeedbedError

NAN = math.nan


class MatrixError(SeedbedError):
    """An accuracy matrix that contradicts itself, or a file that does not hold one."""


@dataclass(frozen=True)
class TaskCost:
    """What a task took, and what was kept at its end; None where it was not measured."""

    seconds: float | None = None
    """Seconds of training on it."""
    stored_samples: int | None = None
    """Samples of tasks so far that are kept, at its end."""
    stored_floats: int | None = None
    """Numbers kept beside the model at its end: Fisher values, anchors, logits."""
    parameters: int | None = None
    """Parameters of the model at its end."""
    training_flops: float | None = None
    """Floating-point operations of training on it."""
    cpu_seconds: float | None = None
    """Seconds of all threads of the process while it was trained on."""

    def __post_init__(self) -> None:
        """Check that all are numbers from 0."""
        for name, value in asdict(self).items():
            if value is not None and not (is_number(value) and math.isfinite(value) and value >= 0):
                raise MatrixError(
                    f"TaskCost.{name} is {value!r}.", "Expected a number from 0.", "Leave out what was not measured."
                )


@dataclass(frozen=True)
class Moment:
    """Scores measured in the middle of a task."""

    step: int
    """Optimizer step of the whole stream."""
    task: int
    """Number of the task that is being trained, from 0."""
    scores: tuple[float, ...]
    """Scores on tasks 0, 1, ...; NaN where not measured. May end early: the old tasks are those that matter."""


@dataclass(frozen=True)
class Drop:
    """How far the score on an old task fell while a later task was trained."""

    old: int
    """Number of the old task."""
    during: int
    """Number of the task that was trained."""
    step: int | None
    """Where it was worst; None at the end of a task whose step is not known."""
    before: float
    """Score at the end of the task before."""
    worst: float
    """Worst score within the task, its end included."""
    after: float
    """Score at the end of the task."""
    size: float
    """How much worse than before, 0 or more."""
    recovered: float
    """How far the score had come back from its worst at the end of the task."""


def checked_scores(values: Any, what: str, tasks: int | None, shares: bool) -> tuple[float, ...]:
    """Return scores as a tuple of floats.

    Args:
        values: The scores.
        what: What they are, for the message.
        tasks: How many there must be; None for any number.
        shares: They must lie between 0 and 1.

    Raises:
        MatrixError: They are not that.
    """
    scores, name = sequence(values, what), first_up(what)
    if tasks is not None and len(scores) != tasks:
        raise MatrixError(
            f"{name} has {len(scores)} scores for {tasks} tasks.",
            "Expected a score for each task of the stream.",
            "Put NaN where a task was not measured.",
        )
    for value in scores:
        if not is_number(value):
            raise MatrixError(
                f"{name} holds {value!r}.",
                "Expected numbers, NaN where a task was not measured.",
                "Turn tensors into numbers with tolist().",
            )
        if shares and not (math.isnan(value) or 0 <= value <= 1):
            raise MatrixError(
                f"{name} holds the accuracy {value!r}.",
                "Expected shares from 0 to 1.",
                "Divide percentages by 100, or name another unit.",
            )
    return tuple(float(value) for value in scores)


def checked_moment(moment: Any, tasks: int, shares: bool) -> Moment:
    """Return scores measured within a task.

    Args:
        moment: A `Moment`, or its three values in a tuple.
        tasks: How many tasks the stream has.
        shares: Scores must lie between 0 and 1.

    Raises:
        MatrixError: It is not that.
    """
    parts = (moment.step, moment.task, moment.scores) if isinstance(moment, Moment) else moment
    fits = isinstance(parts, (list, tuple)) and len(parts) == 3 and isinstance(parts[2], (list, tuple))
    if not (fits and is_count(parts[0]) and is_count(parts[1]) and parts[1] < tasks and len(parts[2]) <= tasks):
        raise MatrixError(
            f"A measurement within a task is {moment!r}.",
            f"Expected (step, number of the task from 0 to {tasks - 1}, at most {tasks} scores).",
            "Use for example Moment(120, 1, (0.9,)).",
        )
    step, task, scores = parts
    return Moment(step, task, checked_scores(scores, f"the measurement at step {step}", None, shares))


def is_number(value: Any) -> bool:
    """Return whether a value is a real number, NaN and infinities included."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def sequence(values: Any, what: str) -> Sequence[Any]:
    """Return values when they are a list or a tuple.

    Raises:
        MatrixError: They are not.
    """
    if not isinstance(values, (list, tuple)):
        raise MatrixError(
            f"{first_up(what)} is {values!r}.", "Expected a list or a tuple.", "Turn tensors into lists with tolist()."
        )
    return values


def first_up(text: str) -> str:
    """Return text that begins with a capital."""
    return text[:1].upper() + text[1:]


def mean(values: Iterable[float]) -> float:
    """Return the mean; NaN without values or with one among them."""
    numbers = list(values)
    if not numbers:
        return NAN
    try:
        # Rounded once, so that an order between the terms is kept between the means.
        return math.fsum(numbers) / len(numbers)
    except (OverflowError, ValueError):
        return sum(numbers) / len(numbers)
