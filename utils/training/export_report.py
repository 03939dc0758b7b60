"""What an export wrote, and how far each file's answers are from the original model's."""

import html
import math
from dataclasses import dataclass
from typing import Any

from utils.runtime.resources import format_bytes, format_count

VERSION = 1
"""Layout of a saved export report."""


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


@dataclass(frozen=True)
class FormatResult:
    """One format of an export."""

    format: str
    """Name of the format."""
    status: str
    """``"ok"``; ``"fixed_shape"``: right at the shape of the export and refused at another that the original takes; or
    ``"failed"``."""
    why: str = ""
    """What a reader has to know: the reason of a failure, or how the export was reached."""
    files: tuple[ExportedFile, ...] = ()
    """What was written; empty when the format failed."""
    checks: tuple[ShapeCheck, ...] = ()
    """Comparisons with the original, the shape of the export first."""
    seconds: float = 0.0
    """Time taken."""

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
                {"shape": list(check.shape), "difference": _finite(check.difference), "why": check.why}
                for check in self.checks
            ],
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

    @property
    def passed(self) -> bool:
        """Every format was written and agrees with the original at every shape."""
        return all(result.status == "ok" for result in self.results)

    @property
    def failures(self) -> tuple[FormatResult, ...]:
        """Formats that are not ok."""
        return tuple(result for result in self.results if result.status != "ok")

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
                html.escape(result.why),
            ]
            rows.append("<tr>" + "".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells) + "</tr>")
        head = "".join(
            f"<th style='text-align:left'>{name}</th>"
            for name in ("status", "format", "largest difference", "by input shape", "files", "remarks")
        )
        note = f"Differences up to {self.tolerance:.1e} count as equal: {html.escape(self.tolerance_reason)}."
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
    return "refused" if check.difference is None else f"{check.difference:.1e}"
