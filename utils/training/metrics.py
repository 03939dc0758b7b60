"""The numbers of a run: one CSV file that survives kills and continues where the checkpoint was."""

import csv
import io
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.runtime.files import write_atomic
from utils.training.state import ModelChange

COLUMNS = (
    "step",
    "split",
    "loss",
    "accuracy",
    "rmse",
    "r2",
    "bits_per_byte",
    "learning_rate",
    "gradient_norm",
    "samples_per_second",
    "seconds",
)


class MetricsLog:
    """Rows of numbers, appended as they come; also a part of the run's state. A full disk does not stop the run.

    Attributes:
        rows: All rows so far; a number that was not measured is absent.
    """

    def __init__(self, path: Path | None) -> None:
        """Log to `path`; rows that are there already are read. Without a path rows are kept in memory only."""
        self.path = path
        self.rows: list[dict[str, Any]] = read_metrics(path) if path is not None and path.exists() else []
        self._behind = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; it reaches the file at once."""
        unknown = set(row) - set(COLUMNS)
        if unknown:
            raise ValueError(f"Unknown metrics {sorted(unknown)}; known are {', '.join(COLUMNS)}.")
        self.rows.append(dict(row))
        if self.path is None:
            return
        try:
            if self._behind or not self.path.exists():
                self._rewrite()
            else:
                with open(self.path, "a", encoding="utf-8", newline="") as stream:
                    stream.write(_line(row))
        except OSError as error:
            self._fall_behind(error)

    def state_dict(self) -> dict[str, int]:
        """Return how far the log goes."""
        return {"rows": len(self.rows)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Cut off what was logged after the checkpoint; the resumed run logs it again."""
        if self.path is None:
            return
        if len(self.rows) < state["rows"]:
            warnings.warn(
                f"{self.path.name} has {len(self.rows)} rows, and the checkpoint was made after {state['rows']}: "
                "some numbers of earlier sessions are lost; the training itself is not affected.",
                stacklevel=2,
            )
        self.rows = self.rows[: state["rows"]]
        try:
            self._rewrite()
        except OSError as error:
            self._fall_behind(error)

    def migrate(self, change: ModelChange) -> None:
        """A change of the model does not touch what was measured."""

    def _fall_behind(self, error: OSError) -> None:
        """Say once that the file cannot be written, until it has worked again."""
        assert self.path is not None
        if not self._behind:
            warnings.warn(
                f"{self.path.name} cannot be written ({error.strerror or error}). The rows are kept in memory and "
                "written as soon as that works; training goes on.",
                stacklevel=3,
            )
        self._behind = True

    def _rewrite(self) -> None:
        """Write all rows, atomically."""
        assert self.path is not None
        write_atomic(self.path, _header() + "".join(_line(row) for row in self.rows))
        self._behind = False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that a kill tore is dropped."""
    text = Path(path).read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = []
    for record in csv.DictReader(io.StringIO(whole)):
        row: dict[str, Any] = {}
        for name, value in record.items():
            if name in COLUMNS and value not in (None, ""):
                row[name] = value if name == "split" else int(value) if name == "step" else float(value)
        rows.append(row)
    return rows


def _header() -> str:
    return ",".join(COLUMNS) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    # repr keeps every bit of a float, so equal runs give equal files.
    values = (row.get(name, "") for name in COLUMNS)
    return ",".join(repr(value) if isinstance(value, float) else str(value) for value in values) + "\n"


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Convert the summed loss over a text to bits per byte of it."""
    return nats / math.log(2) / text_bytes
