"""The value that `load_model` returns."""

import html
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy

from utils.loading.audit import AuditReport
from utils.loading.config import parse_config
from utils.loading.source import CONFIG_FILE
from utils.runtime.errors import InstantiationError
from utils.runtime.files import write_atomic
from utils.runtime.resources import format_count


@dataclass(frozen=True, eq=False, repr=False)
class LoadedModel:
    """A model, and everything there is to know about where it came from."""

    module: nn.Module
    """The model, with seeded initial weights or, from transformers, with its own."""
    config: dict[str, Any]
    """Its settings, flat, with what the caller overrode."""
    files: dict[str, str] = field(default_factory=dict)
    """Source text by file name; empty for a module given directly."""
    kind: Literal["gist", "github", "path", "hub", "example", "module"] = "module"
    """Where it came from."""
    reference: str = ""
    """The reference in its shortest form; `load_model` accepts it again."""
    revision: str | None = None
    """The version of the source, where it comes from a place that keeps versions."""
    sha256: str | None = None
    """SHA-256 of the files."""
    audit: AuditReport | None = None
    """What the source would touch; None where no source was run."""
    notes: tuple[str, ...] = ()
    """What the user should know about how it was loaded."""
    build: Callable[[], nn.Module] | None = None
    """Builds another instance; None for a module given directly."""

    def __repr__(self) -> str:
        """Return class, size and origin in one line."""
        reference = self.reference or "a module"
        return f"LoadedModel({self.name}, {format_count(self.num_parameters)} parameters, from {reference[:80]})"

    @property
    def name(self) -> str:
        """The name of the model's class."""
        return type(self.module).__name__

    @property
    def num_parameters(self) -> int:
        """The number of parameters, shared ones counted once."""
        return sum(p.numel() for p in self.module.parameters() if not is_lazy(p))

    @property
    def can_rebuild(self) -> bool:
        """Whether `factory` can build another instance."""
        return self.build is not None

    def factory(self) -> nn.Module:
        """Build another instance with the same settings and the same initial weights.

        Raises:
            InstantiationError: The model was given as a module, whose settings are unknown.
        """
        if self.build is None:
            raise InstantiationError(
                f"No second {self.name} can be built: it was given as a module.",
                "Expected a model that was loaded from source.",
                "Pass a link or a file to load_model instead, or ModelSpec(factory=...).",
            )
        return self.build()

    def save_source(self, directory: Path | str) -> None:
        """Write a folder from which `load_model` builds the same class with the same settings, without weights.

        Raises:
            InstantiationError: The model was given as a module, or its config cannot be written as JSON.
        """
        if self.build is None or not self.files:
            raise InstantiationError(
                f"The source of {self.name} cannot be saved: it was given as a module.",
                "Expected a model that was loaded from source.",
                "Pass a link or a file to load_model instead.",
            )
        files = dict(self.files)
        if CONFIG_FILE not in files or parse_config(files[CONFIG_FILE]) != self.config:
            try:
                files[CONFIG_FILE] = json.dumps(self.config, indent=2) + "\n"
            except (TypeError, ValueError) as error:
                raise InstantiationError(
                    f"The config of {self.name} cannot be saved: {error}.",
                    "Expected settings that JSON can hold: numbers, texts, lists, dicts.",
                    "Pass plain values in config=.",
                ) from None
        for name, text in files.items():
            write_atomic(Path(directory) / name, text)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the module as plain data; source files by name only."""
        return {
            "name": self.name,
            "kind": self.kind,
            "reference": self.reference,
            "revision": self.revision,
            "sha256": self.sha256,
            "parameters": self.num_parameters,
            "config": dict(self.config),
            "files": sorted(self.files),
            "audit": None if self.audit is None else self.audit.to_dict(),
            "notes": list(self.notes),
        }

    def _repr_html_(self) -> str:
        rows = {
            "model": f"{self.name}, {format_count(self.num_parameters)} parameters",
            "from": f"{self.reference or 'a module'}" + (f" at {self.revision[:12]}" if self.revision else ""),
            "files": ", ".join(sorted(self.files)) or "none",
            "SHA-256": (self.sha256 or "none")[:16],
            "config": json.dumps(self.config, default=repr)[:2000],
            **{f"note {index}": note for index, note in enumerate(self.notes, 1)},
        }
        table = "".join(
            f"<tr><th style='text-align:left'>{html.escape(key)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for key, value in rows.items()
        )
        return f"<table>{table}</table>" + ("" if self.audit is None else self.audit._repr_html_())
