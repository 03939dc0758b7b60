"""What an export wrote, and how far each file's answers are from the original model's."""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.runtime.resources import format_bytes, format_count

VERSION = 2
"""Layout of a saved export report; version 1 had no held-out numbers and no choice of weights."""
GOOD = ("ok", "approximate")
"""Statuses of a format that does what it promises."""


@dataclass(frozen=True)
class ExportedFile:
    """One file of an export."""

    name: str
    """Path relative to the export's directory."""
    bytes: int
    """Size."""
    sha256: str
    """Checksum."""


@dataclass(frozen=True)
class ShapeCheck:
    """Comparison with the original at one input shape."""

    shape: tuple[int, ...]
    """Shape of the main input."""
    difference: float | None
    """Largest absolute difference of the logits; None when the exported model could not run."""
    why: str = ""
    """What went wrong."""
    same_choice: float | None = None
    """Share of the answers whose largest logit is the original's; None where there is one logit only."""


@dataclass(frozen=True)
class FormatResult:
    """One format of an export."""

    format: str
    """Name of the format."""
    status: str
    """``"ok"``; ``"fixed_shape"``: right at the shape of the export and refused at another that the original takes;
    ``"approximate"``: runs at every shape with other numbers, as a format with fewer bits must; or ``"failed"``."""
    why: str = ""
    """What a reader has to know: the reason of a failure, or how the export was reached."""
    files: tuple[ExportedFile, ...] = ()
    """What was written; empty when the format failed."""
    checks: tuple[ShapeCheck, ...] = ()
    """Comparisons with the original, the shape of the export first."""
    seconds: float = 0.0
    """Time taken."""
    held_out: Mapping[str, float] = field(default_factory=dict)
    """What the files measured on held-out data; empty for what is no run."""

    @property
    def same_choice(self) -> float | None:
        """The lowest share of equal choices over all shapes."""
        return min((check.same_choice for check in self.checks if check.same_choice is not None), default=None)

    @property
    def max_difference(self) -> float | None:
        """The largest difference over all shapes; None when nothing could be compared."""
        return max((check.difference for check in self.checks if check.difference is not None), default=None)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {
            "format": self.format,
            "status": self.status,
            "why": self.why,
            "files": [vars(file) for file in self.files],
            "bytes": self.bytes,
            "max_difference": _finite(self.max_difference),
            "checks": [
                {
                    "shape": list(check.shape),
                    "difference": _finite(check.difference),
                    "same_choice": check.same_choice,
                    "why": check.why,
                }
                for check in self.checks
            ],
            "held_out": {name: _finite(value) for name, value in self.held_out.items()},
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class ExportReport:
    """All formats of one export."""

    model: str
    """Class name of the model."""
    task: str
    """What the model is for."""
    parameters: int
    """Number of parameters, shared ones counted once."""
    directory: str
    """Where the files are."""
    results: tuple[FormatResult, ...]
    """One result for each format asked for."""
    tolerance: float
    """Largest difference that counts as equal."""
    tolerance_reason: str
    """How the tolerance follows from the model's output."""
    versions: dict[str, str]
    """Versions of the packages that wrote and ran the files."""
    seconds: float
    """Time taken."""
    weights: str = ""
    """Which weights of a run these are; empty for what is no run."""
    held_out: Mapping[str, float] = field(default_factory=dict)
    """What the original measures on held-out data; empty for what is no run."""

    @property
    def passed(self) -> bool:
        """Every format was written and agrees with the original at every shape, as far as its bits allow."""
        return all(result.status in GOOD for result in self.results)

    @property
    def failures(self) -> tuple[FormatResult, ...]:
        """Formats that are not ok."""
        return tuple(result for result in self.results if result.status not in GOOD)

    def __getitem__(self, name: str) -> FormatResult:
        """Return the result of a format."""
        for result in self.results:
            if result.format == name:
                return result
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "version": VERSION,
            "model": self.model,
            "task": self.task,
            "parameters": self.parameters,
            "passed": self.passed,
            "weights": self.weights,
            "held_out": {name: _finite(value) for name, value in self.held_out.items()},
            "tolerance": self.tolerance,
            "tolerance_reason": self.tolerance_reason,
            "versions": dict(self.versions),
            "seconds": self.seconds,
            "results": [result.to_dict() for result in self.results],
        }

    def _headline(self) -> str:
        good = len(self.results) - len(self.failures)
        return (
            f"{'EXPORTED' if self.passed else 'INCOMPLETE'}  {self.model}, {self.task}, "
            f"{format_count(self.parameters)} parameters: {good} of {len(self.results)} formats"
        )

    def text(self) -> str:
        """Return the report for a terminal."""
        lines = [f"{self._headline()}  ({self.seconds:.1f} s, in {self.directory})"]
        if self.weights:
            lines.append(f"Weights: {self.weights}.")
        if self.held_out:
            lines.append(f"Original on held-out data: {quality_text(self.held_out)}.")
        for result in self.results:
            size = format_bytes(result.bytes) if result.files else "-"
            names = ", ".join(file.name for file in result.files)
            columns = (
                f"{result.status:<12}{result.format:<13}{_difference(result.max_difference):<20}{size:>9}  {names}"
            )
            lines.append(columns.rstrip())
            shown = [f"{_shape(check.shape)} {_outcome(check)}" for check in result.checks]
            if shown:
                lines.append(f"{'':12}at {', '.join(shown)}")
            if result.held_out:
                lines.append(f"{'':12}on held-out data: {quality_text(result.held_out)}")
            if result.why:
                lines.append(f"{'':12}{result.why}")
        lines.append(f"Differences up to {self.tolerance:.1e} count as equal: {self.tolerance_reason}.")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Show the report in a notebook."""
        rows = []
        for result in self.results:
            checks = "<br>".join(html.escape(f"{_shape(check.shape)}: {_outcome(check)}") for check in result.checks)
            files = "<br>".join(html.escape(f"{file.name} ({format_bytes(file.bytes)})") for file in result.files)
            cells = [
                html.escape(result.status),
                html.escape(result.format),
                html.escape(_difference(result.max_difference)),
                checks,
                files,
                html.escape(quality_text(result.held_out)),
                html.escape(result.why),
            ]
            rows.append("<tr>" + "".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells) + "</tr>")
        head = "".join(
            f"<th style='text-align:left'>{name}</th>"
            for name in (
                "status",
                "format",
                "largest difference",
                "by input shape",
                "files",
                "held-out data",
                "remarks",
            )
        )
        note = f"Differences up to {self.tolerance:.1e} count as equal: {html.escape(self.tolerance_reason)}."
        if self.held_out:
            note = f"Original on held-out data: {html.escape(quality_text(self.held_out))}. {note}"
        if self.weights:
            note = f"Weights: {html.escape(self.weights)}. {note}"
        return (
            f"<p><b>{html.escape(self._headline())}</b></p><table><tr>{head}</tr>{''.join(rows)}</table><p>{note}</p>"
        )


def _finite(value: float | None) -> float | None:
    """Return a number that JSON can hold; the reason beside it tells an infinite one from a missing one."""
    return value if value is not None and math.isfinite(value) else None


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _difference(value: float | None) -> str:
    return "not compared" if value is None else f"difference {value:.1e}"


def _outcome(check: ShapeCheck) -> str:
    if check.difference is None:
        return "refused"
    same = "" if check.same_choice in (None, 1.0) else f" ({check.same_choice:.1%} same choice)"
    return f"{check.difference:.1e}{same}"


def quality_text(held_out: Mapping[str, float]) -> str:
    """Return held-out numbers as one line."""
    parts = [f"{name} {value:.4f}" for name, value in held_out.items() if name != "samples"]
    return ", ".join(parts) + (f" over {held_out['samples']:.0f} samples" if parts else "")
