"""A model's settings: config.json in its flat or graph form, merged with what the caller overrides."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.loading.source import CONFIG_FILE, decode
from utils.runtime.errors import ConfigError

# They describe the file or the class, and are not settings of the model.
NOT_SETTINGS = ("nodes", "version", "model_name")


def parse_config(text: str, where: str = CONFIG_FILE) -> dict[str, Any]:
    """Parse config.json into flat settings.

    The graph form ``{"version", "model_name", "nodes": [{"params": {...}}, ...]}`` is flattened: later nodes win over
    earlier ones, and every top-level key except ``nodes``, ``version`` and ``model_name`` wins over the nodes.
    ``model_name`` is kept, because it names the class.

    Raises:
        ConfigError: The text is empty, not JSON, or not an object.
    """
    if not text.strip():
        raise ConfigError(
            f"{where} is empty.", "Expected a JSON object with the model's settings.", "Write {} if there are none."
        )
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.",
            'Expected a JSON object such as {"vocab_size": 2048, "d_model": 128}.',
            "Correct that line; JSON has no comments, no trailing commas and no single quotes.",
        ) from None
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply.", "Expected a flat JSON object.") from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where} holds a JSON {type(value).__name__}.",
            "Expected an object, written with braces.",
            'For example {"vocab_size": 2048}.',
        )
    return flatten(value)


def flatten(value: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the graph form of a config; the flat form comes back unchanged."""
    settings: dict[str, Any] = {}
    nodes = value.get("nodes")
    is_graph = isinstance(nodes, list)
    for node in nodes if isinstance(nodes, list) else ():
        if isinstance(node, dict) and isinstance(node.get("params"), dict):
            settings.update(node["params"])
    for key, item in value.items():
        if key == "model_name" or not is_graph or key not in NOT_SETTINGS:
            settings[key] = item
    return settings


def read_overrides(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return the settings a caller passes, given as a mapping or as the path of a JSON file."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        if bad := [key for key in config if not isinstance(key, str)]:
            raise ConfigError(f"The config has the key {bad[0]!r}.", "Expected names of settings as keys.")
        return flatten(config)
    if isinstance(config, str | os.PathLike):
        path = Path(config).expanduser()
        try:
            data = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"The config {str(path)!r} cannot be read: {reason}.",
                "Expected a dict of settings or the path of a JSON file.",
            ) from None
        return parse_config(decode(data, str(path)), str(path))
    raise ConfigError(
        f"The config is a {type(config).__name__}.", "Expected a dict of settings or the path of a JSON file."
    )


def constructor_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that a constructor may be given."""
    return {key: value for key, value in config.items() if key not in NOT_SETTINGS}
