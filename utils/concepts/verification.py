"""Measures on a disjoint test set what students learned from a package, beside students that learned from nothing.

V is the share of the way from a shuffled package to the teacher that the package goes. A shuffled package has the same
samples, targets and relations, dealt anew, and the same training; so what any training does to a readout counts for
nothing. V is not clipped: a student better than its teacher has more than 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.adapters.activations import representations
from utils.adapters.objectives import IGNORED, REAL_VALUED
from utils.concepts.content import Content, checked_groups, read_content
from utils.concepts.examples import Examples
from utils.concepts.layer_reading import on_device
from utils.concepts.package import ConceptPackage
from utils.concepts.readout import ConceptReadout
from utils.concepts.resampling import METRICS, Resamples, plain_metric, weighted_metric
from utils.concepts.retention import answers, fitted_batches
from utils.concepts.similarity import similarity
from utils.concepts.transfer import Transfer, check_package, exemplars_for, transfer_concept
from utils.concepts.transfer_config import TransferConfig
from utils.concepts.verification_result import Fidelity, TransferVerification, said
from utils.memory.key_reader import adapter_of, tokenizer_of
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.isolation import preserved
from utils.runtime.seeding import derive_seed
from utils.validation.statistics import Interval

LEAST_SEEDS, LEAST_TEST = 5, 20
"""Students for a verdict, and different test samples on each side."""
DRAWS = 10_000
MARGIN = 0.05
"""Least lower bound of f(teacher) - f(shuffled): below, V would be a ratio of noise."""
KNOWN = 0.95
"""Share of the way from a shuffled package to the teacher above which a student knew the concept before."""
COMPARED = 400
"""Test samples whose neighbours are compared, at most."""


def verify_transfer(
    package: ConceptPackage, teacher: Any, students: Any, examples: Any, counter_examples: Any, *,
    config: TransferConfig | None = None, seeds: int = LEAST_SEEDS, retention: Any = None, other_task: Any = None,
    groups: tuple[Sequence[Any], Sequence[Any]] | None = None, student_test: tuple[Any, Any] | None = None,
    student_examples: tuple[Any, Any] | None = None, tokenizer: Any = None, student_tokenizer: Any = None,
    metric: str = "auroc", baselines: bool = True, seed: int = 0,
) -> TransferVerification:  # fmt: skip
    """Teach students with a package, with shuffled ones and with labels alone, and score all on a test set.

    Args:
        package: What is verified.
        teacher: The model that it is of.
        students: A student, which is taught once for each seed, or a list of them, one for each seed.
        examples: Test samples with the concept, which neither model has seen, as the teacher takes them.
        counter_examples: Test samples without it.
        config: Settings of the transfer.
        seeds: How many times a single student is taught; five at least.
        retention: Samples of what the student is for, see `transfer_concept`.
        other_task: Samples of what the student is for, in none of the above, and their classes: ``(inputs, labels)``.
            Labels ``(n,)``, or ``(n, positions)`` with -100 where a position does not count. Also
            ``(inputs, labels, groups)``, with the source or template of each; where a sample is a test sample too, its
            group is known from there.
        groups: The source or template of each test sample, on either side; the package must have groups too.
        student_test: The test samples in the form that the student takes.
        student_examples: The package's exemplars in that form.
        tokenizer: The teacher's, for texts; None takes the run's.
        student_tokenizer: The student's.
        metric: f: ``"auroc"`` or ``"balanced_accuracy"``.
        baselines: Also train on a second shuffled package and on labels alone; without them there is no verdict.
        seed: Of all that is drawn.

    Raises:
        ConfigError: Fewer than five seeds, an unknown metric, or inputs that a model does not take.
        DataError: Too few test samples, or some that are in the package, the retained samples or on both sides.
        PackageError: The teacher is another model.
    """
    check_package(package)
    config = config or TransferConfig()
    learners = _learners(students, seeds)
    if metric not in METRICS:
        raise ConfigError(f"The metric is {metric!r}.", f"Expected one of {', '.join(METRICS)}.", "Choose one.")
    read = package.readout(teacher)
    tests = _tests(package, examples, counter_examples, groups)
    shown = tests if student_test is None else _student_tests(student_test, tests)
    _check_unseen(package, shown, retention, other_task, student_examples)
    expert = fitted_batches(read.adapter, tests.content, tokenizer_of(teacher, tokenizer), "test samples")
    labels, first = tests.labels, learners[0]
    taught: dict[str, list[Tensor]] = {}
    correct: list[Tensor] = []
    changed: list[float] = []
    neighbours: dict[str, Any] | None = None
    # Adapters are made once: a single student is the same every time.
    adapters = {id(model): adapter_of(model) for model in learners}
    for number, model in enumerate(learners):
        adapter, tokens = adapters[id(model)], tokenizer_of(model, student_tokenizer)
        own = fitted_batches(adapter, shown.content, tokens, "test samples")
        lessons = _lessons(package, derive_seed(seed, "lesson", number), baselines)
        for name, (lesson, alone) in lessons.items():
            made = transfer_concept(
                lesson, adapter, config, retention=retention, student_examples=student_examples, tokenizer=tokens,
                labels_only=alone, seed=derive_seed(seed, "student", number),
            )  # fmt: skip
            taught.setdefault(name, []).append(made.readout.score(own))
            if name == "package":
                taught.setdefault("before", []).append(made.before.score(own))
                changed.append(made.changed)
                if other_task is not None:
                    correct.append(_other_task(made, adapter, other_task, tokens))
                if number == 0 and baselines:
                    neighbours = _neighbours(read, made.readout, expert, own, seed)
    return _result(
        package, metric, tests, shown, read, adapters[id(first)], read.score(expert),
        {name: torch.stack(rows) for name, rows in taught.items()}, labels, correct, other_task, changed, neighbours,
        seed,
    )  # fmt: skip


@dataclass(frozen=True)
class _Tests:
    """A test set."""

    content: Content
    labels: Tensor
    clusters: tuple[str, ...]


def _learners(students: Any, seeds: int) -> list[Any]:
    """Return a student for each seed."""
    several = isinstance(students, (list, tuple))
    count = len(students) if several else seeds
    if isinstance(count, bool) or not isinstance(count, int) or count < LEAST_SEEDS:
        raise ConfigError(
            f"There are {count!r} {'students' if several else 'seeds'}.",
            f"Expected {LEAST_SEEDS} at least: fewer say nothing about how much of a score is chance.",
            "Give more; to try a transfer out, use transfer_concept.",
        )
    return list(students) if several else [students] * count


def _lessons(package: ConceptPackage, seed: int, baselines: bool) -> dict[str, tuple[ConceptPackage, bool]]:
    """Return what students learn from, by name, and whether they see labels alone."""
    made = {"package": (package, False), "shuffled": (package.shuffled(derive_seed(seed, "shuffled")), False)}
    if baselines:
        made |= {"junk": (package.shuffled(derive_seed(seed, "junk")), False), "labels_only": (package, True)}
    return made


def _tests(package: ConceptPackage, examples: Any, counter_examples: Any, groups: Any) -> _Tests:
    """Return the test set, disjoint from the package by content and by groups."""
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
        return _Tests(content, labels, hashes)
    if not package.groups:
        raise DataError(
            "The test samples come with groups, and the package does not tell those of its exemplars.",
            "Expected both or neither: a group on both sides would make the test easier than it looks.",
            "Pass groups to extract_concept too.",
        )
    told = checked_groups(groups[0], len(sides[0]), "test examples") + checked_groups(
        groups[1], len(sides[1]), "test counter-examples"
    )
    _refuse(len({*told} & {*package.groups}), "groups of the test samples are in the package")
    return _Tests(content, labels, told)


def _student_tests(student_test: tuple[Any, Any], tests: _Tests) -> _Tests:
    """Return the test set in the student's form."""
    sides = [read_content(part, "student's test samples") for part in student_test]
    wanted = int(tests.labels.sum()), int((~tests.labels).sum())
    if (len(sides[0]), len(sides[1])) != wanted:
        raise DataError(
            f"There are {len(sides[0])} and {len(sides[1])} test samples for the student.",
            f"Expected {wanted[0]} and {wanted[1]}, those of the teacher in the same order.",
            "Give the same samples on both sides.",
        )
    return _Tests(sides[0].joined(sides[1]), tests.labels, tests.clusters)


