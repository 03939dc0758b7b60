"""Seedbed: know whether a PyTorch model is sound, train it where machines vanish, ship it.

The public surface, loaded on first use: `load_model`, `read_code`, `validate`, `show`, `train`, `resume`, `export`,
`grow`, `unfinished_runs`, `bundle`, `publish`, `generate`, `ModelSpec`, `ModelAdapter`, `LoadedModel` and
`TrainingConfig`. Importing this package imports only the standard library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from utils.runtime.project import VERSION as __version__

if TYPE_CHECKING:
    from utils.adapters import ModelAdapter, ModelSpec
    from utils.growth.growing import grow
    from utils.loading import LoadedModel, load_model, read_code
    from utils.tier1_critical_validation import show, validate
    from utils.tier3_training_utilities import export, resume, train
    from utils.training import TrainingConfig
    from utils.training.bundle import bundle
    from utils.training.generation import generate
    from utils.training.publish import publish
    from utils.training.unfinished import unfinished_runs

_HOMES = {
    "load_model": "utils.loading",
    "LoadedModel": "utils.loading",
    "read_code": "utils.loading",
    "ModelAdapter": "utils.adapters",
    "ModelSpec": "utils.adapters",
    "validate": "utils.tier1_critical_validation",
    "show": "utils.tier1_critical_validation",
    "train": "utils.tier3_training_utilities",
    "resume": "utils.tier3_training_utilities",
    "export": "utils.tier3_training_utilities",
    "bundle": "utils.training.bundle",
    "publish": "utils.training.publish",
    "generate": "utils.training.generation",
    "grow": "utils.growth.growing",
    "unfinished_runs": "utils.training.unfinished",
    "TrainingConfig": "utils.training",
}

__all__ = [
    "LoadedModel",
    "ModelAdapter",
    "ModelSpec",
    "TrainingConfig",
    "__version__",
    "bundle",
    "export",
    "generate",
    "grow",
    "load_model",
    "publish",
    "read_code",
    "resume",
    "show",
    "train",
    "unfinished_runs",
    "validate",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'utils' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
