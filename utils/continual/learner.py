"""What a method sees of a run: the model, the task, the memory, and a forward pass on any samples."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.adapters import ModelAdapter
from utils.adapters.objectives import IGNORED
from utils.continual.config import ContinualConfig
from utils.continual.task import Task
from utils.memory import EpisodicBuffer
from utils.runtime.seeding import derive_seed
from utils.training.batching import LENGTHS, collate
from utils.training.config import TrainingConfig
from utils.training.evaluation import CLASSIFIERS, objective
from utils.training.prepared_data import PreparedData

TASK = "task"
"""Entry of remembered samples: the number of the task that they are of."""
LOGITS = "logits"
"""Entry of remembered samples: what the model answered when it saw them."""
NEW = -1e4
"""Added to the score of an output that came up by growth and is not known yet; float16 holds it."""
WHOLE = "_seedbed_whole"
"""Attribute of scores that are masked: what they were before."""


class TaskAdapter:
    """A model whose outputs answer only where they may; everything else is the adapter's.

    Attributes:
        answers: ``(outputs,)`` or ``(batch, outputs)``, true where an output may answer; None lets all.
        lowered: ``(outputs,)``, added to the scores; None adds nothing.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        """Wrap an adapter."""
        self._adapter = adapter
        self.answers: Tensor | None = None
        self.lowered: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """Return what the adapter has."""
        return getattr(self._adapter, name)

    def logits(self, *arguments: Any, **named: Any) -> Tensor:
        """Return the model's logits, as low as numbers go where an output may not answer."""
        return self.shaped(self._adapter.logits(*arguments, **named))

    def shaped(self, logits: Tensor) -> Tensor:
        """Return scores that the model gave, ``(batch, ..., outputs)``, as `logits` does; the same ones if all may."""
        if self.answers is None and self.lowered is None:
            return logits
        lowest, masked = torch.finfo(logits.dtype).min, logits
        if self.lowered is not None:
            # Outputs that are new answer nothing yet, until a method knows them.
            new = logits.shape[-1] - len(self.lowered)
            masked = logits + functional.pad(self.lowered.to(logits), (0, new), value=NEW)
        if self.answers is not None:
            masked = masked.masked_fill(~_along(self.answers, logits), lowest)
        setattr(masked, WHOLE, logits)
        return masked

    def to_store(self, logits: Tensor) -> Tensor:
        """Return scores that `logits` returned as the model gave them, the lowest number where none may answer."""
        whole = unmasked(logits).detach()
        if self.answers is None:
            return whole
        return whole.masked_fill(~_along(self.answers, whole), torch.finfo(whole.dtype).min)


def _along(answers: Tensor, logits: Tensor) -> Tensor:
    """Return which outputs may answer, of the same samples at every position, ``(batch, 1, ..., outputs)``.

    Outputs that came since the answers were told do not.
    """
    answers = functional.pad(answers, (0, logits.shape[-1] - answers.shape[-1])).to(logits.device)
    return answers if answers.dim() == 1 else answers.view(len(answers), *[1] * (logits.dim() - 2), -1)


def unmasked(logits: Tensor) -> Tensor:
    """Return the scores of all outputs, given what `TaskAdapter.logits` returned."""
    return getattr(logits, WHOLE, logits)


