"""Arguments with structure: what is nested inside dicts, lists and packed sequences becomes flat inputs with paths.

The rest of the package sees ``{"batch.input_ids": tensor}`` and changes one tensor at a time; `rebuilt` makes the
call's own structure of it again.
"""

from collections.abc import Collection, Mapping
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


def rebuilt(template: Mapping[str, Any], inputs: Mapping[str, Any], left_out: Collection[str] = ()) -> dict[str, Any]:
    """Return a call's arguments: the template's structure with the tensors of `inputs`.

    Args:
        template: Arguments that were flattened.
        inputs: Flat inputs by path; what is missing keeps the template's value. Names the template lacks are added.
        left_out: Paths of arguments, or of entries of dicts, that the call does without.
    """
    kept = {name: value for name, value in template.items() if name not in left_out}
    filled = {name: _filled(value, inputs, name, left_out) for name, value in kept.items()}
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


def _filled(value: Any, inputs: Mapping[str, Any], path: str, left_out: Collection[str]) -> Any:
    if isinstance(value, PackedSequence):
        padded = inputs.get(path)
        if padded is None:
            return value
        lengths = pad_packed_sequence(value)[1]
        lengths = lengths.repeat(-(-len(padded) // len(lengths)))[: len(padded)].clamp(max=padded.shape[1])
        return pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if f"{path}.{key}" not in left_out}
        return {key: _filled(item, inputs, f"{path}.{key}", left_out) for key, item in kept.items()}
    if _is_nested(value):
        items = [_filled(item, inputs, f"{path}.{index}", left_out) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return inputs.get(path, value)
