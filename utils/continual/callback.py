"""Continual learning in a Lightning Trainer of your own: `trainer = pl.Trainer(callbacks=[ContinualCallback(...)])`.

Each fit is a task. The training step and its loss stay yours: what methods add to a loss is a forward and a backward
pass of their own, whose gradient adds to yours before it is clipped. Checkpoints that Lightning writes carry the memory
and what methods keep, so that a fit that continues from one (``ckpt_path``) goes on as if nothing had happened; a
callback of your own that writes some has to stand behind this one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.continual import callback_checks as checks
from utils.continual.accuracy_matrix import AccuracyMatrix
from utils.continual.callback_parts import (
    Watch,
    as_given,
    checked_batch,
    checked_call,
    checked_classes,
    join_growth,
    recorded,
    replaced,
    score,
    scores_in,
    shapes_of,
    store_of,
    task_of,
)
from utils.continual.config import ContinualConfig
from utils.continual.extension import make_extension
from utils.continual.learner import Learner, TaskAdapter
from utils.continual.matrix_parts import NAN
from utils.continual.method import Method
from utils.continual.methods.consolidation import OUT
from utils.continual.task import Task
from utils.growth.callback import GrowthCallback
from utils.memory import EpisodicBuffer
from utils.runtime.errors import ConfigError, DataError
from utils.training.config import TrainingConfig
from utils.training.prepared_data import PreparedData


class ContinualCallback(pl.Callback):
    """Lets a model inside a LightningModule learn task after task without forgetting.

    Attributes:
        settings: Those of continual learning.
        tasks: The tasks begun so far.
        step: Optimizer steps made, over all fits.
        ends: The step at which each finished task ended.
        in_task: Whether a task is in progress.
    """

    def __init__(
        self, settings: ContinualConfig | Mapping[str, Any], model: nn.Module, task: str,
        batch: Callable[[Any], Mapping[str, Tensor]] | None = None, seed: int = 0, spec: ModelSpec | None = None,
    ) -> None:  # fmt: skip
        """Say what is done against forgetting.

        Args:
            settings: The method and what it may store.
            model: The model, a part of the LightningModule, whose training step calls it once for each batch.
            task: What the model is for, one of `utils.adapters.TASKS`.
            batch: Makes of a loader's batch what the model and the loss get of it: ``input_ids``, ``pixel_values`` or
                ``features``, and ``labels``, aligned with the scores. None takes mappings as they are, and pairs.
            seed: Decides what is remembered and replayed.
            spec: Facts about the model that override detection, such as ``example_inputs``.

        Raises:
            ConfigError: The settings are wrong, or ask for what only `utils.train` can do.
        """
        self.settings = settings if isinstance(settings, ContinualConfig) else ContinualConfig.from_dict(settings)
        checks.check_settings(self.settings, task)
        self.model, self.seed, self.spec = model, seed, replace(spec or ModelSpec(), task=task)
        self.tasks: list[Task] = []
        self.step, self.in_task = 0, False
        self.ends: tuple[int, ...] = ()
        self._extension = make_extension(TrainingConfig(continual=self.settings.to_dict(), seed=seed))
        self._data = PreparedData("the Trainer's data", task, {}, {})
        self._batch = as_given if batch is None else batch
        kinds = [type(method) for method in self._extension.methods]
        # Whether scores are looked at or changed: what overrides neither of the two gets none.
        self._looks = self.settings.setting == "task" or any(
            kind.remembers or kind.extra_loss is not Method.extra_loss or kind.lowered is not Method.lowered
            for kind in kinds
        )
        # Only a method that acts where a task ends may look at the task's samples there.
        self._keeps_samples = any(kind.needs_boundaries for kind in kinds)
        self._adapter: ModelAdapter | None = None
        self._learner: Learner | None = None
        self._pending: tuple[str, tuple[int, ...]] | None = None
        self._classes: set[int] = set()
        self._own: EpisodicBuffer | None = None
        self._first_epoch = 0
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._undo: list[Callable[[], Any]] = []
        self._precision: Callable[[], Any] = nullcontext
        self._forget_batch()

    def _forget_batch(self) -> None:
        self._watching = self._passed = self._stepping = self._changed = False
        self._calls = 0
        self._samples: dict[str, Tensor] = {}
        self._logits: Tensor | None = None
        self._pulled: Tensor | None = None
        self._left_out: Tensor | None = None

    @property
    def matrix(self) -> AccuracyMatrix | None:
        """What `measure` found after each task; None before it was called."""
        return self._extension.matrix

    @property
    def memory(self) -> EpisodicBuffer:
        """The remembered samples."""
        return self._extension.memory

    def begin(self, name: str, classes: Iterable[int] = ()) -> None:
        """Name the task that begins with the next batch, also in the middle of a fit; one in progress ends before.

        Args:
            name: What people call it.
            classes: Its classes; needed by setting='task', in which they alone answer.

        Raises:
            ConfigError: The stream has no boundaries, or nobody knows what may answer.
        """
        own = tuple(sorted({int(one) for one in classes}))
        checks.check_begin(self.settings, name, own)
        self._pending = name, own

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before training begins; see `utils.continual.callback_checks.check_trainer`."""
        if stage == "fit":
            checks.check_trainer(trainer, pl_module, self.model)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Connect with the model.

        Raises:
            SeedbedError: The model, its precision or another callback does not go with the methods.
        """
        self.release()
        checks.check_precision(trainer)
        checks.check_shapes(self._shapes, self.model)
        adapter = self._look()
        if self._looks:
            checks.check_scores(adapter)
        self._precision = trainer.precision_plugin.forward_context
        seen = self.tasks or [task_of(0, "", ())]
        learner = self._extension.make_learner(adapter, self._data, seen, self._precision)
        learner.task, learner.step, learner.ends, learner.training = seen[-1], self.step, self.ends, None
        self._learner = self._extension.learner = learner
        self._tried = False
        self._undo.append(self.model.register_forward_hook(Watch(self._see)).remove)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, GrowthCallback):
                self._undo.append(join_growth(other, pl_module, self.model, self._extension.migrate))

    def _look(self) -> ModelAdapter:
        if self._adapter is None:
            self._adapter = ModelAdapter(self.model, spec=self.spec)
        return self._adapter

    def release(self) -> None:
        """Let go of the model; Lightning's hooks do it at the end of a fit, also of one that an error ended."""
        while self._undo:
            self._undo.pop()()
        self._forget_batch()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the model."""
        self.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the model; the task stays in progress, and the next fit goes on with it."""
        self._shapes = shapes_of(self.model)
        self.release()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a task where one is due, and get ready for the batch.

        Raises:
            SeedbedError: The batch is not what the model can learn, or a method cannot work with it.
        """
        learner = self._learner
        assert learner is not None
        self._forget_batch()
        self._samples = self._read(batch)
        if not learner.data.train:
            # Until a task is over, methods ask the data only what a sample looks like.
            learner.data = replace(self._data, train={name: value[:1].cpu() for name, value in self._samples.items()})
        if self.in_task and self._pending is not None:
            self._end_task()
        if not self.in_task:
            self._begin_task(learner, trainer.current_epoch)
        if learner.classifies:
            task = self.tasks[-1]
            self._classes |= checked_classes(self._samples["labels"], task.answers, learner.outputs, task.name)
        self._extension.new_batch(self._samples)
        self._watching = True

    def _read(self, batch: Any) -> dict[str, Tensor]:
        return checked_batch(self._batch(batch), self._look().device)

    def _begin_task(self, learner: Learner, epoch: int) -> None:
        if self._pending is None and self.settings.boundaries:
            self.begin(f"task {len(self.tasks) + 1}")
        name, classes = self._pending or ("stream", ())
        task = task_of(len(self.tasks), name, classes if self.settings.setting == "task" else ())
        checks.check_answers(name, classes, learner.outputs)
        learner.tasks, learner.task = (*self.tasks, task), task
        for method in self._extension.methods:
            method.check(learner)
        self.tasks.append(task)
        self._pending, self.in_task, self._first_epoch, self._classes = None, True, epoch, set()
        self._own = store_of(self.settings, self.seed, task.number) if self._keeps_samples else None
        if self.settings.boundaries:
            for method in self._extension.methods:
                method.begin_task(learner)

    def _end_task(self) -> None:
        """Let the methods keep what later tasks must not destroy."""
        learner, task = self._learner, replace(self.tasks[-1], classes=tuple(sorted(self._classes)))
        assert learner is not None
        if self.step == (self.ends[-1] if self.ends else 0):
            raise DataError(
                f"Task {task.name!r} has ended without an optimizer step.",
                "Expected one at least: nothing was learned that could be kept.",
                "Give it data, and let training_step return a loss.",
            )
        sample = learner.data
        if self._own is not None:
            learner.data = replace(self._data, train=self._own.read(self._own.slots))
        learner.task = replace(task, train=torch.arange(learner.data.train_samples))
        learner.tasks = (*self.tasks[:-1], learner.task)
        for method in self._extension.methods:
            method.end_task(learner)
        self.tasks[-1] = learner.task = task
        learner.tasks, learner.data = tuple(self.tasks), sample
        self.ends = learner.ends = (*self.ends, self.step)
        self.in_task, self._own = False, None

    def _see(self, output: Any) -> Any:
        """Note the scores of the training step's forward pass, and let those answer that may."""
        if not (self._watching and self._looks and torch.is_grad_enabled()):
            return None
        assert self._adapter is not None
        assert self._learner is not None
        path, masked = self._adapter.output.value or "", self._learner.masked
        logits = scores_in(output, path)
        self._calls += 1
        self._logits = shaped = masked.shaped(logits)
        if shaped is logits:
            return None
        lowest = shaped.new_zeros(shaped.shape[-1]) if masked.lowered is None else masked.lowered
        self._left_out = (lowest <= OUT) if masked.answers is None else ~masked.answers
        self._changed = True
        if shaped.requires_grad:
            shaped.register_hook(lambda gradient: setattr(self, "_pulled", gradient))
        return replaced(output, path, shaped)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add the gradient of what the methods add to the loss.

        Raises:
            SeedbedError: The training step does not use the model once for each batch, or its scores do not fit.
        """
        learner = self._learner
        assert learner is not None
        if self._passed:
            raise ConfigError(
                "The gradient of one batch was asked for twice.",
                "Expected one backward pass for each batch: remembered samples would count twice.",
                "Use an optimizer that takes one gradient for a step, which LBFGS does not.",
            )
        self._watching, self._passed = False, True
        extra = self._extra(learner) if self._looks else None
        learner.passes += not self._looks
        if extra is not None and extra.requires_grad:
            part = extra / trainer.accumulate_grad_batches
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            # The training step's graph, on which it may rest, is needed once more.
            (part if scaler is None else scaler.scale(part)).backward(retain_graph=True)
        self._pulled = None

    def _extra(self, learner: Learner) -> Tensor | None:
        """Return what the methods add to the loss of the batch."""
        labels = self._samples["labels"]
        logits = checked_call(self._logits, labels, self._calls, type(self.model).__name__, self.settings.method)
        with learner.precision():
            return self._extension.extra_loss(self._samples, logits, labels)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make sure, once in a fit, that changed scores mean to the loss what they should."""
        if self._changed and not self._tried:
            checks.check_pull(self._pulled, self._left_out, type(self.model).__name__, self.settings.method)
            self._tried = True
        self._logits = self._pulled = None

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Let the methods change the gradient of the step, before it is clipped."""
        if self._learner is not None and self._learner.passes:
            self._extension.change_gradient()
            self._stepping = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act on the weights after a step, and remember its samples."""
        learner = self._learner
        assert learner is not None
        if self._passed and self._own is not None and trainer.current_epoch == self._first_epoch:
            self._own.add(self._samples)
        if self._stepping:
            for method in self._extension.methods:
                method.after_step(learner)
            self._extension.remember()
            self.step += 1
            learner.step, learner.passes = self.step, 0
        self._forget_batch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the task, where the stream has tasks."""
        if self.in_task and self.settings.boundaries:
            self._end_task()
        self._shapes = shapes_of(self.model)

    def measure(self, tasks: Mapping[str, Iterable[Any]] | Sequence[Iterable[Any]]) -> tuple[float, ...]:
        """Measure the model on each task of the stream; after a task the scores are a row of `matrix`.

        Args:
            tasks: Held-out batches of all tasks of the stream, in its order, by name or without one.

        Returns:
            Accuracies, or losses in nats; NaN for a task of setting='task' that has not begun.

        Raises:
            SeedbedError: A batch cannot be read, or the tasks are others than before.
        """
        named = dict(tasks) if isinstance(tasks, Mapping) else {f"task {n + 1}": one for n, one in enumerate(tasks)}
        matrix = self.matrix
        if matrix is not None:
            checks.check_names(matrix, named)
        scores = tuple(self._score(number, one) for number, one in enumerate(named.values()))
        self._extension.matrix = recorded(matrix, tuple(named), scores, self.ends, self.in_task, self._data.task)
        return scores

    def _score(self, number: int, batches: Iterable[Any]) -> float:
        """Return the score on a task."""
        masked = TaskAdapter(self._look())
        if self.settings.setting == "task":
            if number >= len(self.tasks):
                return NAN
            learner = self._extension.make_learner(self._look(), self._data, self.tasks)
            masked.answers = learner.allowed(self.tasks[number].answers)
        elif self.settings.setting == "class" and self.tasks:
            # It answers with any class that it has seen.
            learner = self._extension.make_learner(self._look(), self._data, self.tasks)
            seen = self._classes.union(*(task.classes for task in self.tasks))
            masked.answers = learner.allowed(sorted(seen)) if learner.classifies else None
        return score(masked, self._data, batches, self._read, self._precision)

    def state_dict(self) -> dict[str, Any]:
        """Return the tasks, the memory and what the methods keep."""
        return {
            "settings": self.settings.to_dict(), "seed": self.seed, "step": self.step, "ends": list(self.ends),
            "tasks": [[task.name, list(task.classes), list(task.answers)] for task in self.tasks],
            "in_task": self.in_task, "classes": sorted(self._classes), "first_epoch": self._first_epoch,
            "own": None if self._own is None else self._own.state_dict(),
            "shapes": {name: list(shape) for name, shape in shapes_of(self.model).items()},
            "kept": self._extension.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: It is of another method or memory.
        """
        checks.check_same(state_dict, self.settings.method, self.seed)
        self._extension.load_state_dict(state_dict["kept"])
        self.step, self.ends, self.in_task = state_dict["step"], tuple(state_dict["ends"]), state_dict["in_task"]
        self.tasks = [
            replace(task_of(number, name, tuple(answers)), classes=tuple(classes))
            for number, (name, classes, answers) in enumerate(state_dict["tasks"])
        ]
        self._classes, self._first_epoch = set(state_dict["classes"]), state_dict["first_epoch"]
        self._shapes = {name: tuple(shape) for name, shape in state_dict["shapes"].items()}
        self._own = None
        if state_dict["own"] is not None:
            self._own = store_of(self.settings, self.seed, len(self.tasks) - 1)
            self._own.load_state_dict(state_dict["own"])
