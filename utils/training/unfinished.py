"""Runs that wait to be continued, found without loading anything: the question of a notebook's first cell."""

import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.runtime.errors import RunError, SeedbedError
from utils.training.config import TrainingConfig
from utils.training.mirror import newest_step
from utils.training.prepared_data import planned_samples
from utils.training.run import RECORD, SUMMARY, read_record


@dataclass(frozen=True)
class UnfinishedRun:
    """A run whose planned steps are not all done."""

    directory: Path
    model: str
    """Class of the model."""
    data: str
    """Reference of the data."""
    step: int
    """Step of the newest checkpoint."""
    total_steps: int
    """Steps planned."""
    status: str
    """How it stopped, or ``killed`` when it could not say."""
    saved: float
    """When the newest checkpoint was written, in seconds since 1970."""
    id: str = ""
    """What tells it from every other run; its copies have the same."""

    def __str__(self) -> str:
        """Say in one line what could be continued."""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.saved))
        return (
            f"{self.directory}: {self.model} on {self.data}, step {self.step} of {self.total_steps}, {self.status}, "
            f"saved {when}"
        )


def unfinished_runs(folder: str | Path) -> list[UnfinishedRun]:
    """Return the runs in a folder that can be continued with `utils.resume`, the one saved last first.

    Args:
        folder: A folder of run directories, such as one on Drive, or a run directory itself.

    Raises:
        RunError: Neither the folder nor the one it is in is there, as when Drive is not mounted.
    """
    folder = Path(folder)
    try:
        if not folder.is_dir():
            if folder.parent.is_dir():
                return []
            raise RunError(
                f"There is no folder {folder.parent}.", "Expected the folder of your runs.", "Check it, or mount Drive."
            )
        candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        found = [run for path in candidates if (path / RECORD).exists() and (run := _read(path)) is not None]
    except OSError as error:
        raise RunError(
            f"{folder} cannot be read ({error.strerror or error}).",
            "Expected the folder of your runs.",
            "Mount Drive again, or copy the run's folder to this machine.",
        ) from error
    return sorted(found, key=lambda run: run.saved, reverse=True)


def _read(directory: Path) -> UnfinishedRun | None:
    """Return how a run stands; None when it is finished, and a warning when nobody can say."""
    try:
        record = read_record(directory)
        total = TrainingConfig.from_dict(record["config"]).total_steps(planned_samples(record["data"]))
        step = newest_step(directory)
        if step < 0:
            raise RunError(f"{directory} has no checkpoint.", "Expected at least that of step 0.")
    except SeedbedError as error:
        warnings.warn(f"{directory} is left out: {error}", stacklevel=3)
        return None
    summary = _summary(directory)
    status = str(summary.get("status", "killed")) if summary.get("step") == step else "killed"
    if step >= total or status == "finished early":
        return None
    saved = (directory / "checkpoints" / f"step-{step:08d}").stat().st_mtime
    model, data = record["model"]["class"], record["data"]["reference"]
    return UnfinishedRun(directory, model, data, step, total, status, saved, str(record["id"]))


def _summary(directory: Path) -> dict[str, Any]:
    """Return summary.json, empty when there is none that can be read."""
    try:
        return dict(json.loads((directory / SUMMARY).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return {}
