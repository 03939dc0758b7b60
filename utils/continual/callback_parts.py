"""How `ContinualCallback` reads batches and scores of foreign code, and measures a task."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from utils.adapters.capture import named_tensors, tensor_at
from utils.adapters.objectives import IGNORED
from utils.continual.accuracy_matrix import AccuracyMatrix
from utils.continual.config import ContinualConfig
from utils.continual.learner import LOGITS, TASK, TaskAdapter
from utils.continual.matrix_parts import NAN
from utils.continual.task import Task
from utils.growth.callback import GrowthCallback
from utils.memory import EpisodicBuffer
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.isolation import preserved
from utils.runtime.seeding import derive_seed
from utils.training.batch_inputs import CONTENT
from utils.training.evaluation import CLASSIFIERS, objective, predicted_classes
from utils.training.prepared_data import PreparedData
from utils.training.state import ModelChange, Undo

RESERVED = (TASK, LOGITS, "slots", "lengths", "target_lengths")
"""Names that remembered samples use themselves."""


class Watch:
    """A forward hook that stays with its model: in a copy, and in a file, it does nothing."""

    def __init__(self, see: Callable[[Any], Any] | None = None) -> None:
        """Give it what is asked about each output: what to return instead, or None."""
        self.see = see

    def __call__(self, module: nn.Module, given: Any, output: Any) -> Any:
        """Ask."""
        return None if self.see is None else self.see(output)

    def __reduce__(self) -> tuple[type["Watch"], tuple[()]]:
        """Leave the trainer and all that hangs on it behind."""
        return Watch, ()


def task_of(number: int, name: str, answers: tuple[int, ...]) -> Task:
    """Return a task whose samples nobody knows beforehand; `answers` are the only classes that answer, if any."""
    nothing = torch.zeros(0, dtype=torch.long)
    return Task(number, name, nothing, nothing, answers, answers=answers)


def store_of(settings: ContinualConfig, seed: int, number: int) -> EpisodicBuffer:
    """Return an empty store for a sample of those that a task shows in its first epoch."""
    seed = derive_seed(seed, "samples of task", number)
    return EpisodicBuffer(settings.fisher_samples, policy="reservoir", seed=seed)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def scores_in(output: Any, path: str) -> Tensor:
    """Return the scores in what a model returned.

    Raises:
        DataError: They are not where they were.
    """
    try:
        return tensor_at(output, path)
    except KeyError:
        found = ", ".join(name or "a tensor" for name, _ in named_tensors(output))
        raise DataError(
            f"The model returned {found or type(output).__name__} in training_step.",
            f"Expected its scores at `{path}`, as when it was looked at.",
            "Return the same structure for every input.",
        ) from None


def replaced(output: Any, path: str, tensor: Tensor) -> Any:
    """Return what a model returned with another tensor in the place of its scores; None where that cannot be done."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, Mapping) and path in output and hasattr(output, "__setitem__"):
        made = copy.copy(output)
        made[path] = tensor
        return made
    if type(output) in (tuple, list) and path.isdecimal():
        return type(output)(tensor if str(place) == path else one for place, one in enumerate(output))
    return None


def as_given(batch: Any) -> Mapping[str, Tensor]:
    """Take a mapping as it is, and of a pair the second as the labels."""
    if isinstance(batch, Mapping):
        return batch
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        raise DataError(
            f"A batch is a {type(batch).__name__}.",
            "Expected a mapping, or a pair of inputs and labels.",
            "Say what is in it: ContinualCallback(..., batch=lambda b: {'pixel_values': b[0], 'labels': b[1]}).",
        )
    return {CONTENT[2] if batch[0].is_floating_point() else CONTENT[0]: batch[0], "labels": batch[1]}


def checked_batch(samples: Any, device: torch.device) -> dict[str, Tensor]:
    """Return a batch on a device, once it is sure that it can be remembered.

    Raises:
        DataError: It cannot.
    """
    wanted = f"Expected {', '.join(CONTENT[:2])} or {CONTENT[2]}, and labels, as tensors with a row for each sample."
    said = "Let ContinualCallback(..., batch=...) return them."
    tensors = isinstance(samples, Mapping) and all(isinstance(one, Tensor) for one in samples.values())
    if not tensors or "labels" not in samples or not any(name in samples for name in CONTENT):
        found = ", ".join(map(str, samples)) if isinstance(samples, Mapping) else type(samples).__name__
        raise DataError(f"A batch has {found or 'nothing'}.", wanted, said)
    if taken := [name for name in samples if name in RESERVED]:
        raise DataError(f"A batch has an entry {taken[0]!r}, a name that the memory uses itself.", wanted, said)
    sizes = {name: len(one) if one.dim() else 0 for name, one in samples.items()}
    if len(set(sizes.values())) > 1 or not sizes["labels"]:
        told = ", ".join(f"{size} rows of {name}" for name, size in sizes.items())
        raise DataError(f"A batch has {told}.", wanted, said)
    moved = {name: one.to(device) for name, one in samples.items()}
    return moved if moved["labels"].is_floating_point() else {**moved, "labels": moved["labels"].long()}


