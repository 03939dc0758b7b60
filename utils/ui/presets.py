"""Settings under a name: one YAML file each in ``presets/``, with a sentence that says what it is for."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from utils.runtime.errors import ConfigError
from utils.runtime.optional import require
from utils.training.config import AUTO, TrainingConfig

FOLDER = Path(__file__).with_name("presets")
ORDER = ("fast", "balanced", "quality", "tiny-gpu", "long-run", "progressive")
"""The presets that come along, the quickest first."""


def preset_names(folder: Path = FOLDER) -> list[str]:
    """Return the names of all presets, those that come along first."""
    found = sorted(path.stem for path in folder.glob("*.yaml"))
    return [name for name in ORDER if name in found] + [name for name in found if name not in ORDER]


def preset(name: str, **changes: Any) -> TrainingConfig:
    """Return the settings of a preset.

    Example:
        >>> preset("fast", max_steps=40).max_steps
        40

    Args:
        name: One of `preset_names`.
        **changes: Fields of `TrainingConfig` that replace the preset's. A length in epochs replaces one in steps, and
            the other way round.

    Raises:
        ConfigError: There is no such preset, or a setting is unknown or out of range.
    """
    return TrainingConfig.from_dict(merged(_settings(name), changes))


def preset_about(name: str) -> str:
    """Return the sentence that says what a preset is for."""
    return str(_read(FOLDER / f"{_known(name)}.yaml")["about"])


def read_preset(path: str | Path) -> TrainingConfig:
    """Read a preset from a file of your own.

    Raises:
        ConfigError: The file is missing, is no preset, or holds a setting that is unknown or out of range.
    """
    path = Path(path)
    try:
        return TrainingConfig.from_dict(_read(path)["settings"])
    except ConfigError as error:
        if error.found.startswith("TrainingConfig"):
            raise ConfigError(f"{path.name}: {error.found}", error.expected, error.action) from error
        raise


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return settings with some replaced; two ways to say the same replace each other.

    These are the length in steps and in epochs, and the samples of a step: as a batch size with passes, or in all.
    """
    batch = changes.get("batch_size")
    begun = batch == AUTO and settings.get("batch_size") != AUTO
    result = {**settings, **(in_samples(settings) if begun else {}), **changes}
    if batch not in (None, AUTO) and "step_samples" not in changes:
        result["step_samples"] = None
    for one, other in (("max_steps", "max_epochs"), ("max_epochs", "max_steps")):
        if changes.get(one) is not None and changes.get(other) is None:
            result[other] = None
    return result


def in_samples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what says the samples of the same steps when the batch size is to be found."""
    accumulate, batch = settings.get("accumulate", 1), settings.get("batch_size", TrainingConfig.batch_size)
    if not (isinstance(accumulate, int) and isinstance(batch, int)):
        # What is no number is told by TrainingConfig.
        return {}
    return {
        "accumulate": 1,
        "step_samples": batch * accumulate if accumulate != 1 or "batch_size" in settings else None,
    }


def _known(name: str) -> str:
    """Return a name that exists."""
    if name not in preset_names():
        raise ConfigError(f"There is no preset {name!r}.", f"Expected one of {', '.join(preset_names())}.")
    return name


def _settings(name: str) -> dict[str, Any]:
    """Return what a preset sets."""
    return dict(_read(FOLDER / f"{_known(name)}.yaml")["settings"])


@lru_cache(maxsize=32)
def _parsed(text: str) -> Any:
    return require("yaml", "read presets", "PyYAML").safe_load(text)


def _read(path: Path) -> dict[str, Any]:
    """Read and check the outer form of a preset file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The preset {path} cannot be read ({error}).", "Expected a YAML file.") from error
    yaml = require("yaml", "read presets", "PyYAML")
    try:
        content = _parsed(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        raise ConfigError(
            f"The preset {path} is not YAML ({place}{getattr(error, 'problem', None) or error}).",
            "Expected lines such as 'batch_size: 16' under 'settings:'.",
        ) from error
    shape = isinstance(content, dict) and set(content) == {"about", "settings"}
    if not shape or not isinstance(content["about"], str) or not isinstance(content["settings"], dict):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(
            f"The preset {path} holds {found}.", "Expected 'about', a sentence, and 'settings', names with values."
        )
    return content
