"""Slots for the layers above training: growth and continual learning take part in a run without training knowing them.

A setting of `TrainingConfig` with the name of a slot fills it: the package of that name, above this one, brings the
extension. Nothing of it is imported before a run asks for it.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from utils.adapters import ModelAdapter
from utils.training.config import TrainingConfig
from utils.training.prepared_data import PreparedData
from utils.training.state import ModelChange, Undo
from utils.training.stream import SampleStream

if TYPE_CHECKING:
    from torch import Tensor

    from utils.training.run import Run
    from utils.training.session_callback import SessionCallback

SLOTS: Mapping[str, str] = {
    "growth": "utils.growth.extension",
    "continual": "utils.continual.extension",
    "curriculum": "utils.continual.curriculum_extension",
}
"""The setting that fills a slot, and the module that brings what goes into it; they act in this order.

Its functions: ``make_extension(config)``; and where models are changed for good ``has_grown(module)``, which tells
whether a model needs it whatever the settings say, ``check_source(adapter)`` and ``leave_behind(module, directory)``;
``check_export(config)``.
"""


class Extension:
    """Something that takes part in a run; its state is a part of the checkpoints, under the name of its slot.

    It is a `utils.training.state.StatefulPart`. What it does not need it leaves as it is here.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state: nested dicts and lists of numbers, strings and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `state_dict` returned."""

    def migrate(self, change: ModelChange) -> Undo | None:
        """Follow a change of the model; see `utils.training.state.StatefulPart`."""
        return None

    def arrange(self, adapter: ModelAdapter, data: PreparedData) -> PreparedData:
        """Return the data of a new run as this wants it: with notes of its own.

        Raises:
            SeedbedError: It cannot work on this data.
        """
        return data

    def begin(self, adapter: ModelAdapter, total_steps: int) -> Undo | None:
        """Act on a model with which a new run begins, before anything is written.

        Args:
            adapter: The model.
            total_steps: Steps of the run.

        Returns:
            What puts the model back, for a run that cannot be made after all.

        Raises:
            SeedbedError: The model cannot begin so; it is as it was.
        """
        return None

    def restore(self, adapter: ModelAdapter, state: Mapping[str, Any], as_it_began: Callable[[], None]) -> None:
        """Bring a model that was just built from its source into the shape that a checkpoint's weights have.

        Args:
            adapter: The model.
            state: What `state_dict` returned when the checkpoint was written.
            as_it_began: To be called when the model has the shape that it had when the run began; at the end by itself.
        """

    def open_stream(self, run: "Run") -> SampleStream | None:
        """Return the training data in another order; None for the usual one."""
        return None

    def start(self, session: "SessionCallback") -> None:
        """Get ready; the states of all parts are loaded."""

    def weights_changed(self, session: "SessionCallback") -> None:
        """Act on the weights right after an optimizer step, before anything is averaged or measured."""

    def after_step(self, session: "SessionCallback", batch: "Mapping[str, Tensor]") -> None:
        """Act after an optimizer step, before it is decided whether the run stops or saves."""

    def measure(self, session: "SessionCallback") -> dict[str, float] | None:
        """Return held-out metrics of the present weights instead of the usual ones; None for these.

        Such numbers are of what the run is about at this step; no checkpoint is kept for being best by them.
        """
        return None

    def end(self, session: "SessionCallback") -> None:
        """Act at the end of a session that no error ended; everything is saved."""

    def release(self) -> None:
        """Let go of the model at the end of any session, also one that an error ended; may be called twice."""


class Shaping(Protocol):
    """What changes the loss or the gradient of every step."""

    def new_batch(self, batch: "dict[str, Tensor]") -> None:
        """Get ready for a forward pass on a batch of the run's data."""

    def extra_loss(self, batch: "dict[str, Tensor]", logits: "Tensor", labels: "Tensor") -> "Tensor | None":
        """Return what is added to the loss of a batch, with its graph."""

    def change_gradient(self) -> None:
        """Change the gradient of a whole step, before it is measured and clipped."""


def adopted(config: TrainingConfig, module: nn.Module) -> TrainingConfig:
    """Return settings with the slots filled that a model needs because of what was done with it before."""
    for name, has_grown in _used("has_grown"):
        if getattr(config, name) is None and has_grown(module):
            config = config.with_changes(**{name: {}})
    return config


def leave_behind(module: nn.Module, directory: Path) -> bool:
    """Write what else it takes to build a model as it is now; tell whether there was anything.

    Args:
        module: The model.
        directory: Where its weights are.
    """
    left = [leave(module, directory) for _, leave in _used("leave_behind")]
    return any(left)


def check_sources(adapter: ModelAdapter) -> None:
    """Make sure that a run could build its model again, after what was done with it in this process.

    Raises:
        SeedbedError: It could not.
    """
    for _, check in _used("check_source"):
        check(adapter)


def check_export(config: TrainingConfig) -> None:
    """Make sure that the bare model of a run answers as the run's model does.

    Raises:
        SeedbedError: It does not.
    """
    for name, home in SLOTS.items():
        if getattr(config, name) is not None and hasattr(module := importlib.import_module(home), "check_export"):
            module.check_export(config)


def _used(function: str) -> list[tuple[str, Callable[..., Any]]]:
    """Return the slots whose packages have a function of this name; one that was never imported has done nothing."""
    modules = [
        (name, importlib.import_module(home)) for name, home in SLOTS.items() if home.rpartition(".")[0] in sys.modules
    ]
    return [(name, getattr(module, function)) for name, module in modules if hasattr(module, function)]


def extensions_of(config: TrainingConfig) -> dict[str, Extension]:
    """Return the extensions that a run's settings ask for, by slot.

    Raises:
        ConfigError: A slot's own settings are wrong.
    """
    return {
        name: importlib.import_module(module).make_extension(config)
        for name, module in SLOTS.items()
        if getattr(config, name) is not None
    }
