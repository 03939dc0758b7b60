"""A model's weights in a safetensors file: tensors that share memory are stored once."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.runtime.errors import CheckpointError

ALIASES = "aliases"
"""Key of the file's metadata: a JSON object from the name of a shared tensor to the name it is stored under."""


def distinct_tensors(module: nn.Module, copy: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a module's state into tensors to store and names that share one of them.

    Args:
        module: The model.
        copy: Copy also what is on the CPU already, so that training can go on while the tensors are written.

    Returns:
        The tensors by name, contiguous and on the CPU, and for every further name of one the name it is stored under.
    """
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"The model keeps {type(tensor).__name__} under {name!r} in its state.",
                "Expected tensors only.",
                "Move other values out of get_extra_state().",
            )
        key = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            value = tensor.detach().to("cpu", copy=copy).contiguous()
            # Views into one larger tensor must not drag it into the file.
            tensors[name] = value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    return tensors, aliases


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's weights to a safetensors file.

    Raises:
        OSError: The file cannot be written.
    """
    write_tensors(*distinct_tensors(module), path)


def write_tensors(tensors: dict[str, Tensor], aliases: dict[str, str], path: Path) -> None:
    """Write what `distinct_tensors` returned to a safetensors file.

    Raises:
        OSError: The file cannot be written.
    """
    from safetensors.torch import save

    # `save` and a plain write keep the operating system's own error, such as "No space left on device".
    content = save(tensors, metadata={ALIASES: json.dumps(aliases), "format": "pt"})
    header, start = _sorted_header(content)
    with open(path, "wb") as stream:
        stream.write(header)
        stream.write(memoryview(content)[start:])


def _sorted_header(content: bytes) -> tuple[bytes, int]:
    """Return a safetensors file's header with its metadata in order, and where the tensors start.

    The library writes metadata in a random order, and equal weights should be equal files. A header is its length in
    eight bytes, then JSON padded with spaces; the offsets in it count from its end.
    """
    size = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + size])
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + size


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file that `save_weights` wrote, shared tensors under all their names."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        aliases = json.loads((stream.metadata() or {}).get(ALIASES, "{}"))
    return tensors | {name: tensors[stored] for name, stored in aliases.items()}


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a file that `save_weights` wrote into a module.

    Raises:
        CheckpointError: The file belongs to another model: names or shapes differ.
    """
    tensors, present = read_weights(path), module.state_dict()
    missing, unknown = present.keys() - tensors.keys(), tensors.keys() - present.keys()
    shapes = [
        f"{name} is {tuple(tensors[name].shape)} on disk and {tuple(present[name].shape)} in the model"
        for name in present.keys() & tensors.keys()
        if tensors[name].shape != present[name].shape
    ]
    if missing or unknown or shapes:
        details = "; ".join(
            [f"missing: {', '.join(sorted(missing)[:3])}"] * bool(missing)
            + [f"not in the model: {', '.join(sorted(unknown)[:3])}"] * bool(unknown)
            + sorted(shapes)[:3]
        )
        raise CheckpointError(
            f"The weights in {path.name} belong to another model ({details}).",
            f"Expected the weights of this {type(module).__name__}.",
            "Use the model and the config that the run was started with.",
        )
    module.load_state_dict(tensors)


def weights_sha256(module: nn.Module) -> str:
    """Return one SHA-256 over the names, types, shapes and bytes of all weights and buffers, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().to("cpu").contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
