"""Continual learning as a part of a run: task after task, with what methods do against forgetting.

A task ends with an optimizer step: what methods keep of it, the measurement of all tasks and the change to the next
one are done before that step's checkpoint, so a run that is killed anywhere repeats them or has them behind it. What
is drawn depends on (seed, purpose, step) alone.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.continual.accuracy_matrix import AccuracyMatrix, save_matrix
from utils.continual.config import ContinualConfig
from utils.continual.learner import LOGITS, TASK, Learner, hardness, kept_logits, whole_rows
from utils.continual.matrix_parts import MatrixError, Moment, TaskCost
from utils.continual.matrix_view import save_matrix_figure
from utils.continual.method import Method, all_as_of, method_classes
from utils.continual.methods.der import positions
from utils.continual.scenario import check_outputs, make_tasks
from utils.continual.task import Task
from utils.continual.task_stream import TaskStream, ends_of
from utils.memory import EpisodicBuffer
from utils.memory.key_reader import tokenizer_fingerprint
from utils.runtime.errors import ConfigError, MissingPackageError
from utils.training.config import TrainingConfig
from utils.training.evaluation import evaluate
from utils.training.extensions import Extension
from utils.training.prepared_data import PreparedData
from utils.training.run import Run
from utils.training.state import ModelChange, Undo
from utils.training.text_stream import augmentation_of

MEGABYTE = 10**6
FEW = 5
"""Steps on a task below which somebody should know."""
OVERHEAD = 96
"""Bytes that a memory needs for each sample beside it, at most."""


class ContinualExtension(Extension):
    """Lets a run learn task after task.

    Attributes:
        settings: The stream and the method.
        methods: What is done against forgetting.
        matrix: The score on each task after each task.
        learner: What the methods see; there when a session has started.
    """

    def __init__(self, settings: ContinualConfig, config: TrainingConfig) -> None:
        """Make the methods; see `make_extension`."""
        self.settings, self.config = settings, config
        kinds = method_classes(settings.method)
        # What projects the gradient does so when all others have added to it.
        self.methods: list[Method] = [kind() for kind in sorted(kinds, key=lambda kind: kind.projects)]
        self.matrix: AccuracyMatrix | None = None
        self.learner: Learner | None = None
        self.memory = EpisodicBuffer(
            settings.buffer,
            None if settings.buffer_mb is None else int(settings.buffer_mb * MEGABYTE),
            settings.policy or next((method.policy for method in self.methods if method.remembers), "balanced"),
            config.seed,
        )
        self._fresh: list[tuple[dict[str, Tensor], Tensor | None, Tensor | None]] = []
        self._held_out: dict[int, PreparedData] = {}
        self._arranged: Sequence[Task] = ()
        self._started = clocks()
        self._spent = [0.0, 0.0]

    @property
    def joint(self) -> bool:
        """Whether all tasks are learned at once."""
        return any(method.name == "joint" for method in self.methods)

    def arrange(self, adapter: ModelAdapter, data: PreparedData) -> PreparedData:
        """Make the tasks, to see that it can be done, and note them with the data.

        Raises:
            SeedbedError: The data does not divide so, or the model or a method does not fit the stream.
        """
        self.use_data(data)
        tasks = make_tasks(data, self.settings, self.config.seed)
        learner = self.make_learner(adapter, data, tasks)
        if learner.classifies:
            check_outputs(tasks, learner.outputs, data.reference)
        for method in self.methods:
            method.check(learner)
        self._check_memory(learner, data)
        self._arranged = tasks
        told = [
            {"name": t.name, "classes": list(t.classes), "train": len(t.train), "validation": len(t.validation)}
            for t in tasks
        ]
        return replace(data, facts={**data.facts, "tasks": told, "pass_samples": sum(len(t.train) for t in tasks)})

    def _check_memory(self, learner: Learner, data: PreparedData) -> None:
        """Make sure that the memory has room for a sample, and one that is balanced for one of each class or task.

        Raises:
            ConfigError: It has not.
        """
        if not any(method.remembers for method in self.methods):
            return
        classes = {one for task in learner.tasks for one in task.classes} if learner.classifies else ()
        groups, kind = (len(classes), "classes") if classes else (len(learner.tasks), "tasks")
        room, setting = self.settings.buffer, f"buffer is {self.settings.buffer}"
        if self.settings.buffer_mb is not None:
            rows = whole_rows(learner.tasks[0].batch(data.train, learner.tasks[0].train[:1]), data)
            each = OVERHEAD + sum(value.nbytes for value in rows.values())
            if any(method.keeps_logits(learner) for method in self.methods):
                each += 4 * max(1, learner.outputs) * positions(learner)
            fitting = int(self.settings.buffer_mb * MEGABYTE) // each
            if fitting < room:
                room, setting = fitting, f"buffer_mb is {self.settings.buffer_mb:g}, room for {fitting} samples"
        balanced = self.memory.policy == "balanced"
        if room < (groups if balanced else 1):
            raise ConfigError(
                f"ContinualConfig.{setting}, and {data.reference} has {groups} {kind}.",
                "Expected a memory with room for at least one sample" + (" of each." if balanced else "."),
                f"Make room for {10 * groups} samples or more" + (", or set policy to reservoir." if balanced else "."),
            )

    def begin(self, adapter: ModelAdapter, total_steps: int) -> None:
        """Make sure that a new run has steps for each task.

        Raises:
            ConfigError: It has fewer.
        """
        ends = ends_of(self._arranged, total_steps, 1, self.joint)
        steps = [end - start for start, end in pairwise([0, *ends])]
        if min(steps) < FEW:
            told = ", ".join(f"{count:,} on {task.name!r}" for count, task in zip(steps, self._arranged, strict=False))
            warnings.warn(
                f"Of {total_steps:,} steps the model learns {told}: steps are divided as samples are. Train for "
                "longer, or even the tasks out with ContinualConfig.samples_per_task.",
                stacklevel=2,
            )

    def use_data(self, data: PreparedData) -> None:
        """Let the memory know what its samples depend on: one of another tokenizer's is refused."""
        self.memory.source = tokenizer_fingerprint(data.tokenizer) or ""

    def open_stream(self, run: Run) -> TaskStream:
        """Return the training data, task after task."""
        self.use_data(run.data)
        tasks = make_tasks(run.data, self.settings, self.config.seed)
        ends = ends_of(tasks, run.total_steps, run.config.samples_per_step, self.joint)
        return TaskStream(
            run.data.train, tasks, ends, run.config.batch_size, run.config.seed,
            augmentation_of(run.data, run.config), self.joint,
            self.settings.restart_schedule and self.settings.boundaries, self.settings.blur,
        )  # fmt: skip

    def start(self, session: Any) -> None:
        """Take part in every step; at the very beginning, measure the untrained model and begin the first task."""
        stream: TaskStream = session.stream
        context = session.module.trainer.precision_plugin.forward_context
        learner = self.make_learner(session.run.adapter, session.run.data, stream.tasks, context)
        self.learner, session.module.shaping = learner, self
        learner.loop = session.module
        learner.ends = tuple(end // session.config.samples_per_step for end in stream.ends)
        session.module.adapter = learner.masked
        learner.step = session.progress.step
        learner.task = stream.task_at(stream.consumed)
        if session.progress.step == 0:
            self.matrix = AccuracyMatrix(
                tuple(task.name for task in stream.tasks), untrained=self._scores(session, stream.tasks),
                higher_is_better=learner.classifies, unit="accuracy" if learner.classifies else "nats",
            )  # fmt: skip
            self._started = clocks()
            self._begin_task()
        else:
            # What the task took in earlier sessions counts too.
            self._started = tuple(now - spent for now, spent in zip(clocks(), self._spent, strict=True))

    def _begin_task(self) -> None:
        assert self.learner is not None
        if self.settings.boundaries:
            for method in self.methods:
                method.begin_task(self.learner)

    def new_batch(self, batch: dict[str, Tensor]) -> None:
        """Let the outputs answer that may in the loss of new samples; called before each pass."""
        learner = self.learner
        assert learner is not None
        # Samples of all tasks at once are of no task in particular.
        told = self.settings.setting == "task" and not self.joint
        learner.masked.answers = learner.allowed(learner.task.answers if told else ())
        lowered = [method.lowered(learner, batch["labels"]) for method in self.methods]
        learner.masked.lowered = next((one for one in lowered if one is not None), None)
        for method in self.methods:
            method.new_pass(learner)

    def extra_loss(self, batch: dict[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor | None:
        """Return what the methods add to the loss of a batch; the batch is remembered after the step."""
        learner = self.learner
        assert learner is not None
        if any(method.remembers for method in self.methods):
            keeps = any(method.keeps_logits(learner) for method in self.methods)
            # Before the methods let other outputs answer, which may in the tasks of remembered samples.
            stored = learner.masked.to_store(logits) if keeps else None
            hard = hardness(logits, labels) if self.memory.policy == "priority" else None
            self._fresh.append((batch, stored, hard))
        found = None
        for method in self.methods:
            extra = method.extra_loss(learner, batch, logits, labels)
            if extra is not None:
                found = extra if found is None else found + extra
        learner.passes += 1
        return found

    def change_gradient(self) -> None:
        """Let the methods change the gradient of a whole step."""
        assert self.learner is not None
        for method in self.methods:
            method.change_gradient(self.learner)

    def weights_changed(self, session: Any) -> None:
        """Let the methods act on the weights."""
        assert self.learner is not None
        for method in self.methods:
            method.after_step(self.learner)

    def after_step(self, session: Any, batch: Mapping[str, Tensor]) -> None:
        """Remember the step's samples; at the end of a task keep what must not be lost, measure, and go on."""
        learner, stream = self.learner, session.stream
        assert learner is not None
        self.remember()
        learner.step, learner.passes = session.progress.step, 0
        if stream.consumed not in stream.ends:
            return
        task = learner.task
        if self.settings.boundaries:
            for method in self.methods:
                method.end_task(learner)
        session.module.train()
        assert self.matrix is not None
        cost = TaskCost(
            clocks()[0] - self._started[0], len(self.memory), sum(method.stored_floats for method in self.methods),
            sum(p.numel() for p in learner.module.parameters()), cpu_seconds=clocks()[1] - self._started[1],
        )  # fmt: skip
        scores = self._scores(session, stream.tasks)
        if self.joint:
            self.matrix = replace(self.matrix, joint=scores)
        else:
            self.matrix = self.matrix.with_row(scores, session.progress.step, cost)
        if session.writer is not None:
            save_matrix(session.run.directory, self.matrix)
        if stream.consumed < stream.ends[-1]:
            learner.task = stream.tasks[task.number + 1]
            self._started = clocks()
            self._begin_task()

    def measure(self, session: Any) -> dict[str, float]:
        """Measure the tasks seen so far: their mean loss, and accuracy where samples have a class."""
        learner = self.learner
        assert learner is not None
        seen = learner.tasks if self.joint else learner.tasks[: learner.task.number + 1]
        before = clocks()
        measured = [self._measured(session, task) for task in seen]
        # To measure is no part of what a task costs.
        self._started = tuple(s + now - then for s, now, then in zip(self._started, clocks(), before, strict=True))
        if self.matrix is not None and not self.joint:
            scores = [one["accuracy" if learner.classifies else "loss"] for one in measured]
            moment = Moment(session.progress.step, learner.task.number, tuple(scores))
            self.matrix = replace(self.matrix, within=(*self.matrix.within, moment))
        names = [name for name in ("loss", "accuracy") if name in measured[0]]
        return {name: sum(one[name] for one in measured) / len(measured) for name in names}

    def _measured(self, session: Any, task: Task) -> dict[str, float]:
        """Measure one task."""
        learner = self.learner
        assert learner is not None
        if task.number not in self._held_out:
            self._held_out[task.number] = task.held_out(learner.data)
        learner.masked.answers = self._answers_for(task)
        learner.masked.lowered = None
        averaged = nullcontext if session.average is None else session.average.applied
        with averaged(), all_as_of(self.methods, learner, task.number):
            return evaluate(
                learner.masked, self._held_out[task.number], session.config.batch_size, session.config.seed,  # type: ignore[arg-type]
                learner.precision,
            )  # fmt: skip

    def _answers_for(self, task: Task) -> Tensor | None:
        """Return which outputs may answer when a task is measured: its own, or those of all classes so far."""
        learner = self.learner
        assert learner is not None
        if self.settings.setting == "task":
            return learner.allowed(task.answers)
        # An untrained model knows of no class yet, and one that learned all at once of all.
        if self.settings.setting != "class" or self.joint or not learner.step or not learner.classifies:
            return None
        return learner.allowed(learner.classes)

    def _scores(self, session: Any, tasks: Sequence[Task]) -> tuple[float, ...]:
        """Return the score on each task: accuracy, or nats where samples have no class."""
        assert self.learner is not None
        name = "accuracy" if self.learner.classifies else "loss"
        return tuple(self._measured(session, task)[name] for task in tasks)

    def remember(self) -> None:
        """Offer the samples of the step to the memory."""
        learner = self.learner
        assert learner is not None
        for batch, logits, hard in self._fresh:
            rows = whole_rows(batch, learner.data)
            count = len(next(iter(rows.values())))
            # Nobody may know of tasks in a stream without boundaries.
            rows[TASK] = torch.full((count,), learner.task.number if self.settings.boundaries else 0)
            if logits is not None:
                rows[LOGITS] = kept_logits(self.memory, logits.cpu())
            groups = rows["labels"] if learner.classifies else rows[TASK]
            self.memory.add(rows, groups, hard, time=learner.step)
        self._fresh.clear()

    def make_learner(
        self, adapter: ModelAdapter, data: PreparedData, tasks: Sequence[Task], precision: Any = nullcontext
    ) -> Learner:
        """Return what the methods see of a model, some data and its tasks; `precision` as for `Learner`."""
        learner = Learner(adapter, self.settings, data, tasks, self.memory, self.config.seed, precision)
        learner.training = self.config
        return learner

    def end(self, session: Any) -> None:
        """Draw the matrix; a picture that cannot be drawn ends no run."""
        if session.writer is None or self.matrix is None or not self.matrix.rows:
            return
        try:
            save_matrix_figure(session.run.directory)
        except (OSError, MissingPackageError, MatrixError) as error:
            warnings.warn(f"The picture of the tasks' scores cannot be made: {error}", stacklevel=2)

    def release(self) -> None:
        """Let the methods go of the model."""
        if self.learner is not None:
            for method in self.methods:
                method.end(self.learner)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory, what the methods keep, and the scores."""
        return {
            "memory": self.memory.state_dict(),
            "methods": {method.name: method.state_dict() for method in self.methods},
            "matrix": None if self.matrix is None else self.matrix.to_dict(),
            "spent": [now - start for now, start in zip(clocks(), self._started, strict=True)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.memory.load_state_dict(state["memory"])
        for method in self.methods:
            method.load_state_dict(state["methods"][method.name])
        self.matrix = None if state["matrix"] is None else AccuracyMatrix.from_dict(state["matrix"])
        self._spent = list(state["spent"])

    def migrate(self, change: ModelChange) -> Undo:
        """Let the methods follow a change of the model, all or none."""
        undos: list[Undo] = []

        def undo() -> None:
            while undos:
                undos.pop()()

        for method in self.methods:
            try:
                followed = method.migrate(change)
            except BaseException:
                undo()
                raise
            if followed is not None:
                undos.append(followed)
        return undo


def clocks() -> tuple[float, ...]:
    """Return the time that went by and the time of all threads of this process, in seconds."""
    return time.monotonic(), time.process_time()


def check_export(config: TrainingConfig) -> None:
    """Make sure that the bare model of a run answers as the run's model does.

    Raises:
        ConfigError: What answers for a task is kept beside it.
    """
    names = [kind.name for kind in method_classes(ContinualConfig.from_dict(config.continual or {}).method)
             if kind.needs_task]  # fmt: skip
    if names:
        raise ConfigError(
            f"The run learned with {names[0]}: which weights answer depends on the task, and a file of weights holds "
            "none of that.",
            "Expected a method whose model answers by itself.",
            "Use the model with utils.continual.answering.answering(run, task).",
        )


def make_extension(config: TrainingConfig) -> ContinualExtension:
    """Return continual learning as the settings of a run ask for it.

    Raises:
        ConfigError: The settings are wrong, or contradict others.
    """
    settings = ContinualConfig.from_dict(config.continual or {})
    for kind in method_classes(settings.method):
        if kind.needs_boundaries and not settings.boundaries:
            raise ConfigError(
                f"ContinualConfig.method is {settings.method!r} and boundaries is False.",
                f"Expected boundaries: {kind.name} acts where a task ends.",
                "Set boundaries=True, or method to replay or der++.",
            )
        if kind.needs_task and settings.setting != "task":
            raise ConfigError(
                f"ContinualConfig.method is {settings.method!r} and setting is {settings.setting!r}.",
                f"Expected setting='task': {kind.name} must know which task a sample is of, also when it answers.",
                "Set setting='task', or another method.",
            )
    if config.devices > 1:
        raise ConfigError(
            f"TrainingConfig.continual is set and devices is {config.devices}.",
            "Expected one device: memories of several processes would hold different samples.",
            "Set devices to 1.",
        )
    lowers = any(kind.lowers for kind in method_classes(settings.method))
    if config.label_smoothing and (settings.setting == "task" or lowers):
        why = "setting is 'task'" if settings.setting == "task" else f"method is {settings.method!r}"
        raise ConfigError(
            f"ContinualConfig.{why} and TrainingConfig.label_smoothing is {config.label_smoothing}.",
            "Expected no smoothing: a share of each label would go to outputs that may not answer.",
            "Set label_smoothing to 0.0.",
        )
    if config.early_stopping_patience is not None:
        raise ConfigError(
            f"TrainingConfig.continual is set and early_stopping_patience is {config.early_stopping_patience}.",
            "Expected None: the loss over the tasks so far rises whenever a new one begins.",
            "Set early_stopping_patience to None.",
        )
    return ContinualExtension(settings, config)
