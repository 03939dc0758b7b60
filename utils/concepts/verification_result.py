"""Whether a student has learned what the teacher knows: the score V, and what it may not be read without."""

from dataclasses import dataclass, field
from typing import Any

from utils.validation.statistics import Interval

VERIFIED = 0.5
"""Least lower bound of V."""
INTERFERENCE = -1.0
"""Least lower bound of the change on the student's other task, in points."""


@dataclass(frozen=True)
class Fidelity:
    """How often a student says what the teacher says."""

    wrong: int
    """Test samples on which the teacher is wrong."""
    student: float
    """Share of them on which the student says what the teacher says, mean over seeds."""
    labels_only: float
    """The same of students that saw labels alone: mistakes that are in the data rather than in the teacher."""
    more: Interval
    """The difference: above 0, the student has the teacher's view rather than the labels."""
    overall: float
    """Share of all test samples on which the student says what the teacher says."""


@dataclass(frozen=True)
class TransferVerification:
    """The result of `verify_transfer`."""

    concept: str
    """Name of the concept."""
    teacher: str
    """Class of the teacher."""
    student: str
    """Class of the student."""
    metric: str
    """``"auroc"`` or ``"balanced_accuracy"``: f in the score."""
    seeds: int
    """Students that were taught, each by every package."""
    test: tuple[int, int]
    """Test samples with the concept and without it."""
    scores: dict[str, tuple[float, ...]] = field(repr=False)
    """f of each student, by what it learned from: ``package``, ``shuffled``, ``junk`` (shuffled once more),
    ``labels_only``, ``before`` (read off the untaught student as well as the package allows)."""
    intervals: dict[str, Interval]
    """The mean of each over students, and ``teacher``, with 95% intervals."""
    value: Interval | None
    """V = (f(package) - f(shuffled)) / (f(teacher) - f(shuffled)); None where it is undefined."""
    undefined: str | None
    """Why it is undefined."""
    junk: Interval | None
    """The same of a second shuffled package in the package's place: 0 if the score is sound."""
    labels_only: Interval | None
    """The same of students that saw the labels alone."""
    before: Interval | None
    """The same of the untaught students, each read off as well as the package allows."""
    taught: Interval
    """f(package) - f(before): what training added to reading the student as it was."""
    beyond_labels: Interval | None
    """f(package) - f(labels_only): what the teacher's view added to the labels."""
    interference: Interval | None
    """Change of the accuracy on the student's other task, in points; None where none was given."""
    fidelity: Fidelity | None
    """Agreement where the teacher is wrong; None where it never is, or without baselines."""
    neighbours: dict[str, Any] | None = field(repr=False)
    """Nearest neighbours that teacher and first student have in common on the test samples, see `similarity`."""
    changed: tuple[float, ...] = field(repr=False, default=())
    """Share of each student's answers on held-out samples of its own data that are others now."""

    @property
    def verified(self) -> bool:
        """Whether the transfer is verified: every rule of `reasons` holds."""
        return all(held for held, _ in self._rules())

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence for each rule of the verdict, with its numbers."""
        return tuple(said for _, said in self._rules())

    def _rules(self) -> list[tuple[bool, str]]:
        if self.value is None:
            return [(False, f"V is undefined: {self.undefined}.")]
        held = self.value.low > VERIFIED
        told = f"V = {said(self.value)}; its lower bound is {'' if held else 'not '}above {VERIFIED}."
        rules = [(held, told)]
        held, alone = self.taught.low > 0, f", whose V is {said(self.before)}" if self.before else ""
        rules.append((
            held,
            f"Teaching adds {said(self.taught)} to the student as it was{alone}; the lower bound is "
            f"{'' if held else 'not '}above 0.",
        ))  # fmt: skip
        if self.interference is None:
            rules.append((False, "What it costs the student's other task was not measured: give other_task."))
        else:
            held = self.interference.low > INTERFERENCE
            rules.append((
                held,
                f"The other task changes by {said(self.interference, 2)} points; the lower bound is "
                f"{'' if held else 'not '}above {INTERFERENCE:g}.",
            ))  # fmt: skip
        if self.junk is None:
            rules.append((False, "A junk package was not tried: baselines were left out."))
        else:
            held = self.junk.low <= 0 <= self.junk.high
            rules.append((held, f"A junk package scores {said(self.junk)}, {'as' if held else 'not 0 as'} it should."))
        return rules

    def to_dict(self) -> dict[str, Any]:
        """Return all as plain values; `utils.runtime.files.null_nonfinite` makes JSON of them."""

        def plain(value: Any) -> Any:
            if isinstance(value, (Interval, Fidelity)):
                return {name: plain(part) for name, part in vars(value).items()}
            if isinstance(value, dict):
                return {name: plain(part) for name, part in value.items()}
            return list(value) if isinstance(value, tuple) else value

        named = {name: plain(getattr(self, name)) for name in self.__dataclass_fields__}
        return named | {"verified": self.verified, "reasons": list(self.reasons)}

    def __str__(self) -> str:
        from utils.concepts.verification_view import verification_text

        return verification_text(self)

    def _repr_html_(self) -> str:
        """Show verdict, picture and table."""
        from utils.concepts.verification_view import verification_html

        return verification_html(self)


def said(interval: Interval, digits: int = 3) -> str:
    """Return an interval in words, each number with as many digits."""
    return f"{interval.mean:.{digits}f} (95% {interval.low:.{digits}f} to {interval.high:.{digits}f})"
