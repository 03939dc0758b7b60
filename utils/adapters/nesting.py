"""Arguments with structure: what is nested inside dicts, lists and packed sequences becomes flat inputs with paths.

The rest of the package sees ``{"batch.input_ids": tensor}`` and changes one tensor at a time; `rebuilt` makes the
call's own structure of it again.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def flattened(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return every tensor in a call's arguments under its path, and the plain values under their names."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if _is_nested(value):
            flat.update(_leaves(value, name))
        else:
            flat[name] = value
    return flat


def rebuilt(template: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments: the template's structure with the tensors of `inputs`.

    Args:
        template: Arguments that were flattened.
        inputs: Flat inputs by path; what is missing keeps the template's value. Names the template lacks are added.
    """
    filled = {name: _filled(value, inputs, name) for name, value in template.items()}
    return filled | {name: value for name, value in inputs.items() if name.split(".")[0] not in template}


def _is_nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple)) and not isinstance(value, torch.Size)


def _leaves(value: Any, path: str) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, PackedSequence):
        return {path: pad_packed_sequence(value, batch_first=True)[0]}
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if _is_nested(value) else ()
    return {name: leaf for key, item in items for name, leaf in _leaves(item, f"{path}.{key}").items()}


def _filled(value: Any, inputs: Mapping[str, Any], path: str) -> Any:
    if isinstance(value, PackedSequence):
        padded = inputs.get(path)
        if padded is None:
            return value
        lengths = pad_packed_sequence(value)[1]
        lengths = lengths.repeat(-(-len(padded) // len(lengths)))[: len(padded)].clamp(max=padded.shape[1])
        return pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
    if isinstance(value, Mapping):
        return {key: _filled(item, inputs, f"{path}.{key}") for key, item in value.items()}
    if _is_nested(value):
        items = [_filled(item, inputs, f"{path}.{index}") for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return inputs.get(path, value)
