"""The settings with which a model's source builds it as it is now, after it has changed its structure.

A model that grew is code, settings and a lineage. Where the same growth can be said by settings alone, such as more
blocks or a wider feed-forward layer everywhere, an export says it so: whoever loads it then needs nothing but the code.
"""

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.adapters import ModelAdapter
from utils.loading import LoadedModel, load_model
from utils.runtime.files import write_json

MOST_TRIED = 48
"""Combinations of settings that are tried."""
MOST_CHOICES = 4096
"""Combinations that are put in order for that."""


def layout(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a module's state by name."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def fitting_config(loaded: LoadedModel, adapter: ModelAdapter) -> dict[str, Any] | None:
    """Return settings that build a model which answers, with the weights of a grown one, as that does; None without.

    Args:
        loaded: The source, with the settings that it was built with.
        adapter: The model as it is now.
    """
    grown = adapter.module
    wanted = layout(grown)
    sizes = _changed_sizes(loaded.factory(), grown)
    with tempfile.TemporaryDirectory() as folder:
        loaded.save_source(folder)
        for settings in islice(_candidates(loaded.config, sizes), MOST_TRIED):
            write_json(Path(folder) / "config.json", settings)
            # Settings that contradict each other are no way to build it.
            with suppress(Exception):
                built = load_model(folder, trust=True).module
                # Settings that no tensor shows, such as a number of heads, must be right too.
                if layout(built) == wanted and _answers_alike(adapter, built):
                    return settings
    return None


def _answers_alike(adapter: ModelAdapter, built: nn.Module) -> bool:
    """Tell whether another instance with the same weights answers the same."""
    built.load_state_dict(adapter.module.state_dict())
    other = copy.copy(adapter)
    other.module = built.to(adapter.device).eval()
    inputs = adapter.example_inputs()
    with adapter.isolated():
        return torch.allclose(adapter.logits(inputs), other.logits(inputs), rtol=1e-4, atol=1e-5)


def _changed_sizes(built: nn.Module, grown: nn.Module) -> dict[int, set[int]]:
    """Return what each size of a model, or number of its blocks, has become."""
    found: dict[int, set[int]] = {}
    before, after = layout(built), layout(grown)
    for name in before.keys() & after.keys():
        for old, new in zip(before[name], after[name], strict=False):
            if old != new:
                found.setdefault(old, set()).add(new)
    containers = dict(grown.named_modules())
    for name, child in built.named_modules():
        old, new = _blocks(child), _blocks(containers.get(name))
        if old and new and old != new:
            found.setdefault(old, set()).add(new)
    return found


def _blocks(module: nn.Module | None) -> int:
    """Return how many numbered parts a module has."""
    return len(module._modules) if module is not None and "0" in module._modules else 0


def _candidates(config: Mapping[str, Any], sizes: Mapping[int, set[int]]) -> Iterator[dict[str, Any]]:
    """Yield settings in which numbers that a size had are replaced by what it has become, the fewest first."""
    places = [(path, sorted(sizes[value])) for path, value in _numbers(config) if type(value) is int and value in sizes]
    choices = islice(product(*[[None, *new] for _, new in places]), 1, MOST_CHOICES)
    for choice in sorted(choices, key=lambda choice: sum(value is not None for value in choice)):
        changed = copy.deepcopy(dict(config))
        for (path, _), value in zip(places, choice, strict=True):
            if value is not None:
                holder = changed
                for name in path[:-1]:
                    holder = holder[name]
                holder[path[-1]] = value
        yield changed


def _numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the place and value of every number in nested settings."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        if isinstance(item, (Mapping, list)):
            yield from _numbers(item, (*path, name))
        else:
            yield (*path, name), item