class Learner:
    """A run, as the methods of continual learning see it.

    Attributes:
        adapter: The model.
        settings: Those of continual learning.
        data: All samples.
        tasks: The stream.
        task: The present task; of a stream without boundaries one that no method may look at.
        memory: Remembered samples.
        step: Optimizer steps done.
        seed: The run's.
        classes: Classes seen up to now, ascending.
        training: The settings of the run; None where there is no run.
        ends: Optimizer steps at which the tasks end; there when a session has started.
        loop: The run's `TrainingModule`, which knows the rate of a step and what is clipped; there likewise.
    """

    def __init__(
        self, adapter: ModelAdapter, settings: ContinualConfig, data: PreparedData, tasks: Sequence[Task],
        memory: EpisodicBuffer, seed: int, precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:  # fmt: skip
        """See the attributes; `precision` makes the context of a forward pass."""
        self.adapter, self.settings, self.data, self.tasks = adapter, settings, data, tuple(tasks)
        self.memory, self.seed, self.precision = memory, seed, precision
        self.masked = TaskAdapter(adapter)
        self.task, self.step, self.passes = self.tasks[0], 0, 0
        self.training: TrainingConfig | None = None
        self.ends: tuple[int, ...] = ()
        self.loop: Any = None

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.adapter.module

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @property
    def classifies(self) -> bool:
        """Whether a sample has one class."""
        return self.data.task in CLASSIFIERS

    @property
    def outputs(self) -> int:
        """How many scores the model gives; of language models, the ids that it knows."""
        return int(self.adapter.num_labels.value or self.adapter.vocab_size.value or 0)

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes seen so far, the present task's included, ascending."""
        return tuple(sorted({one for task in self.tasks[: self.task.number + 1] for one in task.classes}))

    def number(self, purpose: str) -> int:
        """Return the seed of what is drawn for a purpose in this pass of this step."""
        return derive_seed(self.seed, purpose, self.step, self.passes)

    def allowed(self, answers: Sequence[int]) -> Tensor | None:
        """Return which outputs may answer, ``(outputs,)``; None for all."""
        if not answers:
            return None
        allowed = torch.zeros(self.outputs, dtype=torch.bool)
        allowed[list(answers)] = True
        return allowed

    def rows_allowed(self, numbers: Tensor) -> Tensor | None:
        """Return which outputs may answer samples of several tasks, ``(batch, outputs)``; None for all.

        Args:
            numbers: Number of the task of each sample.
        """
        if self.settings.setting != "task":
            return None
        table = torch.zeros(len(self.tasks), self.outputs, dtype=torch.bool)
        for task in self.tasks:
            table[task.number, list(task.answers) or slice(None)] = True
        return table[numbers]

    def remembered(self, count: int, purpose: str = "replay") -> dict[str, Tensor]:
        """Draw remembered samples as a batch on the model's device, with `TASK` and, where kept, `LOGITS`."""
        rows = self.memory.sample(min(count, len(self.memory)), self.number(purpose))
        return self.batch_of(rows)

    def batch_of(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make a batch, on the model's device, of rows as the memory keeps them."""
        rows = dict(rows)
        beside = {name: rows.pop(name) for name in (TASK, LOGITS, "slots") if name in rows}
        if "lengths" in rows:
            rows = collate(rows, torch.arange(len(next(iter(rows.values())))))
        return {name: value.to(self.adapter.device) for name, value in {**rows, **beside}.items()}

    def loss(
        self, batch: Mapping[str, Tensor], purpose: str = "replay", lowered: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model on remembered samples.

        Args:
            batch: What `remembered` returned.
            purpose: Seeds what masked language models hide.
            lowered: What is added to the scores, ``(outputs,)``.

        Returns:
            The mean loss in nats, the logits and the labels, all where outputs answer that may.
        """
        before = self.masked.answers, self.masked.lowered
        self.masked.answers, self.masked.lowered = self.rows_allowed(batch[TASK].cpu()), lowered
        samples = {name: value for name, value in batch.items() if name not in (TASK, LOGITS, "slots")}
        smoothing = 0.0 if self.training is None else self.training.label_smoothing
        try:
            return objective(self.masked, self.data, samples, self.number(f"{purpose} masking"), smoothing)  # type: ignore[arg-type]
        finally:
            # What comes after is about new samples again.
            self.masked.answers, self.masked.lowered = before


def kept_logits(memory: EpisodicBuffer, logits: Tensor) -> Tensor:
    """Return logits as a memory can take them in, also when the outputs have become more since the first ones.

    Args:
        memory: Made wider when it holds narrower ones.
        logits: ``(batch, ..., outputs)``, on the CPU.

    Returns:
        Logits as wide as those in the memory; entries that do not exist are the lowest number of their type, as are
        those of outputs that may not answer.
    """
    layout = memory.layouts.get(LOGITS)
    if layout is None:
        return logits
    logits = logits.to(layout.dtype)
    width, lowest = logits.shape[-1], torch.finfo(layout.dtype).min
    if width > layout.shape[-1]:
        memory.widen(LOGITS, width, lowest)
    return functional.pad(logits, (0, max(0, layout.shape[-1] - width)), value=lowest)


def whole_rows(batch: Mapping[str, Tensor], data: PreparedData) -> dict[str, Tensor]:
    """Return the samples of a batch as rows of one shape, on the CPU: texts that it cut are as wide as the data's.

    Args:
        batch: What `utils.training.batching.collate` returned.
        data: What it is from.
    """
    rows = {name: value.detach().cpu() for name, value in batch.items()}
    if "lengths" not in data.train:
        return rows
    counted = {"lengths": rows.pop("attention_mask").sum(1)}
    if "target_lengths" in data.train:
        counted["target_lengths"] = (rows["labels"] != IGNORED).sum(1)
    for name in {entry for each in counted for entry in LENGTHS[each]}:
        missing = data.train[name].shape[1] - rows[name].shape[1]
        rows[name] = functional.pad(rows[name], (0, missing), value=IGNORED if name == "labels" else 0)
    return rows | counted


@torch.no_grad()
def hardness(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how wrong a model was about each sample of a batch: its mean loss, ``(batch,)``, on the CPU."""
    if labels.is_floating_point():
        loss = (logits.float() - labels).square()
    elif logits.shape[-1] == 1:
        loss = functional.binary_cross_entropy_with_logits(logits.flatten().float(), labels.flatten().float(),
                                                           reduction="none")  # fmt: skip
    else:
        flat = logits.flatten(0, -2).float(), labels.flatten()
        loss = functional.cross_entropy(*flat, reduction="none", ignore_index=IGNORED)
    return loss.view(len(labels), -1).mean(1).cpu()
