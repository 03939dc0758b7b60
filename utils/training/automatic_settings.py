"""Settings that are ``auto``: found once, at the start of a run, and numbers from then on."""

from typing import Any

from utils.adapters import ModelAdapter
from utils.runtime.progress import say
from utils.training.batch_size_finder import find_batch_size
from utils.training.config import AUTO, STEP_SAMPLES, TrainingConfig
from utils.training.learning_rate_finder import find_learning_rate
from utils.training.prepared_data import PreparedData

FOUND_TOGETHER = {"batch_size": ("batch_size", "accumulate", "step_samples"), "learning_rate": ("learning_rate",)}
"""What a run's record says of a setting that was found, by the setting."""


def resolved(
    adapter: ModelAdapter, data: PreparedData, config: TrainingConfig, progress: bool = True
) -> tuple[TrainingConfig, dict[str, Any]]:
    """Return settings without ``auto``, and what was found for each that had it.

    The batch size comes first, because the learning rate depends on the samples of a step and not the other way round.

    Raises:
        RunError: A setting cannot be found for this model and this data.
    """
    found: dict[str, Any] = {}
    if config.batch_size == AUTO:
        batch = find_batch_size(adapter, data, config)
        config, found["batch_size"] = batch.applied(config), batch
    if config.learning_rate == AUTO:
        rate = find_learning_rate(adapter, data, config, progress=progress).check()
        config, found["learning_rate"] = config.with_changes(learning_rate=rate.learning_rate), rate
    for finding in found.values():
        say(finding.text(), progress)
    return config, found


def asked_for(settings: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the numbers that a run found in place of ``auto``, for a comparison with its record.

    Args:
        settings: What is asked for now, as plain values.
        record: The run's ``run.json``.
    """
    found = record.get("found", {})
    autos = [name for name in FOUND_TOGETHER if settings.get(name) == AUTO and name in found]
    numbers = {name: record["config"][name] for auto in autos for name in FOUND_TOGETHER[auto]}
    if "batch_size" in numbers:
        samples = settings["step_samples"] or STEP_SAMPLES
        if samples != numbers["batch_size"] * numbers["accumulate"]:
            # Another step, which is another run.
            numbers["step_samples"] = samples
    return {**settings, **numbers}
