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
from utils.training.state import StatefulPart, Undo

if TYPE_CHECKING:
    from torch import Tensor

    from utils.training.session_callback import SessionCallback

SLOTS: Mapping[str, str] = {"growth": "utils.growth.extension"}
"""The setting that fills a slot, and the module that brings what goes into it.

Its functions: ``make_extension(config)``; ``has_grown(module)``, which tells whether a model needs it whatever the
settings say; ``check_source(adapter)`` and ``leave_behind(module, directory)``, see below.
"""


class Extension(StatefulPart, Protocol):
    """Something that takes part in a run; its state is a part of the checkpoints, under the name of its slot."""

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

    def restore(self, adapter: ModelAdapter, state: Mapping[str, Any], as_it_began: Callable[[], None]) -> None:
        """Bring a model that was just built from its source into the shape that a checkpoint's weights have.

        Args:
            adapter: The model.
            state: What `state_dict` returned when the checkpoint was written.
            as_it_began: To be called when the model has the shape that it had when the run began.
        """

    def start(self, session: "SessionCallback") -> None:
        """Get ready; the states of all parts are loaded."""

    def after_step(self, session: "SessionCallback", batch: "Mapping[str, Tensor]") -> None:
        """Act after an optimizer step, before it is decided whether the run stops or saves."""

    def end(self, session: "SessionCallback") -> None:
        """Act at the end of a session that no error ended; everything is saved."""


def adopted(config: TrainingConfig, module: nn.Module) -> TrainingConfig:
    """Return settings with the slots filled that a model needs because of what was done with it before."""
    for name, home in SLOTS.items():
        # A package that was never imported has done nothing.
        used = home.rpartition(".")[0] in sys.modules
        if used and getattr(config, name) is None and importlib.import_module(home).has_grown(module):
            config = config.with_changes(**{name: {}})
    return config


def leave_behind(module: nn.Module, directory: Path) -> bool:
    """Write what else it takes to build a model as it is now; tell whether there was anything.

    Args:
        module: The model.
        directory: Where its weights are.
    """
    used = [home for home in SLOTS.values() if home.rpartition(".")[0] in sys.modules]
    left = [importlib.import_module(home).leave_behind(module, directory) for home in used]
    return any(left)


def check_sources(adapter: ModelAdapter) -> None:
    """Make sure that a run could build its model again, after what was done with it in this process.

    Raises:
        SeedbedError: It could not.
    """
    for home in SLOTS.values():
        if home.rpartition(".")[0] in sys.modules:
            importlib.import_module(home).check_source(adapter)


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
