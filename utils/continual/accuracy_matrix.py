"""The accuracy matrix of a stream of tasks: how good a model is at every task after each task that it learned.

R[i][j] is the score on task j after training on task i. All numbers by which continual learning is judged follow from
it; here is the one place that computes them. Definitions: Lopez-Paz and Ranzato 2017 (GEM, average accuracy, backward
and forward transfer), Chaudhry et al. 2018 (RWalk, forgetting and intransigence), De Lange et al. 2023 (Continual
evaluation for lifelong learning, the minimum and the worst-case accuracy).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from utils.continual.matrix_parts import (
    NAN,
    Drop,
    MatrixError,
    Moment,
    TaskCost,
    checked_moment,
    checked_scores,
    is_count,
    mean,
    sequence,
)
from utils.runtime.files import tag_nonfinite, untag_nonfinite, write_json
from utils.training.task_rows import KIND, MATRIX, VERSION

MATRIX_PICTURE = "accuracy_matrix.png"
"""The picture beside `MATRIX` in a run's directory."""
DIRECTIONS = {"accuracy": True, "nats": False}
"""Units whose direction is known: is more better?"""


@dataclass(frozen=True, repr=False)
class AccuracyMatrix:
    """The scores of a stream of tasks and what follows from them; checked when it is made.

    Every number speaks of the moment after the last row, as if the stream had ended there. A number is NaN where it is
    not defined (forgetting after one task) or where a score that it needs was not measured. Differences have the unit
    of the scores. Their signs do not depend on `higher_is_better`: positive forgetting, stability gap and
    intransigence are bad, positive transfer is good. With losses in nats, forgetting is how much the loss rose.
    """

    tasks: tuple[str, ...]
    """Names of all T tasks of the stream, in its order."""
    rows: tuple[tuple[float, ...], ...] = ()
    """R[i][j], a row of T scores for each task that was finished; NaN where not measured."""
    untrained: tuple[float, ...] | None = None
    """The T scores before any training."""
    higher_is_better: bool = True
    """False for losses."""
    unit: str = "accuracy"
    """``accuracy`` (shares from 0 to 1), ``nats`` (loss per token) or a word of your own."""
    joint: tuple[float, ...] | None = None
    """The T scores of a model trained on all tasks at once."""
    costs: tuple[TaskCost, ...] = ()
    """One for each row, or none at all."""
    within: tuple[Moment, ...] = ()
    """Scores measured during tasks, in the order of steps, for the stability gap."""
    ends: tuple[int, ...] = ()
    """The optimizer step at which each row was measured, or none at all."""

    def __post_init__(self) -> None:
        """Turn sequences into tuples and check that everything fits together."""
        names = self.tasks
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise MatrixError(f"The tasks are {names!r}.", "Expected a sequence of names.", "Use ('first', 'second').")
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names or twice:
            raise MatrixError(
                f"The names {', '.join(map(repr, twice))} stand for several tasks." if twice else "There are no tasks.",
                "Expected at least one task, each with a name of its own.",
                "Add numbers to names that repeat." if twice else "Name the tasks of the stream.",
            )
        up = self.higher_is_better
        if not isinstance(self.unit, str) or not isinstance(up, bool) or DIRECTIONS.get(self.unit, up) != up:
            raise MatrixError(
                f"The unit is {self.unit!r} and higher_is_better is {self.higher_is_better!r}.",
                "Expected True with 'accuracy', False with 'nats' and one of them with any other unit.",
                "Set both, for example unit='nats', higher_is_better=False.",
            )
        count, shares = len(names), self.unit == "accuracy"
        rows, within = sequence(self.rows, "rows"), sequence(self.within, "within")
        keep = {
            "tasks": tuple(names),
            "rows": tuple(checked_scores(row, f"row {i}", count, shares) for i, row in enumerate(rows)),
            "untrained": None if self.untrained is None else checked_scores(self.untrained, "untrained", count, shares),
            "joint": None if self.joint is None else checked_scores(self.joint, "joint", count, shares),
            "costs": tuple(sequence(self.costs, "costs")),
            "ends": tuple(sequence(self.ends, "ends")),
            "within": tuple(checked_moment(moment, count, shares) for moment in within),
        }
        for name, value in keep.items():
            object.__setattr__(self, name, value)
        if len(self.rows) > len(names):
            raise MatrixError(
                f"There are {len(self.rows)} rows for {len(names)} tasks.",
                "Expected at most one row for each task.",
                "Name every task of the stream, also one that is trained again.",
            )
        for name in ("costs", "ends"):
            if len(getattr(self, name)) not in (0, len(self.rows)):
                raise MatrixError(
                    f"There are {len(getattr(self, name))} {name} for {len(self.rows)} rows.",
                    f"Expected one of {name} for each row, or none at all.",
                    "Give them with every row, see with_row.",
                )
        if not all(isinstance(cost, TaskCost) for cost in self.costs):
            raise MatrixError(f"The costs are {self.costs!r}.", "Expected TaskCost.", "Use TaskCost(seconds=3.2).")
        self._check_steps()

    def _check_steps(self) -> None:
        """Check that steps rise, and that what was measured within a task lies within it."""
        rising = all(map(is_count, self.ends)) and all(a < b for a, b in pairwise((0, *self.ends)))
        places = [(moment.task, moment.step) for moment in self.within]
        steps = [moment.step for moment in self.within]
        if not rising or places != sorted(places) or steps != sorted(steps):
            raise MatrixError(
                f"The steps of the rows are {list(self.ends)}, those within tasks {steps}.",
                "Expected whole numbers that rise from task to task.",
                "Count the optimizer steps of the whole stream, not those of each task.",
            )
        for moment in self.within:
            low = self.ends[moment.task - 1] if 0 < moment.task <= len(self.ends) else 0
            high = self.ends[moment.task] if moment.task < len(self.ends) else math.inf
            if not low <= moment.step <= high:
                raise MatrixError(
                    f"Something was measured at step {moment.step}, during task {moment.task}, which lasted from step "
                    f"{low} to {high}.",
                    "Expected a step within the task.",
                    "Count the optimizer steps of the whole stream, not those of each task.",
                )

    def with_row(
        self,
        scores: Sequence[float],
        step: int | None = None,
        cost: TaskCost | None = None,
        within: Iterable[Moment] = (),
    ) -> "AccuracyMatrix":
        """Return the matrix after one more task.

        Args:
            scores: One for each task of the stream, NaN where not measured.
            step: Optimizer step; with every row or with none.
            cost: What the task took; with every row or with none.
            within: What was measured during the task.

        Raises:
            MatrixError: It does not fit what is there.
        """
        return replace(
            self,
            rows=(*self.rows, tuple(sequence(scores, "the new row"))),
            ends=self.ends if step is None else (*self.ends, step),
            costs=self.costs if cost is None else (*self.costs, cost),
            within=(*self.within, *within),
        )

    # What follows from the scores. `_gain` turns losses round, so that every formula reads as for accuracies.

    @property
    def trained(self) -> int:
        """How many tasks are finished."""
        return len(self.rows)

    def _gain(self, better: float, worse: float) -> float:
        """Return how much better the first score is than the second."""
        return (better - worse) if self.higher_is_better else (worse - better)

    def best(self, scores: Iterable[float]) -> float:
        """Return the best of some scores, those not measured left out; NaN when there is none."""
        measured = [score for score in scores if not math.isnan(score)]
        return (max(measured) if self.higher_is_better else min(measured)) if measured else NAN

    def worst(self, scores: Iterable[float]) -> float:
        """Return the worst of some scores, those not measured left out; NaN when there is none."""
        measured = [score for score in scores if not math.isnan(score)]
        return (min(measured) if self.higher_is_better else max(measured)) if measured else NAN

    @property
    def average_accuracy(self) -> float:
        """Mean over the tasks learned of the score on them now: ACC = mean_j R[T, j]."""
        return mean(self.rows[-1][: self.trained]) if self.rows else NAN

    @property
    def average_incremental_accuracy(self) -> float:
        """Mean over the rows i of the mean of R[i, j] over the tasks j up to i (iCaRL, Rebuffi et al. 2017)."""
        return mean(mean(row[: i + 1]) for i, row in enumerate(self.rows))

    @property
    def forgotten(self) -> tuple[float, ...]:
        """How much was forgotten of each task before the last: max_{l < T} R[l, j] - R[T, j].

        The maximum runs over all earlier rows, those before task j included (Chaudhry et al. 2018, equation 3).
        """
        last = self.rows[-1] if self.rows else ()
        return tuple(self._gain(self.best(row[j] for row in self.rows[:-1]), last[j]) for j in range(self.trained - 1))

    @property
    def forgetting(self) -> float:
        """Mean of `forgotten`; at least minus the backward transfer."""
        return mean(self.forgotten)

    @property
    def backward_transfer(self) -> float:
        """What later tasks did for earlier ones: BWT = mean_{j < T} (R[T, j] - R[j, j])."""
        return mean(self._gain(self.rows[-1][j], self.rows[j][j]) for j in range(self.trained - 1))

    @property
    def forward_transfer(self) -> float:
        """What earlier tasks did for later ones: FWT = mean_{j > 1} (R[j - 1, j] - b_j), b_j before any training."""
        start = self.untrained
        if start is None:
            return NAN
        return mean(self._gain(self.rows[j - 1][j], start[j]) for j in range(1, self.trained))

    @property
    def learning_accuracy(self) -> float:
        """Mean score on each task right after it was learned: mean_j R[j, j]."""
        return mean(self.rows[j][j] for j in range(self.trained))

    @property
    def intransigence(self) -> float:
        """How much less well tasks were learned than jointly: mean_j (joint_j - R[j, j]) (Chaudhry et al. 2018)."""
        if self.joint is None:
            return NAN
        return mean(self._gain(self.joint[j], self.rows[j][j]) for j in range(self.trained))

    @property
    def drops(self) -> tuple[Drop, ...]:
        """For each finished task, and each old task that was measured during it: how far its score fell meanwhile."""
        found = []
        for during in range(1, self.trained):
            moments = [moment for moment in self.within if moment.task == during]
            for old in range(during):
                before, after = self.rows[during - 1][old], self.rows[during][old]
                measured = [(moment.scores[old], moment.step) for moment in moments if old < len(moment.scores)]
                measured = [(score, step) for score, step in measured if not math.isnan(score)]
                if not measured or math.isnan(before) or math.isnan(after):
                    continue
                worst = self.worst([*(score for score, _ in measured), after])
                step = next((step for score, step in measured if score == worst), None)
                if step is None and self.ends:
                    step = self.ends[during]
                size = max(0.0, self._gain(before, worst))
                found.append(Drop(old, during, step, before, worst, after, size, self._gain(after, worst)))
        return tuple(found)

    @property
    def stability_gap(self) -> float:
        """The largest drop of an old task's score during a later task, against its value at the end of the task before.

        De Lange et al. 2023 name the phenomenon; this is its worst case in the unit of the scores. NaN when nothing was
        measured within tasks: the rows alone cannot show it.
        """
        return max((drop.size for drop in self.drops), default=NAN)

    @property
    def minimum_accuracy(self) -> float:
        """Mean over the old tasks of the worst score since they were learned (De Lange et al. 2023, min-ACC).

        Over everything measured after the end of task j, rows included; without `within` that is the task ends alone.
        """
        if self.trained < 2:
            return NAN
        lowest = []
        for old in range(self.trained - 1):
            later = [row[old] for row in self.rows[old + 1 :]]
            moments = [m.scores[old] for m in self.within if old < m.task < self.trained and old < len(m.scores)]
            lowest.append(NAN if any(math.isnan(score) for score in later) else self.worst([*later, *moments]))
        return mean(lowest)

    @property
    def worst_case_accuracy(self) -> float:
        """WC-ACC = R[T, T] / T + (1 - 1/T) min-ACC (De Lange et al. 2023): good at the new, never bad at the old."""
        if not self.rows:
            return NAN
        now, share = self.rows[-1][self.trained - 1], 1 / self.trained
        return now if self.trained == 1 else share * now + (1 - share) * self.minimum_accuracy

    def summary(self) -> dict[str, Any]:
        """Return all numbers by name, and what the stream took: sums of what is spent, last values of what is kept."""
        numbers: dict[str, Any] = {name: getattr(self, name) for name in NUMBERS}
        for name in (entry.name for entry in fields(TaskCost)):
            values = [getattr(cost, name) for cost in self.costs]
            spent = name in ("seconds", "training_flops")
            known = bool(values) and (None not in values if spent else values[-1] is not None)
            numbers[name] = (sum(values) if spent else values[-1]) if known else None
        return {"unit": self.unit, "tasks": len(self.tasks), "trained": self.trained, **numbers}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold, the summary with them for whoever reads the file."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        plain["costs"] = [asdict(cost) for cost in self.costs]
        plain["within"] = [asdict(moment) for moment in self.within]
        described: dict[str, Any] = tag_nonfinite(
            {"kind": KIND, "version": VERSION, **plain, "summary": self.summary()}
        )
        return described

    def said(self, value: float, places: int = 1) -> str:
        """Return a score or a difference as text: accuracies in percent, others as they are; a dash if not measured."""
        if math.isnan(value):
            return "–"
        return f"{100 * value:.{places}f}" if self.unit == "accuracy" else f"{value:.{places + 1}f}"

    def text(self) -> str:
        """Return the matrix and what follows from it as lines; above a dozen tasks a line for each task instead."""
        # The view shows a matrix, so it imports this file.
        from utils.continual.matrix_view import matrix_text

        return matrix_text(self)

    __str__ = text

    __repr__ = text

    def _repr_html_(self) -> str:
        """Show the picture, the numbers and a table of the tasks."""
        from utils.continual.matrix_view import matrix_html

        return matrix_html(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AccuracyMatrix":
        """Return the matrix that `to_dict` described; the summary is computed again.

        Raises:
            MatrixError: The values describe something else.
        """
        names = {entry.name for entry in fields(cls)}
        if not isinstance(values, Mapping) or values.get("kind") != KIND or values.get("version") != VERSION:
            found = {k: values.get(k) for k in ("kind", "version")} if isinstance(values, Mapping) else values
            raise MatrixError(
                f"Values that should describe an accuracy matrix say {found!r}.",
                f"Expected kind {KIND!r} and version {VERSION}.",
                "Use what to_dict returned; update Seedbed when a newer one wrote it.",
            )
        if odd := sorted((names - set(values)) | (set(values) - names - {"kind", "version", "summary"})):
            raise MatrixError(
                f"In the values of an accuracy matrix {', '.join(odd)} is missing or unknown.",
                f"Expected {', '.join(sorted(names))}.",
                "Use what to_dict returned, unchanged.",
            )
        plain = untag_nonfinite({name: values[name] for name in names})
        try:
            plain["costs"] = tuple(TaskCost(**cost) for cost in plain["costs"])
            plain["within"] = tuple(Moment(**moment) for moment in plain["within"])
            return cls(**plain)
        except (TypeError, AttributeError) as error:
            raise MatrixError(
                f"The values of an accuracy matrix have another shape ({error}).",
                "Expected lists of numbers and of costs.",
                "Use what to_dict returned, unchanged.",
            ) from None


NUMBERS = (
    "average_accuracy", "average_incremental_accuracy", "learning_accuracy", "forgetting", "backward_transfer",
    "forward_transfer", "intransigence", "stability_gap", "minimum_accuracy", "worst_case_accuracy",
)  # fmt: skip
"""What follows from the scores: properties of `AccuracyMatrix`."""


def save_matrix(directory: str | Path, matrix: AccuracyMatrix) -> Path:
    """Write a matrix into ``accuracy_matrix.json`` of a run's directory, whole or not at all; return its path.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(directory) / MATRIX
    write_json(path, matrix.to_dict())
    return path


def read_matrix(directory: str | Path) -> AccuracyMatrix:
    """Return the matrix of a run's directory.

    Raises:
        MatrixError: There is none, or the file is torn or holds something else.
    """
    path = Path(directory) / MATRIX
    again = "Train with continual={...} in the settings, or take the file from a copy of the run."
    try:
        return AccuracyMatrix.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise MatrixError(
            f"{path} is not there.", "Expected the directory of a run that learned several tasks.", again
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise MatrixError(
            f"{path} cannot be read ({type(error).__name__}: {error}).", "Expected a whole JSON file.", again
        ) from None
    except MatrixError as error:
        raise MatrixError(f"{path} is no accuracy matrix. {error.found}", error.expected, again) from None
