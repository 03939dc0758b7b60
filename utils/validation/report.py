"""The verdict on a model: true, in one sentence on top, as text, HTML and JSON."""

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from utils.adapters.tasks import REAL_VALUES
from utils.runtime.files import write_atomic
from utils.runtime.resources import format_count
from utils.validation.check import NOT_RUN, CheckResult, Finding, json_safe
from utils.validation.codes import MEANING, ROOTS

REPORT_VERSION = 2
WIDTH = 120
REPR_LINES = 10
_EXPLAINS = (
    ("wrong_softmax_dim", "", {
        "padding_leakage", "batch_leakage", "future_leakage", "position_absent", "low_precision_unsafe",
    }),
    ("padding_leakage", "is inverted", {"nan_output", "nan_long_sequence", "nan_padding", "constant_output"}),
    ("nan_padding", "", {"padding_leakage"}),
    ("state_across_calls", "", {"batch_leakage", "nondeterministic_forward"}),
    ("input_mutation", "", {"nondeterministic_forward", "state_across_calls", "batch_leakage"}),
    ("unregistered_layer", "", {"hardcoded_device", "hardcoded_dtype", "frozen_parameter"}),
    ("buffer_not_registered", "", {"hardcoded_device", "hardcoded_dtype"}),
    ("missing_attention_scale", "", {"vanishing_gradient", "low_precision_unsafe", "cannot_learn"}),
    ("missing_residual", "", {"vanishing_gradient", "vanishing_init", "cannot_learn"}),
    ("exploding_init", "", {"exploding_gradient", "low_precision_unsafe", "cannot_learn", "nan_long_sequence"}),
    ("vanishing_init", "", {"vanishing_gradient", "constant_output", "cannot_learn"}),
    ("symmetric_init", "", {"zero_gradient", "cannot_learn"}),
    ("zero_init", "", {"zero_gradient", "constant_output", "cannot_learn"}),
    ("dead_relu", "", {"zero_gradient", "vanishing_gradient", "constant_output", "cannot_learn"}),
    ("double_softmax", "", {"vanishing_gradient", "cannot_learn"}),
    ("detached_submodule", "", {"zero_gradient", "cannot_learn"}),
    ("frozen_parameter", "", {"cannot_learn"}),
)  # fmt: skip
"""What explains what: a code, words in its message where not every finding of that code does, and what it explains."""
TASK_NAMES = {
    "causal_lm": "causal language model",
    "masked_lm": "masked language model",
    "seq2seq": "sequence-to-sequence model",
    "regression": "regression model",
    "embedding": "embedding model",
}


