"""Measures on a disjoint test set what students learned from a package, beside students that learned from nothing.

V is the share of the way from a shuffled package to the teacher that the package goes. A shuffled package has the same
samples, targets and relations, dealt anew, and the same training; so what any training does to a readout counts for
nothing. V is not clipped: a student better than its teacher has more than 1.

How a shuffled package is dealt moves its score about as much as the draw of the test samples does: by chance it says a
little of the concept, or of its opposite. The score in V is a mean over deals, a new one for each student; the interval
of V is about any single one of them in its place. So a meaningless package, which is a single deal too, has 0 in its
interval at least as often as the interval says (99.5% measured over 40 deals on digits, where the interval for the mean
of the deals had it in 96.8%; that one is too narrow where the luck of the deal is most of what a package scores). The
junk that the verdict asks for is dealt anew for each student as well, so it is held against the mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.adapters.activations import representations
from utils.concepts.examples import Examples
from utils.concepts.package import ConceptPackage
from utils.concepts.readout import ConceptReadout
from utils.concepts.resampling import METRICS, Resamples, plain_metric, weighted_metric
from utils.concepts.retention import fitted_batches
from utils.concepts.similarity import similarity
from utils.concepts.transfer import check_package, transfer_concept
from utils.concepts.transfer_config import TransferConfig
from utils.concepts.unseen_samples import OtherTask, TestSet, unseen_by, unseen_tests
from utils.concepts.verification_result import Fidelity, TransferVerification, said
from utils.memory.key_reader import adapter_of, tokenizer_of
from utils.runtime.arguments import whole
from utils.runtime.errors import ConfigError
from utils.runtime.seeding import derive_seed
from utils.runtime.settings import settings_of
from utils.validation.statistics import Interval

LEAST_SEEDS = 5
"""Students for a verdict."""
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
    config = settings_of(TransferConfig, config)
    learners = _learners(students, seeds)
    if metric not in METRICS:
        raise ConfigError(f"The metric is {metric!r}.", f"Expected one of {', '.join(METRICS)}.", "Choose one.")
    read = package.readout(teacher)
    tests = unseen_tests(package, examples, counter_examples, groups)
    shown = tests if student_test is None else tests.in_the_form_of(student_test)
    other = unseen_by(package, shown, retention, other_task, student_examples)
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
                if other is not None:
                    correct.append(other.change(adapter, made.readout.adapter, tokens))
                if number == 0 and baselines:
                    neighbours = _neighbours(read, made.readout, expert, own, seed)
    return _result(
        package, metric, tests, shown, read, adapters[id(first)], read.score(expert),
        {name: torch.stack(rows) for name, rows in taught.items()}, labels, correct, other, changed, neighbours,
        seed,
    )  # fmt: skip


def _learners(students: Any, seeds: int) -> list[Any]:
    """Return a student for each seed."""
    several = isinstance(students, (list, tuple))
    count = len(students) if several else seeds
    what = "The number of students" if several else "The number of seeds"
    count = whole(
        count, what, LEAST_SEEDS,
        "Give more, as fewer do not tell a score from chance; to try a transfer out, use transfer_concept.",
    )  # fmt: skip
    return list(students) if several else [students] * count


def _lessons(package: ConceptPackage, seed: int, baselines: bool) -> dict[str, tuple[ConceptPackage, bool]]:
    """Return what students learn from, by name, and whether they see labels alone."""
    made = {"package": (package, False), "shuffled": (package.shuffled(derive_seed(seed, "shuffled")), False)}
    if baselines:
        made |= {"junk": (package.shuffled(derive_seed(seed, "junk")), False), "labels_only": (package, True)}
    return made


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
    package: ConceptPackage, metric: str, tests: TestSet, shown: TestSet, read: ConceptReadout, student: ModelAdapter,
    expert: Tensor, taught: Mapping[str, Tensor], labels: Tensor, correct: list[Tensor], other: OtherTask | None,
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

    way, deal = means["teacher"] - means["shuffled"], draws.single(scores["shuffled"], drawn["shuffled"])

    def share(name: str, nothing: Tensor = deal) -> Interval:
        ways = drawn["teacher"] - nothing
        return draws.interval((means[name] - means["shuffled"]) / way, (drawn[name] - nothing) / ways)

    undefined = _undefined(intervals["teacher"], draws.interval(way, drawn["teacher"] - deal))
    # As good as the teacher is as good whatever a deal says: the mean of the deals is nearer to 0 of the scale.
    if undefined is None and (known := share("before", drawn["shuffled"])).low > KNOWN:
        undefined = (
            f"the student knew the concept before: read off it as it was, it scores {means['before']:.3f}, which is "
            f"{known.mean:.1%} of the way to the teacher's {means['teacher']:.3f} (95% at least {known.low:.1%})"
        )
    both = "labels_only" in taught
    return TransferVerification(
        package.name, read.adapter.name, student.name, metric, count, (int(labels.sum()), int((~labels).sum())), scores,
        intervals, share("package") if undefined is None else None, undefined,
        share("junk", drawn["shuffled"]) if both and undefined is None else None,
        share("labels_only") if both and undefined is None else None, share("before") if undefined is None else None,
        difference("package", "before"),
        difference("package", "labels_only") if both else None,
        _interference(correct, other, shown, seed) if other else None,
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


def _interference(correct: list[Tensor], other: OtherTask, shown: TestSet, seed: int) -> Interval:
    """Return the change of the accuracy on the other task, in points; samples of one group are drawn together."""
    table, clusters = torch.stack(correct), other.clusters(shown)
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
