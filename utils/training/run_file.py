"""One YAML file that says everything about a run, for the command line: model, data, settings, search, export.

A file with nothing but training settings, YAML or JSON, is read as well.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from utils.runtime.errors import ConfigError
from utils.runtime.optional import require
from utils.training.config import TrainingConfig


@dataclass(frozen=True)
class RunFile:
    """The sections of a run file; what it does not say is None or empty."""

    model: str | None = None
    """Reference of the model."""
    model_config: dict[str, Any] | None = None
    """Settings that replace the model's own."""
    revision: str | None = None
    """Revision of a Gist or repository."""
    task: str | None = None
    """What the model is for, when detection is wrong."""
    data: str | None = None
    """Data reference."""
    run_dir: str | None = None
    """The run's directory."""
    mirror: str | None = None
    """Where a second copy of the run is kept."""
    preset: str | None = None
    """Name of the preset that `config` changes."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of `TrainingConfig`."""
    search: dict[str, Any] = field(default_factory=dict)
    """Space, trials, pruner, seed, folder, storage, best_dir."""
    export: dict[str, Any] = field(default_factory=dict)
    """Directory, formats and weights."""
    bundle: dict[str, Any] = field(default_factory=dict)
    """Directory, formats, weights, licence, repo_id."""


SECTIONS = {
    "search": ("space", "trials", "pruner", "seed", "folder", "storage", "best_dir"),
    "export": ("directory", "formats", "weights"),
    "bundle": ("directory", "formats", "weights", "licence", "repo_id"),
}
"""Fields of the sections that are not settings of training; `SearchSpace` and `TrainingConfig` check the rest."""


def read_run_file(path: str | Path) -> RunFile:
    """Read a run file.

    Raises:
        ConfigError: It cannot be read, or a name in it is unknown, twice there, or in conflict with another.
    """
    values = _read(Path(path))
    known = [f.name for f in fields(RunFile)]
    settings = [f.name for f in fields(TrainingConfig)]
    sections = [name for name in values if name in known]
    bare = [name for name in values if name in settings]
    if bare and sections:
        raise ConfigError(
            f"{path} has the setting {bare[0]!r} beside the section {sections[0]!r}.",
            "Expected settings of training below config: when the file has sections.",
            f"Write config: {{{bare[0]}: {values[bare[0]]!r}}}.",
        )
    if values and not sections:
        # Unknown names are told by TrainingConfig, with the nearest known one, unless they look like a section.
        for name in values:
            if name not in settings and (near := get_close_matches(name, known, n=1)):
                raise _unknown(str(path), name, known, near)
        return RunFile(config=values)
    for name in values:
        if name not in known:
            raise _unknown(str(path), name, known, get_close_matches(name, known, n=1))
    for name in ("config", *SECTIONS, "model_config"):
        if name in values and not isinstance(values[name], Mapping):
            raise ConfigError(f"{path} has {name}: {values[name]!r}.", "Expected names and values below it.")
    for section, allowed in SECTIONS.items():
        for name in values.get(section, {}):
            if name not in allowed:
                raise _unknown(f"The section {section} of {path}", name, allowed, get_close_matches(name, allowed, n=1))
    for name in ("model", "revision", "task", "data", "run_dir", "mirror", "preset"):
        if name in values and not isinstance(values[name], str):
            raise ConfigError(f"{path} has {name}: {values[name]!r}.", "Expected a text.")
    return RunFile(**values)


def _unknown(place: str, name: str, known: Any, near: list[str]) -> ConfigError:
    """Return the error for a name that nobody knows."""
    return ConfigError(
        f"{place} has {name!r}, which is unknown.",
        f"Expected some of {', '.join(known)}.",
        f"Did you mean {near[0]!r}?" if near else "",
    )


def _read(path: Path) -> dict[str, Any]:
    """Read YAML, of which JSON is a part."""
    yaml: Any = require("yaml", "read a run file", "PyYAML")

    class Loader(yaml.SafeLoader):
        """Reads 1e-4 as a number, and refuses a name that is there twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            twice = sorted({str(name) for name in names if names.count(name) > 1})
            if twice:
                raise ConfigError(
                    f"{path} has {twice[0]!r} twice, in the lines up to {node.end_mark.line}.",
                    "Expected each name once.",
                )
            return dict(super().construct_mapping(node, deep=deep))

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} cannot be read: {' '.join(str(error).split())}.", "Expected a file of names and values in YAML."
        ) from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(
            f"{path} holds {type(values).__name__ if values is not None else 'nothing'}.",
            "Expected names and values, such as model: example:gpt.",
        )
    return values