def checked_classes(labels: Tensor, answers: tuple[int, ...], outputs: int, task: str) -> set[int]:
    """Return the classes of a batch.

    Args:
        labels: ``(batch,)``.
        answers: The classes of the task; empty where all may answer.
        outputs: Scores that the model gives; 1 is a choice of two, 0 is unknown.
        task: Its name.

    Raises:
        DataError: A sample has no class, a class has no output, or it is not of the task.
    """
    if labels.is_floating_point() or labels.dim() != 1:
        raise DataError(
            f"A batch of task {task!r} has labels of shape {tuple(labels.shape)} and type {labels.dtype}.",
            "Expected the number of a class for each sample.",
            "Let batch() return such labels, such as labels.argmax(1) of shares.",
        )
    found = {int(one) for one in labels.unique()}
    known = answers or range(max(2, outputs) if outputs else torch.iinfo(torch.int64).max)
    if strange := sorted(found - set(answers) if answers else [one for one in found if one not in known]):
        most = f"{known[-1]}" if outputs or answers else "any number"
        raise DataError(
            f"A batch of task {task!r} has a sample of class {strange[0]}.",
            f"Expected {', '.join(map(str, answers)) if answers else f'numbers from 0 to {most}'}.",
            "Check `labels`, the classes given to begin(), and how many scores the model gives.",
        )
    return found


def checked_call(logits: Tensor | None, labels: Tensor, calls: int, model: str, method: str) -> Tensor:
    """Return the scores that the training step got from the model.

    Args:
        logits: Those of the last call.
        labels: Of the batch.
        calls: How often the model was called.
        model: Its name.
        method: As the settings call it.

    Raises:
        ConfigError: The model was not called once.
        DataError: The scores are not those of the batch.
    """
    if logits is None or calls != 1:
        raise ConfigError(
            f"training_step called the {model} {calls} times with gradients.",
            f"Expected one call of the model itself for each batch: {method!r} works with its scores.",
            "Call it once for all samples, or set method to ewc or si.",
        )
    whole = logits.shape if labels.is_floating_point() else logits.shape[:-1]
    if labels.numel() != whole.numel() or len(logits) != len(labels):
        raise DataError(
            f"The {model} gave scores of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}.",
            "Expected labels of the very samples that training_step gives to the model, aligned with its scores.",
            "Let batch() return both as training_step uses them.",
        )
    return logits


def join_growth(
    growth: GrowthCallback, pl_module: pl.LightningModule, model: nn.Module,
    migrate: Callable[[ModelChange], Undo],
) -> Undo:  # fmt: skip
    """Let what methods keep follow the growth that another callback makes.

    Args:
        growth: The other callback.
        pl_module: What both are in.
        model: The model.
        migrate: Lets what is kept follow.

    Returns:
        What parts the two again.

    Raises:
        ConfigError: The other lets another module grow.
    """
    grows = growth._module(pl_module)
    if grows is not model:
        raise ConfigError(
            f"GrowthCallback lets a {type(grows).__name__} grow, and ContinualCallback has a {type(model).__name__}.",
            "Expected the same module: what is kept of its weights has to grow with them.",
            "Name it to both, such as GrowthCallback(..., model='net') and model=module.net.",
        )
    followed = growth._followed

    def together(trainer: pl.Trainer, change: ModelChange) -> Undo:
        undo_kept = migrate(change)
        try:
            undo_rest = followed(trainer, change)
        except BaseException:
            undo_kept()
            raise

        def undo() -> None:
            undo_rest()
            undo_kept()

        return undo

    object.__setattr__(growth, "_followed", together)
    return lambda: vars(growth).pop("_followed", None) and None


def score(
    adapter: TaskAdapter, data: PreparedData, batches: Iterable[Any], read: Callable[[Any], dict[str, Tensor]],
    precision: Callable[[], AbstractContextManager[Any]],
) -> float:  # fmt: skip
    """Return a model's accuracy on some batches, or its mean loss in nats where samples have no class.

    Args:
        adapter: The model; left as it was.
        data: Says what the model is for.
        batches: Some batches.
        read: Makes samples of one.
        precision: Makes the context of a forward pass.

    Raises:
        DataError: There is no batch, or one is not as it should be.
    """
    total, counted = 0.0, 0
    with preserved(adapter.module, "measure"), torch.no_grad():
        adapter.module.eval()
        for batch in batches:
            samples = read(batch)
            with precision():
                loss, logits, labels = objective(adapter, data, samples, 0)  # type: ignore[arg-type]
            kept = labels != IGNORED
            right = data.task in CLASSIFIERS
            value = float((predicted_classes(logits).reshape(-1) == labels.reshape(-1)).sum()) if right \
                else float(loss) * int(kept.sum())  # fmt: skip
            total, counted = total + value, counted + int(kept.sum())
    if not counted:
        raise DataError(
            "A task was to be measured on no sample.", "Expected at least one.", "Give a loader with samples."
        )
    return total / counted


def recorded(
    matrix: AccuracyMatrix | None, names: tuple[str, ...], scores: tuple[float, ...], ends: tuple[int, ...],
    in_task: bool, task: str,
) -> AccuracyMatrix:  # fmt: skip
    """Return an accuracy matrix with what was measured: before the first task, or as the row of one that has ended.

    Args:
        matrix: The one so far; None before the first measurement.
        names: Of all tasks of the stream.
        scores: On each.
        ends: The step at which each finished task ended; a row of NaN stands for one that was not measured.
        in_task: A task is in progress, of which nothing is recorded.
        task: What the model is for.
    """
    if matrix is None:
        knows = task in CLASSIFIERS
        untrained = None if ends or in_task else scores
        matrix = AccuracyMatrix(
            names, untrained=untrained, higher_is_better=knows, unit="accuracy" if knows else "nats"
        )  # fmt: skip
    if not in_task and len(ends) > len(matrix.rows):
        for end in ends[len(matrix.rows) : -1]:
            matrix = matrix.with_row((NAN,) * len(names), end)
        matrix = matrix.with_row(scores, ends[-1])
    return matrix
