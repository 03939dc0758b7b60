"""The settings with which a model's source builds it as it is now, after it has changed its structure.

A model that grew is code, settings and a lineage. Where the same growth can be said by settings alone, such as more
blocks or a wider feed-forward layer everywhere, an export says it so: whoever loads it then needs nothing but the code.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice, product
from pathlib import Path
from typing import Any

from torch import nn

from utils.loading import LoadedModel, load_model
from utils.runtime.files import write_json

MOST_TRIED = 48
"""Combinations of settings that are tried."""


def layout(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a module's state by name."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def fitting_config(loaded: LoadedModel, grown: nn.Module) -> dict[str, Any] | None:
    """Return settings that build a model with the tensors of a grown one; None where there are none.

    Args:
        loaded: The source, with the settings that it was built with.
        grown: The model as it is now.
    """
    wanted = layout(grown)
    sizes = _changed_sizes(loaded.factory(), grown)
    with tempfile.TemporaryDirectory() as folder:
        loaded.save_source(folder)
        for settings in islice(_candidates(loaded.config, sizes), MOST_TRIED):
            write_json(Path(folder) / "config.json", settings)
            # Settings that contradict each other are no way to build it.
            with suppress(Exception):
                if layout(load_model(folder, trust=True).module) == wanted:
                    return settings
    return None


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
    """Yield settings in which numbers that a size had are replaced by what it has become, the most changed first."""
    places = [(path, sorted(sizes[value])) for path, value in _numbers(config) if type(value) is int and value in sizes]
    choices = product(*[[*new, None] for _, new in places])
    for choice in choices:
        changed = _copied(config)
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


def _copied(value: Any) -> Any:
    """Return nested dicts and lists anew."""
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
