"""One row of a form for each setting: a widget, its help from the dataclass, and room for what is wrong with it."""

import ast
import json
import re
from collections.abc import Callable
from dataclasses import fields
from html import escape
from typing import Any, get_type_hints

from utils.runtime.errors import ConfigError
from utils.runtime.settings import field_help
from utils.training.config import (
    AUTO,
    AUTOMATIC,
    NESTED,
    PRECISIONS,
    SCHEDULES,
    STRATEGIES,
    TRACKERS,
    TrainingConfig,
)
from utils.ui.compat import widgets, with_tooltip

NOTHING = ""
"""Stands for None in a list: with None itself selected, a list shows nothing."""
CHOICES: dict[str, tuple[str, ...]] = {
    "precision": PRECISIONS,
    "schedule": SCHEDULES,
    "strategy": STRATEGIES,
    "tracking": (NOTHING, *TRACKERS, ",".join(TRACKERS)),
}
GROUPS = {
    "How long": ("max_steps", "max_epochs", "time_budget_minutes", "session_limit_minutes", "early_stopping_patience"),
    "Steps": ("batch_size", "accumulate", "step_samples", "context_length", "seed", "augment", "validation_share"),
    "Learning rate and optimizer": (
        "learning_rate", "schedule", "warmup_share", "decay_share", "final_learning_rate_share", "weight_decay",
        "beta2", "clip_norm", "label_smoothing", "ema_decay",
    ),
    "Checkpoints and measurements": (
        "checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints", "keep_best", "keep_every_steps",
        "val_every_steps", "log_every_steps",
    ),
    "Growth": ("growth",),
    "Continual learning": ("continual",),
    "Curriculum": ("curriculum",),
    "Machine": ("precision", "gradient_checkpointing", "compile", "workers", "devices", "strategy"),
}  # fmt: skip
"""Where a setting is shown; one that is named nowhere is shown under Machine."""
UP_FRONT = ("tracking",)
ERROR = "color:#c0392b;font-size:12px;line-height:1.35"
HELP = "opacity:.7;font-size:12px;line-height:1.35"


def shown_fields() -> list[str]:
    """Return the settings that have a row: all of them."""
    return [each.name for each in fields(TrainingConfig)]


def grouped() -> dict[str, list[str]]:
    """Return the settings by the group they are shown in; none is left out."""
    groups = {title: list(names) for title, names in GROUPS.items()}
    known = {name for names in groups.values() for name in names} | set(UP_FRONT)
    groups["Machine"] += [name for name in shown_fields() if name not in known]
    return groups


class Row:
    """A widget with its label, its help and its error.

    Attributes:
        widget: What the user changes.
        box: The whole row.
    """

    def __init__(self, label: str, widget: Any, text: str, width: str = "220px") -> None:
        """Put a row together."""
        kit = widgets()
        self.widget = with_tooltip(widget, text)
        widget.layout.width = width
        name = kit.HTML(f'<span style="font-size:13px">{escape(label)}</span>')
        name.layout.width = "190px"
        self._help = kit.HTML(f'<div style="{HELP}">{escape(text)}</div>')
        self._error = kit.HTML("")
        beside = kit.VBox([self._help, self._error])
        beside.layout.flex = "1 1 260px"
        beside.layout.min_width = "200px"
        beside.layout.padding = "0 0 0 8px"
        self.box = kit.HBox([name, widget, beside])
        self.box.layout.flex_flow = "row wrap"
        self.box.layout.align_items = "center"
        self.error = ""

    def complain(self, text: str = "") -> None:
        """Show what is wrong beside the widget; nothing when all is well."""
        self.error = text
        self._error.value = f'<div style="{ERROR}">{escape(text)}</div>' if text else ""


class SettingRow(Row):
    """The row of one field of `TrainingConfig`."""

    def __init__(self, name: str, changed: Callable[[], None]) -> None:
        """Make the widget that fits the field's type.

        Args:
            name: The field.
            changed: Called when the user has changed it.
        """
        kit = widgets()
        self.name = name
        self.kind = get_type_hints(TrainingConfig)[name]
        if name in CHOICES:
            widget = kit.Dropdown(options=[(one or "none", one) for one in CHOICES[name]])
        elif self.kind is bool:
            widget = kit.Checkbox(indent=False)
        else:
            # Plain text: a number field would silently keep the old number when what was typed is none.
            widget = kit.Text(continuous_update=False, placeholder="none")
        super().__init__(name.replace("_", " "), widget, field_help(TrainingConfig)[name])
        self.put(getattr(TrainingConfig(), name))
        widget.observe(lambda change: changed(), names="value")

    @property
    def typed(self) -> bool:
        """Whether the widget is a line of text."""
        return self.name not in CHOICES and self.kind is not bool

    def put(self, value: Any) -> None:
        """Show a value."""
        if self.typed:
            shown = json.dumps(value) if self.name in NESTED else f"{value!r}"
            self.widget.value = "" if value is None else value if value == AUTO else shown
        else:
            self.widget.value = NOTHING if value is None else value

    def value(self) -> Any:
        """Return the value that the widget holds.

        Raises:
            ConfigError: What was typed is no number.
        """
        held = self.widget.value
        if not self.typed:
            return None if held == NOTHING else held
        text = held.strip().replace("_", "")
        if text.lower() in ("", "none"):
            return None
        if self.name in AUTOMATIC and text.lower() == AUTO:
            return AUTO
        if self.name in NESTED:
            return nested(self.name, held)
        try:
            return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
        except ValueError:
            other = "auto" if self.name in AUTOMATIC else "nothing for none"
            raise ConfigError(f"TrainingConfig.{self.name} is {held!r}.", f"Expected a number, or {other}.") from None


def nested(name: str, text: str) -> Any:
    """Read settings within a setting from a line of text.

    Raises:
        ConfigError: It is no JSON with names and values.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        value, said = None, f" ({error})"
    else:
        said = ""
    if not isinstance(value, dict):
        example = json.dumps(ast.literal_eval(NESTED[name]))
        raise ConfigError(
            f"TrainingConfig.{name} is {text!r}{said}.", "Expected names and values in JSON.", f"For example {example}"
        )
    return value


def fields_in(text: str) -> list[str]:
    """Return the settings that an error message names, in their order in the message."""
    names = dict.fromkeys(re.findall(r"[a-z][a-z0-9_]+", text))
    return [name for name in names if name in shown_fields()]