def value_text(value: Any) -> str:
    """Format a measured value for a table cell."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) and abs(value) < 10_000:
        return str(value)
    return f"{value:.4g}"


def short_text(value: Any) -> str:
    """Format a measured value for a narrow cell; one that is a sentence is in the explanation as well."""
    text = value_text(value)
    return text if len(text) <= 12 else "-"


@dataclass(frozen=True, repr=False)
class ValidationReport:
    """Results of all checks on one model."""

    results: tuple[CheckResult, ...]
    """One result per check, in the order they ran."""
    model: str
    """The model's class name."""
    task: str | None
    """What the model is for; None when no call succeeded."""
    parameters: int
    """Number of parameters, shared tensors once."""
    seconds: float
    """Time of the whole validation."""
    tiers: tuple[int, ...] = (1,)
    """The tiers that ran."""
    detections: tuple[dict[str, Any], ...] = ()
    """What was found out about the model, each fact with its reason."""
    arguments: str = ""
    """What `utils.show` takes beside the model to find the same, such as ``, spec=spec``."""

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """Checks that failed."""
        return tuple(result for result in self.results if result.status == "fail")

    @property
    def warnings(self) -> tuple[CheckResult, ...]:
        """Checks that found something unusual but no fault."""
        return tuple(result for result in self.results if result.status == "warn")

    @property
    def incomplete(self) -> tuple[CheckResult, ...]:
        """Checks that apply but could not run."""
        return tuple(result for result in self.results if result.could_not_run)

    @property
    def passed(self) -> bool:
        """Whether no check failed and none that applies was prevented from running."""
        return self.verdict in ("READY", "DESCRIBED")

    @property
    def verdict(self) -> str:
        """``"NOT READY"`` after a failure, ``"INCOMPLETE"`` when a check could not run, else ``"READY"``.

        Tier 2 alone judges nothing; its verdict is ``"DESCRIBED"``.
        """
        if self.failures:
            return "NOT READY"
        if self.incomplete or not self.results:
            return "INCOMPLETE"
        return "READY" if 1 in self.tiers else "DESCRIBED"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, faults first, of these first what explains others; a fault that several checks meet is one."""
        unique: dict[tuple[str, str], Finding] = {}
        for result in self.results:
            for finding in result.findings:
                unique.setdefault((finding.code, finding.where), finding)
        return _causes_first(sorted(unique.values(), key=lambda f: (f.severity != "fail", f.code not in ROOTS)))

    @property
    def sentence(self) -> str:
        """The verdict in one sentence, without the verdict's word."""
        faults = sum(finding.severity == "fail" for finding in self.findings)
        warned = len(self.findings) - faults
        parts = [_count(faults, "fault")] if faults else []
        parts += [_count(warned, "warning")] if warned else []
        if self.incomplete:
            parts.append(f"{_count(len(self.incomplete), 'check')} could not run")
        nothing = "no faults" if 1 in self.tiers else "faults were not looked for"
        task = TASK_NAMES.get(self.task or "", (self.task or "").replace("_", " ")) or "task unknown"
        if any(fact["name"] == "task" and REAL_VALUES in fact["reason"] for fact in self.detections):
            task = "model of real-valued output"
        size = "1 parameter" if self.parameters == 1 else f"{format_count(self.parameters)} parameters"
        head = f"{self.model}, {task}, {size}"
        if not self.parameters:
            head, nothing = f"{self.model}, a module without parameters", f"{nothing}, and nothing to train"
        return f"{head}: {', '.join(parts) or nothing}{self._advice}"

    @property
    def _advice(self) -> str:
        """What the user can do so that the checks run that could not, where it is known."""
        if self.verdict != "INCOMPLETE":
            return ""
        said = (part for result in self.incomplete for part in re.split(r"(?<=\.) (?=[A-Z])", result.why))
        return next((f". {part.rstrip('.')}" for part in said if part.startswith("Pass ")), "")

    @property
    def scope(self) -> str:
        """What ran and for how long, for example ``Tier 1, 7 checks, 3.8 s``."""
        tiers = "Tier " + " and ".join(str(tier) for tier in self.tiers)
        return f"{tiers}, {_count(len(self.results), 'check')}, {self.seconds:.1f} s"

    def text(self) -> str:
        """Return the report for a terminal, at most 120 columns wide."""
        head = f"{self.verdict}  {self.sentence}"
        gap = WIDTH - len(head) - len(self.scope)
        lines = [head + " " * gap + self.scope] if gap >= 3 else [*_wrap(head, ""), f"    {self.scope}"]
        places = [finding.where for finding in self.findings]
        codes = max((len(finding.code) for finding in self.findings), default=0)
        place_width = min(32, max((len(place) for place in places), default=0))
        for finding in self.findings:
            start = f"{finding.severity:<4}  {finding.code:<{codes}}  {finding.where:<{place_width}}  "
            lines += _wrap(finding.message, start, indent=10)
            meaning = MEANING.get(finding.code)
            lines += _wrap(meaning, " " * 10) if meaning else []
            lines += _wrap(f"Fix: {finding.hint}", " " * 10)
            lines += _wrap(f"Code: {finding.location}", " " * 10) if finding.location else []
            lines.append(f'{"":10}See it: utils.show("{finding.code}", model{self.arguments})')
            lines += [f"{'':12}{line}" for line in finding.reproduction.splitlines()]
        lines += ["", f"{'check':<20} {'status':<6} {'value':>12} {'threshold':>12} {'seconds':>8}  why"]
        for result in folded(self.results):
            why = result.why if result.status in ("pass", "skip") else "see above"
            shown = [short_text(result.value), short_text(result.threshold)]
            cells = f"{result.check:<20} {result.status:<6} {shown[0]:>12} {shown[1]:>12} {result.seconds:>8.2f}  "
            lines += _wrap(why, cells, indent=len(cells))
            for note in result.details.get("reduced", ()):
                lines += _wrap(f"reduced: {note}", " " * len(cells))
        return "\n".join(line.rstrip() for line in lines) + "\n"

    def __repr__(self) -> str:
        lines = [f"{self.verdict}  {self.sentence}"]
        shown = self.findings if len(self.findings) <= REPR_LINES else self.findings[: REPR_LINES - 1]
        for finding in shown:
            line = f"{finding.severity:<4}  {finding.code}  {finding.where}  {finding.message}"
            lines.append(line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}...")
        if len(shown) < len(self.findings):
            lines.append(f"and {len(self.findings) - len(shown)} more")
        return "\n".join([*lines, "print(report) tells all of it, report.to_html(path) as a page"])

    def __str__(self) -> str:
        return self.text()

    @overload
    def badge(self, path: None = None) -> str: ...

    @overload
    def badge(self, path: Path | str) -> Path: ...

    def badge(self, path: Path | str | None = None) -> str | Path:
        """Return the verdict as a small SVG picture for a README; given a path, write it there and return the path."""
        from utils.validation.html import badge

        picture = badge(self)
        return picture if path is None else _written(path, picture)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values that JSON can hold."""
        return {
            "version": REPORT_VERSION,
            "verdict": self.verdict,
            "passed": self.passed,
            "sentence": self.sentence,
            "model": self.model,
            "task": self.task,
            "parameters": self.parameters,
            "seconds": self.seconds,
            "tiers": list(self.tiers),
            "detections": json_safe(self.detections),
            "results": [result.to_dict() for result in self.results],
            "findings": [finding.to_dict() for finding in self.findings],
        }

    @overload
    def to_json(self, path: None = None) -> str: ...

    @overload
    def to_json(self, path: Path | str) -> Path: ...

    def to_json(self, path: Path | str | None = None) -> str | Path:
        """Return the report as JSON; given a path, write it there and return the path."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        # A message may quote text of the model that no encoding can hold.
        text = text.encode("utf-8", "replace").decode("utf-8")
        return text if path is None else _written(path, text)

    @overload
    def to_html(self, path: None = None) -> str: ...

    @overload
    def to_html(self, path: Path | str) -> Path: ...

    def to_html(self, path: Path | str | None = None) -> str | Path:
        """Return the report as one self-contained HTML page; given a path, write it there and return the path."""
        from utils.validation.html import report_page

        page = report_page(self)
        return page if path is None else _written(path, page)

    def _repr_html_(self) -> str:
        from utils.validation.html import report_fragment

        return report_fragment(self)