def _check_unseen(
    package: ConceptPackage, shown: _Tests, retention: Any, other_task: Any, student_examples: Any
) -> None:
    """Refuse a test set that the student learns from."""
    hashes = {*shown.content.hashes()}
    trained = {*exemplars_for(package, student_examples).hashes()}
    _refuse(len(hashes & trained), "test samples are among the student's exemplars")
    kept = set() if retention is None else {*read_content(retention, "samples to be retained").hashes()}
    _refuse(len(hashes & kept), "test samples are among the samples to be retained")
    if other_task is None:
        return
    several = isinstance(other_task, (tuple, list)) and len(other_task) in (2, 3)
    if not several or not isinstance(other_task[1], Tensor):
        raise ConfigError(
            f"other_task is a {type(other_task).__name__}.",
            "Expected samples and a tensor of their classes, and their groups where there are any.",
            "Write other_task=(inputs, labels) or other_task=(inputs, labels, groups).",
        )
    others = read_content(other_task[0], "samples of the other task")
    if len(others) != len(other_task[1]):
        raise DataError(
            f"The other task has {len(others)} samples and {len(other_task[1])} labels.",
            "Expected a label for each.",
            "Give them in the same order.",
        )
    if other_task[1].is_floating_point() or other_task[1].is_complex():
        raise DataError(
            f"The labels of the other task are of the type {other_task[1].dtype}.".replace("torch.", ""),
            "Expected whole numbers, the classes.",
            "Give them as int64.",
        )
    if len(other_task) == 3:
        checked_groups(other_task[2], len(others), "samples of the other task")
    _refuse(
        len({*others.hashes()} & (kept | trained)), "samples of the other task are among those the student learns from"
    )


