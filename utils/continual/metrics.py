"""The numbers of continual learning as torchmetrics, for a training loop or a LightningModule of your own.

Each counts what was right in every cell of the accuracy matrix and lets `AccuracyMatrix` compute its number. Log the
number (``self.log("forgetting", metric.compute())``), not the metric: Lightning resets a metric that is logged at the
end of every epoch, and these have to outlive all tasks.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils.continual.accuracy_matrix import DIRECTIONS, NUMBERS, AccuracyMatrix
from utils.continual.matrix_parts import MatrixError, Moment, is_count
from utils.runtime.optional import require

if TYPE_CHECKING:
    from torchmetrics import Metric
else:
    Metric = require("torchmetrics", "measure continual learning with torchmetrics").Metric

UNTRAINED = -1
"""In place of a task in `update`'s `after`: before any training."""
IGNORED = -100
"""The label that counts nowhere, as torch has it."""


class ContinualMetric(Metric):
    """Base of the metrics below: fills the cells of an accuracy matrix.

    A model on several devices counts its own samples on each; the counts are added when the number is computed.

    Attributes:
        tasks: Names of the tasks.
        unit: ``accuracy`` or ``nats``.
        sums: What was right, or the summed loss; float64, shape (tasks + 1, tasks): row 0 before any training, row
            i + 1 after task i.
        counts: Of how many samples or tokens; float64, the same shape.
        moments: Measurements within tasks, float64, each of shape (n, 5): step, task trained, task measured, sum and
            count.
    """

    full_state_update = False
    is_differentiable = False
    number: str = ""
    """Property of `AccuracyMatrix` that `compute` returns."""
    sums: Tensor
    counts: Tensor
    moments: list[Tensor]

    def __init__(self, tasks: int | Sequence[str], unit: str = "accuracy", **settings: Any) -> None:
        """Say which tasks there are.

        Args:
            tasks: Their names, or how many.
            unit: ``accuracy``: the share of right answers; ``nats``: the mean cross-entropy.
            settings: Those of every torchmetrics metric, such as ``process_group``.

        Raises:
            MatrixError: There are no tasks, or two of the same name, or the unit is another.
        """
        super().__init__(**settings)
        if unit not in DIRECTIONS:
            raise MatrixError(
                f"The unit is {unit!r}.", "Expected 'accuracy' or 'nats'.", "Use AccuracyMatrix for other scores."
            )
        names: Any = tuple(f"task {number}" for number in range(tasks)) if isinstance(tasks, int) else tasks
        self.unit = unit
        self.tasks = AccuracyMatrix(names, unit=unit, higher_is_better=DIRECTIONS[unit]).tasks
        shape = (len(self.tasks) + 1, len(self.tasks))
        # float64 counts exactly far beyond any data set, and sums do not depend on the order that anyone can see.
        for name in ("sums", "counts"):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self.add_state("moments", [], dist_reduce_fx="cat", persistent=True)
        self._begin_moments()

    def reset(self) -> None:
        """Forget everything that was counted."""
        super().reset()
        self._begin_moments()

    def _begin_moments(self) -> None:
        """Put a piece of no rows: a process that measured nothing then has the shape of the others when they join."""
        self.moments.append(torch.zeros(0, 5, dtype=torch.float64, device=self.sums.device))

    def update(
        self,
        predictions: Tensor,
        labels: Tensor,
        task: int | str,
        after: int | str | None = None,
        during: int | str | None = None,
        step: int | None = None,
    ) -> None:
        """Count a batch of held-out data.

        Args:
            predictions: Logits with one axis more than the labels, classes last or second, shape (samples, ...,
                classes) or (samples, classes, ...); or, for accuracies, the classes themselves, shaped as the labels.
            labels: The right classes, integers of shape (samples, ...); -100 is left out. A language model's are those
                that its logits predict: shift them before.
            task: The task of the data, by number from 0 or by name.
            after: The task that training has just finished, or `UNTRAINED`.
            during: Instead of `after`: the task that is being trained.
            step: With `during`: the optimizer step of the whole stream.

        Raises:
            MatrixError: A task is unknown, shapes do not fit, or it is not said when this was measured.
        """
        column = self._number(task, "task")
        if (after is None) == (during is None) or (during is None) != (step is None):
            raise MatrixError(
                f"A batch was measured after {after!r}, during {during!r}, at step {step!r}.",
                "Expected `after`, or `during` and `step` together.",
                "Use after=UNTRAINED before any training.",
            )
        right, count = self._score(predictions.detach(), labels.detach())
        if after is not None:
            row = 0 if after == UNTRAINED else self._number(after, "after") + 1
            self.sums[row, column] += right.to(self.sums)
            self.counts[row, column] += count.to(self.counts)
            return
        if not is_count(step):
            raise MatrixError(f"The step is {step!r}.", "Expected a whole number from 0.", "Count optimizer steps.")
        place = torch.tensor([float(step or 0), self._number(during, "during"), column], dtype=torch.float64)
        values = [right.to(self.sums).reshape(1), count.to(self.counts).reshape(1)]
        self.moments.append(torch.cat([place.to(self.sums.device), *values]).reshape(1, 5))

    def _number(self, task: Any, what: str) -> int:
        """Return the number of a task."""
        if isinstance(task, str) and task in self.tasks:
            return self.tasks.index(task)
        if is_count(task) and task < len(self.tasks):
            return int(task)
        raise MatrixError(
            f"The argument {what} is {task!r}.",
            f"Expected a number from 0 to {len(self.tasks) - 1} or one of {', '.join(self.tasks)}.",
            "Name every task of the stream when the metric is made.",
        )

    def _score(self, predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what was right, or the summed loss, and of how many."""
        shape, known = tuple(labels.shape), labels != IGNORED
        logits: Tensor | None = None
        if predictions.ndim == labels.ndim + 1 and predictions.shape[:-1] == shape:
            logits = predictions
        elif (
            predictions.ndim == labels.ndim + 1
            and labels.ndim
            and predictions.shape[:1] + predictions.shape[2:] == shape
        ):
            logits = predictions.movedim(1, -1)
        classes = predictions if logits is None else logits.argmax(-1)
        whole = not labels.is_floating_point() and not classes.is_floating_point()
        if classes.shape != shape or not whole or (logits is None and self.unit == "nats"):
            raise MatrixError(
                f"The predictions are {predictions.dtype} of shape {tuple(predictions.shape)}, the labels "
                f"{labels.dtype} of shape {shape}.",
                "Expected logits with one axis more than the labels, classes last or second"
                + (", or classes shaped as the labels." if self.unit == "accuracy" else "."),
                "Give labels as integers; make one-hot labels into classes with argmax.",
            )
        if self.unit == "accuracy" or logits is None:
            return ((classes == labels) & known).sum(), known.sum()
        # Half precision would not do for a sum over a data set.
        losses = nn.functional.cross_entropy(logits[known].float(), labels[known], reduction="none")
        return losses.double().sum(), known.sum()

    @property
    def matrix(self) -> AccuracyMatrix:
        """What was measured so far by this process; `compute` speaks for all of them."""
        means = (self.sums / self.counts).cpu()
        finished = int((self.counts[1:].sum(1) > 0).nonzero().max().item()) + 1 if bool(self.counts[1:].any()) else 0
        table = means.tolist()
        return AccuracyMatrix(
            self.tasks,
            rows=tuple(tuple(row) for row in table[1 : finished + 1]),
            untrained=tuple(table[0]) if bool(self.counts[0].any()) else None,
            higher_is_better=DIRECTIONS[self.unit],
            unit=self.unit,
            within=tuple(self._within()),
        )

    def _within(self) -> list[Moment]:
        """Return what was measured within tasks, the batches of a moment joined."""
        pieces = self.moments if isinstance(self.moments, list) else [self.moments]
        cells: dict[tuple[int, int], dict[int, list[float]]] = {}
        for step, during, column, right, count in torch.cat([piece.cpu() for piece in pieces]).tolist():
            cell = cells.setdefault((int(during), int(step)), {}).setdefault(int(column), [0.0, 0.0])
            cell[0], cell[1] = cell[0] + right, cell[1] + count
        found = []
        for (during, step), columns in sorted(cells.items()):
            scores = [columns.get(column, [0.0, 0.0]) for column in range(max(columns) + 1)]
            found.append(Moment(step, during, tuple(a / b if b else float("nan") for a, b in scores)))
        return found

    def compute(self) -> Any:
        """Return the number, a float64 scalar; NaN where it is not defined yet."""
        return torch.tensor(getattr(self.matrix, self.number), dtype=torch.float64, device=self.sums.device)


class AverageAccuracy(ContinualMetric):
    """`AccuracyMatrix.average_accuracy`; with ``nats`` the average loss."""

    number = "average_accuracy"


class AverageIncrementalAccuracy(ContinualMetric):
    """`AccuracyMatrix.average_incremental_accuracy`."""

    number = "average_incremental_accuracy"


class LearningAccuracy(ContinualMetric):
    """`AccuracyMatrix.learning_accuracy`."""

    number = "learning_accuracy"


class Forgetting(ContinualMetric):
    """`AccuracyMatrix.forgetting`."""

    number = "forgetting"
    higher_is_better = False


class BackwardTransfer(ContinualMetric):
    """`AccuracyMatrix.backward_transfer`."""

    number = "backward_transfer"
    higher_is_better = True


class ForwardTransfer(ContinualMetric):
    """`AccuracyMatrix.forward_transfer`; needs batches measured with ``after=UNTRAINED``."""

    number = "forward_transfer"
    higher_is_better = True


class StabilityGap(ContinualMetric):
    """`AccuracyMatrix.stability_gap`; needs batches measured with ``during`` and ``step``."""

    number = "stability_gap"
    higher_is_better = False


class WorstCaseAccuracy(ContinualMetric):
    """`AccuracyMatrix.worst_case_accuracy`."""

    number = "worst_case_accuracy"


class ContinualAccuracy(ContinualMetric):
    """All numbers at once: `compute` returns a dictionary."""

    def compute(self) -> dict[str, Tensor]:
        """Return every number that the counts can give, by its name in `AccuracyMatrix`; NaN where not defined yet."""
        matrix = self.matrix
        names = [name for name in NUMBERS if name != "intransigence"]
        device = self.sums.device
        return {name: torch.tensor(getattr(matrix, name), dtype=torch.float64, device=device) for name in names}