def _written(path: Path | str, text: str) -> Path:
    """Write a file and return where it is."""
    write_atomic(Path(path), text)
    return Path(path)


def folded(results: Sequence[CheckResult]) -> list[CheckResult]:
    """Return results for a table: one row for all checks that only an earlier one kept from running."""
    waiting = [result for result in results if result.why == NOT_RUN]
    if len(waiting) < 2:
        return list(results)
    details = {"could_not_run": any(r.could_not_run for r in waiting), "checks": [r.check for r in waiting]}
    seconds = sum(result.seconds for result in waiting)
    row = CheckResult(f"{len(waiting)} checks", waiting[0].tier, "skip", None, None, NOT_RUN, seconds, details)
    return [*(result for result in results if result.why != NOT_RUN), row]


def _causes_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return findings so that what explains another one, and is no less severe, stands before it."""
    ordered: dict[int, Finding] = {}

    def add(finding: Finding, waiting: frozenset[int]) -> None:
        causes: Iterable[Finding] = (
            other
            for code, words, explained in _EXPLAINS
            if finding.code in explained
            for other in findings
            if other.code == code and words in other.message and other.severity in ("fail", finding.severity)
        )
        for cause in causes:
            if id(cause) not in waiting and id(cause) not in ordered:
                add(cause, waiting | {id(cause)})
        ordered.setdefault(id(finding), finding)

    for finding in findings:
        add(finding, frozenset({id(finding)}))
    return tuple(ordered.values())


def _count(number: int, noun: str) -> str:
    """Return a number with its noun, for example ``2 faults``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _wrap(text: str, start: str, indent: int | None = None) -> list[str]:
    """Wrap text after a start, later lines indented."""
    later = " " * (len(start) if indent is None else indent)
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=later, break_on_hyphens=False) or [start]
