"""The cost of a run as a value that shows itself."""

from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from utils.runtime.errors import ConfigError
from utils.runtime.resources import format_bytes


def duration(seconds: float) -> str:
    """Say how long something takes, in words that a person would use."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


@dataclass(frozen=True, repr=False)
class Estimate:
    """What a run costs; shows itself in a notebook."""

    device: str
    """Where it was measured."""
    steps: int
    """Optimizer steps that are left."""
    measured_steps: int
    """Optimizer steps that were run to find out; 0 when not even one would."""
    seconds_per_step: float
    """Median of the measured steps, measurements on held-out data not included."""
    slowest_step: float
    """The slowest one."""
    total_seconds: float
    """All steps and all measurements on held-out data."""
    samples_per_second: float
    """Samples that are trained on."""
    tokens_per_second: float | None
    """The same in tokens, for text."""
    memory: int
    """Bytes that this process, or the GPU, holds at its peak."""
    memory_there: int
    """Bytes there are for it."""
    memory_reason: str
    """How the memory was found out."""
    checkpoint: int
    """Bytes of a checkpoint."""
    disk: int
    """Bytes of the whole run: the data, and as many checkpoints as are kept at once."""
    disk_there: int
    """Bytes that are free where the run is kept."""
    sessions: int = 1
    """In how many sessions the run ends, when each has a time budget."""
    problems: tuple[str, ...] = ()
    """Why the run cannot work; empty when it can."""
    notes: tuple[str, ...] = field(default_factory=tuple)
    """What the numbers leave out."""

    @property
    def possible(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.problems

    def check(self) -> None:
        """Refuse a run that cannot work.

        Raises:
            ConfigError: It cannot; the message says why.
        """
        if self.problems:
            raise ConfigError(
                " ".join(self.problems),
                f"Expected a run that fits this machine ({self.device}).",
                "Change the settings, and estimate again.",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**asdict(self), "problems": list(self.problems), "notes": list(self.notes), "possible": self.possible}

    def rows(self) -> list[tuple[str, str]]:
        """Return what is worth showing, as pairs of name and text."""
        rows = []
        if self.measured_steps:
            speed = f"{self.samples_per_second:,.1f} samples per second"
            if self.tokens_per_second is not None:
                speed = f"{self.tokens_per_second:,.0f} tokens per second"
            sessions = f", in {self.sessions} sessions" if self.sessions > 1 else ""
            rows += [
                ("time", f"about {duration(self.total_seconds)} for {self.steps:,} steps{sessions}"),
                (
                    "a step",
                    f"{duration(self.seconds_per_step)}, {speed} (median of {self.measured_steps}; the slowest took "
                    f"{duration(self.slowest_step)})",
                ),
                (
                    "memory",
                    f"{format_bytes(self.memory)} at the peak, of {format_bytes(self.memory_there)}; "
                    f"{self.memory_reason}",
                ),
            ]
        rows.append(
            (
                "disk",
                f"{format_bytes(self.disk)} of {format_bytes(self.disk_there)} free; a checkpoint is "
                f"{format_bytes(self.checkpoint)}",
            )
        )
        rows.append(("measured on", self.device))
        return rows + [("note", note) for note in self.notes]

    @property
    def verdict(self) -> str:
        """Whether it can work, in a few words."""
        return "This run fits." if self.possible else "This run cannot work here."

    def text(self) -> str:
        """Return the estimate as aligned text."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            [self.verdict, *(f"  - {problem}" for problem in self.problems)]
            + [f"{name:<{width}}  {value}" for name, value in rows]
        )

    __repr__ = text

    def _repr_html_(self) -> str:
        """Show the estimate in a notebook."""
        colour = "#1a7f37" if self.possible else "#c0392b"
        problems = "".join(f"<li>{escape(problem)}</li>" for problem in self.problems)
        cells = "".join(
            f"<tr><th style='text-align:left;vertical-align:top;white-space:nowrap;padding-right:14px'>"
            f"{escape(name)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        listed = f"<ul style='margin:4px 0'>{problems}</ul>" if problems else ""
        return f"<b style='color:{colour}'>{escape(self.verdict)}</b>{listed}<table>{cells}</table>"
