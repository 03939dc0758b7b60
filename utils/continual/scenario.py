"""From some data to a stream of tasks, as a pure function of the data, the settings and the seed."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from utils.continual.config import ContinualConfig
from utils.continual.task import Task, permuted
from utils.runtime.errors import DataError
from utils.runtime.seeding import derive_seed
from utils.training.batch_inputs import CONTENT
from utils.training.evaluation import CLASSIFIERS
from utils.training.prepared_data import PreparedData

PERMUTED_TASKS = 5
CLASSES_PER_TASK = 2
IDENTITY = "as it is"


def make_tasks(data: PreparedData, settings: ContinualConfig, seed: int) -> list[Task]:
    """Divide some data into a stream of tasks.

    Args:
        data: The data.
        settings: How.
        seed: Decides the order of classes, if they are shuffled, permutations, and which samples a task takes.

    Raises:
        DataError: The data cannot be divided so.
    """
    if data.stream is not None:
        raise DataError(
            f"{data.reference} is read while training.",
            "Expected samples that can be divided into tasks before the first step.",
            "Leave out ?stream=true.",
        )
    if data.task in CLASSIFIERS:
        _check_classes(data)
    makers = {"labels": _by_labels, "permutation": _by_permutation, "parts": _by_parts}
    tasks = makers[settings.split](data, settings, seed)
    if settings.samples_per_task is not None:
        tasks = [_limited(task, settings.samples_per_task, seed) for task in tasks]
    for task in tasks:
        for side, rows in (("train on", task.train), ("measure on", task.validation)):
            if not len(rows):
                raise DataError(
                    f"Task {task.number + 1} ({task.name}) of {data.reference} has no sample to {side}.",
                    "Expected at least one of each: a task that cannot be measured cannot be seen to be forgotten.",
                    "Make fewer tasks, or hold out another share with TrainingConfig.validation_share.",
                )
    if settings.setting != "class":
        _check_choice(tasks, data, settings)
    return tasks


def check_outputs(tasks: Sequence[Task], outputs: int, reference: str) -> None:
    """Make sure that a classifier has an output for every class of a stream, which tasks can open and close.

    Args:
        tasks: The stream.
        outputs: Scores that the model gives.
        reference: Where the data is from, for the message.

    Raises:
        DataError: It has fewer.
    """
    top = max((one for task in tasks for one in (*task.classes, *task.answers)), default=-1)
    if not outputs and any(task.answers for task in tasks):
        raise DataError(
            "How many scores the model gives is unknown.",
            f"Expected a known number: in {reference} only the classes of a task may answer.",
            "Say it with ModelSpec(num_labels=...).",
        )
    if top >= outputs > 0:
        alone = "; a single score is a choice of two, and no output can be left out of it" if outputs == 1 else ""
        raise DataError(
            f"The tasks of {reference} have classes up to number {top}, and the model gives {outputs} "
            f"score{'' if outputs == 1 else 's'}{alone}.",
            "Expected one output for each class, those of the last task included.",
            f"Build the model with num_classes={top + 1}.",
        )


def _check_classes(data: PreparedData) -> None:
    """Refuse data with nothing to tell apart, or with classes that nothing is learned of."""
    train, held = ({int(one) for one in side["labels"].unique()} for side in (data.train, data.validation))
    if min(train | held) < 0:
        raise DataError(
            f"{data.reference} has labels from {min(train | held)}.",
            "Expected classes from 0: labels are the numbers of outputs.",
            "Number the classes from 0, and leave out samples without one.",
        )
    if len(train) < 2:
        raise DataError(
            f"{data.reference} has the one class {min(train)} to train on.",
            "Expected at least two: of one class every answer is right.",
            "Use data with more classes.",
        )
    if unseen := sorted(held - train):
        raise DataError(
            f"{data.reference} holds out samples of class {', '.join(map(str, unseen))}, and has none to train on.",
            "Expected every class that is measured in some task's training data.",
            "Leave these samples out, or let other samples be held out.",
        )


def _check_choice(tasks: Sequence[Task], data: PreparedData, settings: ContinualConfig) -> None:
    """Refuse tasks in which every answer is right, and tasks that share no output although they are to."""
    single = next((task for task in tasks if len(task.classes) == 1), None)
    if single is not None and (settings.setting == "task" or settings.split == "labels"):
        raise DataError(
            f"Task {single.number + 1} ({single.name}) of {data.reference} has one class, and "
            f"setting={settings.setting!r} lets only a task's own classes answer.",
            "Expected at least two in each task: of one class every answer is right.",
            "Make fewer tasks, or set ContinualConfig.setting to 'class'.",
        )
    apart = next((task for task in tasks if task.classes and set(task.classes).isdisjoint(tasks[0].classes)), None)
    if apart is not None and settings.setting == "domain":
        raise DataError(
            f"Task {apart.number + 1} ({apart.name}) of {data.reference} has the classes "
            f"{', '.join(map(str, apart.classes))}, and the first has {', '.join(map(str, tasks[0].classes))}.",
            "Expected the same classes in each task for setting='domain': the tasks share their outputs.",
            "Set ContinualConfig.setting to 'class' or 'task'.",
        )


def _classes(data: PreparedData, settings: ContinualConfig) -> list[int]:
    """Return the classes of some data, ascending."""
    if data.task not in CLASSIFIERS or data.train["labels"].dim() != 1:
        raise DataError(
            f"{data.reference} was prepared for {data.task}, where samples have no class.",
            f"Expected a classifier's data for split={settings.split!r}.",
            "Set ContinualConfig.split to 'parts' and give several references, one for each task.",
        )
    return [int(one) for one in data.train["labels"].unique()]


def _by_labels(data: PreparedData, settings: ContinualConfig, seed: int) -> list[Task]:
    """Give each task its own classes."""
    classes = _classes(data, settings)
    count = settings.tasks or max(1, len(classes) // CLASSES_PER_TASK)
    if count > len(classes):
        raise DataError(
            f"ContinualConfig.tasks is {count}, and {data.reference} has {len(classes)} classes.",
            "Expected at least one class for each task.",
            f"Set tasks to {len(classes)} or less.",
        )
    order = classes
    if settings.shuffle_classes:
        generator = torch.Generator().manual_seed(derive_seed(seed, "class order"))
        order = [classes[int(place)] for place in torch.randperm(len(classes), generator=generator)]
    sizes = [len(classes) // count + (number < len(classes) % count) for number in range(count)]
    if settings.setting == "domain" and len(set(sizes)) > 1:
        raise DataError(
            f"{len(classes)} classes do not divide evenly into {count} tasks.",
            "Expected as many classes in each task: they share the same outputs (setting='domain').",
            "Choose a number of tasks that divides the number of classes.",
        )
    tasks, start = [], 0
    for number, size in enumerate(sizes):
        own = tuple(order[start : start + size])
        start += size
        names = data.facts.get("class_names") or {}
        told = ", ".join(str(names[one] if one < len(names) else one) for one in own) if names else \
            ", ".join(map(str, own))  # fmt: skip
        task = Task(
            number, told, _rows(data.train["labels"], own), _rows(data.validation["labels"], own), tuple(sorted(own)),
            answers=tuple(sorted(own)) if settings.setting == "task" else (),
        )  # fmt: skip
        if settings.setting == "domain":
            task = replace(task, relabelled=own, classes=tuple(range(size)))
        tasks.append(task)
    return tasks


def _by_permutation(data: PreparedData, settings: ContinualConfig, seed: int) -> list[Task]:
    """Show all samples in each task, their entries in an order of its own; in the first as they are."""
    name = next(name for name in CONTENT if name in data.train)
    content = data.train[name]
    if not content.is_floating_point():
        raise DataError(
            f"The samples of {data.reference} are {name} of type {content.dtype}.",
            "Expected numbers such as pixels: the order of tokens is what a text says.",
            "Set ContinualConfig.split to labels or parts.",
        )
    entries = content[0].numel()
    every = torch.arange(data.train_samples), torch.arange(data.validation_samples)
    classes = tuple(_classes(data, settings)) if data.task in CLASSIFIERS else ()
    return [
        Task(
            number, f"order {number + 1}" if number else IDENTITY, *every, classes,
            permuted(entries, derive_seed(seed, "permutation", number)) if number else None,
        )
        for number in range(settings.tasks or PERMUTED_TASKS)
    ]  # fmt: skip


def _by_parts(data: PreparedData, settings: ContinualConfig, seed: int) -> list[Task]:
    """Make a task of each of the parts that the data was given in."""
    parts: Sequence[dict[str, int | str]] = data.facts.get("parts", ())
    if len(parts) < 2:
        raise DataError(
            f"{data.reference} is one part.",
            "Expected several references for split='parts', one for each task.",
            "Give a list, such as data=['file:a.txt', 'file:b.txt'], or a column: file:all.csv?task=COLUMN",
        )
    if settings.tasks not in (None, len(parts)):
        raise DataError(
            f"ContinualConfig.tasks is {settings.tasks}, and {data.reference} has {len(parts)} parts.",
            "Expected one task for each part.",
            "Set tasks to None.",
        )
    tasks, train, validation = [], 0, 0
    for number, part in enumerate(parts):
        own = int(part["train"]), int(part["validation"])
        rows = torch.arange(train, train + own[0]), torch.arange(validation, validation + own[1])
        train, validation = train + own[0], validation + own[1]
        labels = data.train["labels"][rows[0]] if data.task in CLASSIFIERS else torch.zeros(0)
        classes = tuple(int(one) for one in labels.unique())
        answers = classes if settings.setting == "task" else ()
        tasks.append(Task(number, str(part["name"]), *rows, classes, answers=answers))
    return tasks


def _rows(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the numbers of the samples of some classes."""
    return torch.isin(labels, torch.tensor(classes)).nonzero().flatten()


def _limited(task: Task, count: int, seed: int) -> Task:
    """Keep some of a task's training samples, drawn at random."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "task samples", task.number))
    chosen = torch.randperm(len(task.train), generator=generator)[:count]
    return replace(task, train=task.train[chosen.sort().values])