def _refuse(count: int, what: str) -> None:
    if count:
        raise DataError(
            f"{count} {what}.", "Expected a disjoint test set: one that was learned from proves nothing.",
            "Take them off one of the sides.",
        )  # fmt: skip


def _other_task(made: Transfer, before: ModelAdapter, other_task: Any, tokenizer: Any) -> Tensor:
    """Return for each sample the change of its share of right answers, from -1 to 1: ``(n,)``."""
    inputs, labels = other_task[:2]
    if before.task.value in REAL_VALUED:
        raise ConfigError(
            f"The {before.name} is for {before.task.value}, whose answers are numbers.",
            "Expected classes: interference is counted in points of accuracy.",
            "Leave out other_task; Transfer.changed tells how far its outputs moved.",
        )
    batches = fitted_batches(before, inputs, tokenizer, "samples of the other task")
    counted = labels != IGNORED

    def right(adapter: ModelAdapter) -> Tensor:
        rows = []
        with preserved(adapter.module, 0, "other task"), torch.no_grad():
            adapter.module.eval()
            for batch in batches.batches:
                for start in range(0, len(next(iter(batch.values()))), 256):
                    piece = {name: value[start : start + 256] for name, value in batch.items()}
                    rows.append(answers(adapter.logits(on_device(adapter, piece)).float()).cpu())
        if (
            len({row.shape[1:] for row in rows}) > 1
            or (found := batches.restored(torch.cat(rows))).shape != labels.shape
        ):
            raise DataError(
                f"The student answers {tuple(rows[0].shape[1:])} per sample, and the labels are {tuple(labels.shape)}.",
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
    return (right(made.readout.adapter) - known).double()


def _neighbours(
    teacher: ConceptReadout, student: ConceptReadout, expert: Examples, own: Examples, seed: int
) -> dict[str, Any]:
    """Return how many nearest neighbours both have in common, from what chance gives."""
    tables = []
    for reader, samples in ((teacher, expert), (student, own)):
        made = representations(
            reader.adapter, samples.batches, reader.layer, reader.pool, side=reader.side, channels=reader.channels
        )
        tables.append(samples.restored(made.values))
    generator = torch.Generator().manual_seed(derive_seed(seed, "neighbours"))
    some = torch.randperm(len(tables[0]), generator=generator)[:COMPARED]
    found = similarity(tables[0][some], tables[1][some], "neighbours", neighbours=min(10, len(some) // 2), seed=seed)
    return {name: value for name, value in found.to_dict().items() if name != "null"}


def _result(
    package: ConceptPackage, metric: str, tests: _Tests, shown: _Tests, read: ConceptReadout, student: ModelAdapter,
    expert: Tensor, taught: Mapping[str, Tensor], labels: Tensor, correct: list[Tensor], other_task: Any,
    changed: list[float], neighbours: dict[str, Any] | None, seed: int,
) -> TransferVerification:  # fmt: skip
    """Return all numbers with their intervals."""
    count = len(changed)
    draws = Resamples(tests.clusters, labels.long(), count, DRAWS, seed)
    scores = {name: tuple(plain_metric(metric, row, labels) for row in rows) for name, rows in taught.items()}
    means = {name: sum(row) / count for name, row in scores.items()} | {"teacher": plain_metric(metric, expert, labels)}
    drawn = {"teacher": weighted_metric(metric, expert, labels, draws.samples)}
    for name, rows in taught.items():
        table = torch.stack([weighted_metric(metric, row, labels, draws.samples) for row in rows])
        drawn[name] = draws.over_students(table)
    intervals = {name: draws.interval(means[name], values) for name, values in drawn.items()}

    def difference(name: str, other: str) -> Interval:
        return draws.interval(means[name] - means[other], drawn[name] - drawn[other])

    def share(name: str) -> Interval:
        way, ways = means["teacher"] - means["shuffled"], drawn["teacher"] - drawn["shuffled"]
        return draws.interval((means[name] - means["shuffled"]) / way, (drawn[name] - drawn["shuffled"]) / ways)

    undefined = _undefined(intervals["teacher"], difference("teacher", "shuffled"))
    if undefined is None and (known := share("before")).low > KNOWN:
        undefined = (
            f"the student knew the concept before: read off it as it was, it scores {means['before']:.3f}, which is "
            f"{known.mean:.1%} of the way to the teacher's {means['teacher']:.3f} (95% at least {known.low:.1%})"
        )
    both = "labels_only" in taught
    return TransferVerification(
        package.name, read.adapter.name, student.name, metric, count, (int(labels.sum()), int((~labels).sum())), scores,
        intervals, share("package") if undefined is None else None, undefined,
        share("junk") if both and undefined is None else None,
        share("labels_only") if both and undefined is None else None, share("before") if undefined is None else None,
        difference("package", "before"),
        difference("package", "labels_only") if both else None,
        _interference(correct, other_task, shown, seed) if correct else None,
        _fidelity(taught, expert, labels, draws) if both else None, neighbours, tuple(changed),
    )  # fmt: skip


def _undefined(teacher: Interval, way: Interval) -> str | None:
    """Return why the way from a shuffled package to the teacher is no measure; None if it is one."""
    if way.low > MARGIN:
        return None
    if teacher.low <= 0.5:
        return f"the teacher does not have the concept: it scores {said(teacher)}"
    return (
        f"the teacher is not better than a student with a shuffled package by {MARGIN} at least "
        f"(the difference is {said(way)})"
    )


def _interference(correct: list[Tensor], other_task: Any, shown: _Tests, seed: int) -> Interval:
    """Return the change of the accuracy on the other task, in points; samples of one group are drawn together."""
    table = torch.stack(correct)
    clusters = read_content(other_task[0]).hashes()
    if len(other_task) == 3:
        clusters = checked_groups(other_task[2], len(clusters), "samples of the other task")
    else:
        known = dict(zip(shown.content.hashes(), shown.clusters, strict=True))
        clusters = tuple(known.get(own, own) for own in clusters)
    draws = Resamples(clusters, torch.zeros(len(clusters), dtype=torch.int64), len(table), DRAWS, seed)
    return draws.interval(100 * float(table.mean()), 100 * draws.means(table))


def _fidelity(taught: Mapping[str, Tensor], expert: Tensor, labels: Tensor, draws: Resamples) -> Fidelity | None:
    """Return how far the students share the teacher's mistakes."""
    told = expert > 0
    wrong = told != labels
    if not bool(wrong.any()):
        return None
    same = {name: ((taught[name] > 0) == told).double() for name in ("package", "labels_only")}
    more = same["package"] - same["labels_only"]
    return Fidelity(
        int(wrong.sum()), float(same["package"][:, wrong].mean()), float(same["labels_only"][:, wrong].mean()),
        draws.interval(float(more[:, wrong].mean()), draws.means(more, wrong)), float(same["package"].mean()),
    )  # fmt: skip
