"""The samples that a transfer is verified on: none of them is in the package, or learned from by a student."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.adapters.objectives import IGNORED, REAL_VALUED
from utils.concepts.checks import as_tensor
from utils.concepts.content import Content, checked_groups, paired_content, paired_groups, read_content
from utils.concepts.layer_reading import on_device
from utils.concepts.package import ConceptPackage
from utils.concepts.retention import answers, fitted_batches
from utils.concepts.transfer import exemplars_for
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.isolation import preserved

LEAST_TEST = 20
"""Different test samples on each side."""
THE_CONCEPT = 0.95
"""Share of samples with the label that is the most frequent on their side, from which a task is the concept itself."""


@dataclass(frozen=True)
class TestSet:
    """Samples with and without a concept."""

    __test__ = False  # pytest takes classes of such a name for its own

    content: Content
    """The samples, those with the concept first."""
    labels: Tensor
    """bool ``(n,)``: whether each has the concept."""
    clusters: tuple[str, ...]
    """What each belongs to: its group, or itself."""

    def in_the_form_of(self, student_test: Any) -> "TestSet":
        """Return the same samples as a student takes them.

        Raises:
            ConfigError: They are no pair.
            DataError: They are not as many.
        """
        counts = int(self.labels.sum()), int((~self.labels).sum())
        content = paired_content(
            student_test, counts, "student_test", "test samples", "those of the teacher in the same order",
            "Give the same samples on both sides.",
        )  # fmt: skip
        return TestSet(content, self.labels, self.clusters)


@dataclass(frozen=True)
class OtherTask:
    """What a student is for, to be measured before and after."""

    inputs: Any
    """The samples."""
    hashes: tuple[str, ...]
    """Of each of them."""
    labels: Tensor
    """int64 ``(n,)``, or ``(n, positions)`` with -100 where a position does not count."""
    groups: tuple[str, ...]
    """Of each sample; empty where none are told."""

    def clusters(self, tests: TestSet) -> tuple[str, ...]:
        """Return what each sample belongs to; where none is told, what the test sample that it is belongs to."""
        if self.groups:
            return self.groups
        known = dict(zip(tests.content.hashes(), tests.clusters, strict=True))
        return tuple(known.get(own, own) for own in self.hashes)

    def change(self, before: ModelAdapter, after: ModelAdapter, tokenizer: Any) -> Tensor:
        """Return for each sample the change of its share of right answers, from -1 to 1: ``(n,)``.

        Raises:
            ConfigError: The student's answers are numbers, or it does not take the samples.
            DataError: It answers otherwise than the labels, or none of them right.
        """
        if before.task.value in REAL_VALUED:
            raise ConfigError(
                f"The {before.name} is for {before.task.value}, whose answers are numbers.",
                "Expected classes: interference is counted in points of accuracy.",
                "Leave out other_task; Transfer.changed tells how far its outputs moved.",
            )
        batches = fitted_batches(before, self.inputs, tokenizer, "samples of the other task")
        labels, counted = self.labels, self.labels != IGNORED

        def right(adapter: ModelAdapter) -> Tensor:
            rows = []
            with preserved(adapter.module, 0, "other task"), torch.no_grad():
                adapter.module.eval()
                for batch in batches.batches:
                    for start in range(0, len(next(iter(batch.values()))), 256):
                        piece = {name: value[start : start + 256] for name, value in batch.items()}
                        rows.append(answers(adapter.logits(on_device(adapter, piece)).float()).cpu())
            if (
                not all(row.ndim for row in rows)
                or len({row.shape[1:] for row in rows}) > 1
                or (found := batches.restored(torch.cat(rows))).shape != labels.shape
            ):
                raise DataError(
                    f"The student answers {tuple(rows[0].shape[1:])} per sample, and the labels are "
                    f"{tuple(labels.shape)}.",
                    "Expected a label for each answer.",
                    "Give labels (n,), or (n, positions) for a model that answers at each position.",
                )
            hits = (found == labels) & counted
            return hits.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1) if labels.ndim > 1 else hits.double()

        known = right(before)
        if not bool(known.any()):
            raise DataError(
                f"The student answers none of the {len(labels)} samples of the other task right.",
                "Expected something that it knows: what is not there cannot be lost.",
                "Give labels as the student counts its classes, or leave out other_task.",
            )
        return (right(after) - known).double()


def unseen_tests(package: ConceptPackage, examples: Any, counter_examples: Any, groups: Any) -> TestSet:
    """Return a test set that is disjoint from a package by content and by groups.

    Args:
        package: What is verified.
        examples: Test samples with the concept.
        counter_examples: Test samples without it.
        groups: Of each, on either side; None where the package has none.

    Raises:
        DataError: Too few samples, some are on both sides or in the package, or groups are told of one of both only.
    """
    sides = [read_content(examples, "test examples"), read_content(counter_examples, "test counter-examples")]
    content = sides[0].joined(sides[1])
    labels = torch.arange(len(content)) < len(sides[0])
    hashes = content.hashes()
    parted = [set(hashes[: len(sides[0])]), set(hashes[len(sides[0]) :])]
    for what, side in zip(("examples", "counter-examples"), parted, strict=True):
        if len(side) < LEAST_TEST:
            raise DataError(
                f"There are {len(side)} different test {what}.",
                f"Expected {LEAST_TEST} at least.",
                "Give more: some hundreds make an interval that says something.",
            )
    _refuse(len(parted[0] & parted[1]), "test examples are among the test counter-examples too")
    _refuse(len({*hashes} & {*package.content.hashes()}), "test samples are in the package")
    if groups is None:
        if package.groups:
            raise DataError(
                "The package tells the groups of its exemplars, and the test samples come without.",
                "Expected groups, to check that none is on both sides.",
                "Pass groups=(of the examples, of the counter-examples).",
            )
        return TestSet(content, labels, hashes)
    if not package.groups:
        raise DataError(
            "The test samples come with groups, and the package does not tell those of its exemplars.",
            "Expected both or neither: a group on both sides would make the test easier than it looks.",
            "Pass groups to extract_concept too.",
        )
    told = paired_groups(groups, (len(sides[0]), len(sides[1])), ("test examples", "test counter-examples"))
    clusters = told[0] + told[1]
    _refuse(len({*clusters} & {*package.groups}), "groups of the test samples are in the package")
    return TestSet(content, labels, clusters)


def unseen_by(
    package: ConceptPackage, shown: TestSet, retention: Any, other_task: Any, student_examples: Any
) -> OtherTask | None:
    """Refuse a test set that the student learns from, and return its other task, if one is told.

    Args:
        package: What is verified.
        shown: The test set as the student takes it.
        retention: Samples of what the student is for, or None.
        other_task: ``(inputs, labels)`` or ``(inputs, labels, groups)``, or None.
        student_examples: The package's exemplars as the student takes them, or None.

    Raises:
        ConfigError: The other task is of another form.
        DataError: Samples are on both sides, or the other task is the concept itself.
    """
    hashes = shown.content.hashes()
    trained = {*exemplars_for(package, student_examples).hashes()}
    _refuse(len({*hashes} & trained), "test samples are among the student's exemplars")
    kept = set() if retention is None else {*read_content(retention, "samples to be retained").hashes()}
    _refuse(len({*hashes} & kept), "test samples are among the samples to be retained")
    if other_task is None:
        return None
    several = isinstance(other_task, (tuple, list)) and len(other_task) in (2, 3)
    labels = as_tensor(other_task[1]) if several else None
    if not isinstance(labels, Tensor):
        raise ConfigError(
            f"other_task is a {type(other_task).__name__}{' without a tensor of classes' * several}.",
            "Expected samples and a tensor of their classes, and their groups where there are any.",
            "Write other_task=(inputs, labels) or other_task=(inputs, labels, groups).",
        )
    others = read_content(other_task[0], "samples of the other task")
    if labels.shape[:1] != (len(others),):
        raise DataError(
            f"The other task has {len(others)} samples, and labels of the shape {tuple(labels.shape)}.",
            "Expected a label for each.",
            "Give them in the same order.",
        )
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"The labels of the other task are of the type {labels.dtype}.".replace("torch.", ""),
            "Expected whole numbers, the classes.",
            "Give them as int64.",
        )
    groups = checked_groups(other_task[2], len(others), "samples of the other task") if len(other_task) == 3 else ()
    other = OtherTask(other_task[0], others.hashes(), labels.detach().cpu(), groups)
    _refuse(
        len({*other.hashes} & (kept | trained)), "samples of the other task are among those the student learns from"
    )
    if labels.ndim == 1:
        _refuse_the_concept(shown, other)
    return other


def _refuse_the_concept(shown: TestSet, other: OtherTask) -> None:
    """Refuse an other task whose labels tell the concept, on the test samples that it has."""
    sides = dict(zip(shown.content.hashes(), shown.labels.tolist(), strict=True))
    shared = [
        (sides[key], label) for key, label in zip(other.hashes, other.labels.tolist(), strict=True) if key in sides
    ]
    most = {side: Counter(label for own, label in shared if own == side).most_common(1) for side in (True, False)}
    if not most[True] or not most[False] or most[True][0][0] == most[False][0][0]:
        return
    alike = (most[True][0][1] + most[False][0][1]) / len(shared)
    if alike >= THE_CONCEPT:
        raise DataError(
            f"The labels of the other task part {alike:.0%} of the test samples among its samples as the concept does.",
            "Expected another task: what the student was for before it learned the concept.",
            "Give the classes that the student was trained for, or leave other_task out.",
        )


def _refuse(count: int, what: str) -> None:
    if count:
        raise DataError(
            f"{count} {what}.", "Expected a disjoint test set: one that was learned from proves nothing.",
            "Take them off one of the sides.",
        )  # fmt: skip
