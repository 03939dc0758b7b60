"""A new instance of a model, as it was before any training: what a comparison of runs has to start from."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.loading import LoadedModel, load_model
from utils.loading.instantiate import instantiate
from utils.loading.source import Source
from utils.runtime.errors import InstantiationError
from utils.runtime.seeding import isolated_streams

Factory = Callable[[], nn.Module]
NO_BUDGET = 1e9
"""Minutes of a session without a time budget, for a run that was started with one."""


def buildable(model: Any, spec: ModelSpec | None = None, trust: bool = False) -> "LoadedModel | Factory":
    """Return something that `fresh_model` can build instances from.

    Args:
        model: A loaded model, a reference for `utils.load_model`, an adapter, a function that returns a new module, or
            a module whose `spec` has a factory.
        spec: What the user knows about the model.
        trust: As for `utils.load_model`.

    Raises:
        InstantiationError: The model was given as a module, of which there is only this one.
    """
    if isinstance(model, str):
        model = load_model(model, trust=trust)
    origin = model.origin if isinstance(model, ModelAdapter) else model
    if isinstance(origin, LoadedModel) and origin.can_rebuild:
        return origin
    if isinstance(origin, LoadedModel):
        origin = origin.module
    factory = (spec.factory if spec is not None else None) or (
        model.spec.factory if isinstance(model, ModelAdapter) else None
    )
    if factory is not None:
        return factory
    if callable(origin) and not isinstance(origin, nn.Module):
        return origin
    raise InstantiationError(
        f"No second {type(origin).__name__} can be built: it was given as a module.",
        "Expected a model that can be made again, because each run must start from fresh weights.",
        "Load it with utils.load_model, pass a function that returns a new one, or ModelSpec(factory=...).",
    )


def fresh_model(source: "LoadedModel | Factory", seed: int = 0) -> "LoadedModel | nn.Module":
    """Build a new instance with initial weights drawn from a seed.

    Models that transformers builds are not drawn: they come with the weights that they always have.
    """
    if isinstance(source, LoadedModel):
        if source.files and source.kind != "hub":
            built = instantiate(Source(dict(source.files)), source.config, seed)
            return replace(source, module=built.module, build=built.build)
        return replace(source, module=source.factory())
    with isolated_streams("instantiate", seed):
        return source()


def module_of(model: "LoadedModel | nn.Module") -> nn.Module:
    """Return the module itself."""
    return model.module if isinstance(model, LoadedModel) else model
