"""From a notebook's form to a run: settings that fit the model, and the folder that the run is kept in.

Environment variables win over the form, so that a notebook can be run unattended: ``SEEDBED_DATA``,
``SEEDBED_MAX_STEPS`` and ``SEEDBED_RUN_DIR``.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

from utils.adapters import ModelAdapter
from utils.loading import LoadedModel
from utils.runtime.errors import ConfigError
from utils.runtime.files import write_atomic
from utils.training.config import TrainingConfig

DETECT = "detect"
UPLOADS = Path("uploads")
"""Where uploaded files stay, beside the notebook."""


@dataclass(frozen=True)
class SessionSettings:
    """What to train on and how."""

    data: str
    """Data reference."""
    config: TrainingConfig
    """Training settings."""
    reason: str
    """Why this data."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {"data": self.data, "reason": self.reason, "config": self.config.to_dict()}

    def _repr_html_(self) -> str:
        """Show the settings that differ from their defaults."""
        defaults = TrainingConfig().to_dict()
        changed = {name: value for name, value in self.config.to_dict().items() if value != defaults[name]}
        listing = ", ".join(f"{name}={value!r}" for name, value in changed.items()) or "all at their defaults"
        return f"<p>Data: <b>{escape(self.data)}</b> ({escape(self.reason)})<br>Settings: {escape(listing)}</p>"


def session_settings(adapter: ModelAdapter, data: str = DETECT, **settings: Any) -> SessionSettings:
    """Turn a form's values into checked settings.

    Args:
        adapter: The model; chooses the data when `data` is ``"detect"``.
        data: A data reference, or ``"detect"``.
        **settings: Fields of `utils.training.config.TrainingConfig`.

    Raises:
        ConfigError: A setting is unknown or invalid, or no built-in data fits the model's task.
    """
    if steps := os.environ.get("SEEDBED_MAX_STEPS"):
        try:
            settings["max_steps"] = int(steps)
        except ValueError:
            raise ConfigError(
                f"The environment variable SEEDBED_MAX_STEPS is {steps!r}.", "Expected a whole number."
            ) from None
    chosen, reason = os.environ.get("SEEDBED_DATA") or data, "as chosen"
    if chosen == DETECT:
        task = adapter.task.value
        builtins = {
            "causal_lm": "builtin:python-docs",
            "masked_lm": "builtin:python-docs",
            "image_classification": "builtin:digits",
        }
        if task not in builtins:
            raise ConfigError(
                f"No built-in data fits the task {task}.",
                f"Built-in data exists for {', '.join(builtins)}.",
                "Choose data yourself, or state the task with ModelSpec(task=...).",
            )
        chosen, reason = builtins[task], f"the built-in data for {task.replace('_', ' ')}"
    return SessionSettings(chosen, TrainingConfig.from_dict(settings), reason)


def run_folder(name: str, loaded: LoadedModel, settings: SessionSettings) -> Path:
    """Return the folder of a run below ``runs/``.

    The same model, data and settings (but for the time budget) give the same folder, so that cells can be run again.

    Args:
        name: The run's name; empty makes one from the model, the data and a short hash of all settings.
        loaded: The model.
        settings: What to train on and how.
    """
    if given := os.environ.get("SEEDBED_RUN_DIR"):
        return Path(given)
    if not name.strip():
        config = {**settings.config.to_dict(), "time_budget_minutes": None}
        key = json.dumps([loaded.sha256, loaded.config, settings.data, config], sort_keys=True, default=str)
        data = "".join(letter if letter.isalnum() else "-" for letter in settings.data.rsplit(":", 1)[-1]).strip("-")
        name = f"{loaded.name}-{data[-40:]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    elif Path(name.strip()).name != name.strip() or name.strip() == "..":
        raise ConfigError(f"The run name {name!r} is a path.", "Expected a plain name.", "Leave out slashes.")
    return Path("runs") / name.strip()


def keep_upload(name: str, content: bytes, folder: Path = UPLOADS) -> Path:
    """Write an uploaded file into a folder and return where it is.

    A file of that name with another content stays as it is, because a run may have been made from it: the new one gets
    a number. The same file uploaded twice is kept once.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(exist_ok=True)
    plain = folder / (Path(name).name or "data")
    suffixes = "".join(plain.suffixes)
    stem = plain.name.removesuffix(suffixes)
    for number in count(1):
        path = plain if number == 1 else folder / f"{stem}-{number}{suffixes}"
        if not path.exists():
            write_atomic(path, content)
            return path
        if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
            return path
    raise AssertionError("count() does not end")
