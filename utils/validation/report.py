"""The verdict on a model: true, in one sentence on top, as text, HTML and JSON."""

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.runtime.files import write_atomic
from utils.runtime.resources import format_count
from utils.validation.check import CheckResult, Finding, json_safe
from utils.validation.codes import MEANING, ROOTS

REPORT_VERSION = 2
WIDTH = 120
REPR_LINES = 10
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
        return tuple(sorted(unique.values(), key=lambda f: (f.severity != "fail", f.code not in ROOTS)))

    @property
    def sentence(self) -> str:
        """The verdict in one sentence, without the verdict's word."""
        faults = sum(finding.severity == "fail" for finding in self.findings)
        warned = len(self.findings) - faults
        parts = [_count(faults, "fault")] if faults else []
        parts += [_count(warned, "warning")] if warned else []
        if self.incomplete:
            parts.append(f"{_count(len(self.incomplete), 'check')} could not run")
        task = TASK_NAMES.get(self.task or "", (self.task or "").replace("_", " ")) or "task unknown"
        return f"{self.model}, {task}, {format_count(self.parameters)} parameters: {', '.join(parts) or 'no faults'}"

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
            lines.append(f'{"":10}See it: utils.show("{finding.code}", model)')
            lines += [f"{'':12}{line}" for line in finding.reproduction.splitlines()]
        lines += ["", f"{'check':<20} {'status':<6} {'value':>12} {'threshold':>12} {'seconds':>8}  why"]
        for result in self.results:
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

    def badge(self, path: Path | str | None = None) -> str:
        """Return the verdict as a small SVG picture for a README and, given a path, write it there as well."""
        from utils.validation.html import badge

        picture = badge(self)
        if path is not None:
            write_atomic(Path(path), picture)
        return picture

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

    def to_json(self, path: Path | str | None = None) -> str:
        """Return the report as JSON and, given a path, write it there as well."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        # A message may quote text of the model that no encoding can hold.
        text = text.encode("utf-8", "replace").decode("utf-8")
        if path is not None:
            write_atomic(Path(path), text)
        return text

    def to_html(self, path: Path | str | None = None) -> str:
        """Return the report as one self-contained HTML page and, given a path, write it there as well."""
        from utils.validation.html import report_page

        page = report_page(self)
        if path is not None:
            write_atomic(Path(path), page)
        return page

    def _repr_html_(self) -> str:
        from utils.validation.html import report_fragment

        return report_fragment(self)


def _count(number: int, noun: str) -> str:
    """Return a number with its noun, for example ``2 faults``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _wrap(text: str, start: str, indent: int | None = None) -> list[str]:
    """Wrap text after a start, later lines indented."""
    later = " " * (len(start) if indent is None else indent)
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=later, break_on_hyphens=False) or [start]
