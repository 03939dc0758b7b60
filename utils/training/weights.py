"""A model's weights in a safetensors file: tensors that share memory are stored once."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from utils.runtime.errors import CheckpointError

ALIASES = "aliases"
"""Key of the file's metadata: a JSON object from the name of a shared tensor to the name it is stored under."""
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
"""Names of the types in the safetensors format."""


def distinct_tensors(
    module: nn.Module | Mapping[str, Any], copy: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a module's state into tensors to store and names that share one of them.

    Args:
        module: The model, or what its ``state_dict`` returns.
        copy: Copy also what is on the CPU already, so that training can go on while the tensors are written.

    Returns:
        The tensors by name, contiguous and on the CPU, and for every further name of one the name it is stored under.
    """
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in (module.state_dict() if isinstance(module, nn.Module) else module).items():
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
    with open(path, "wb") as stream:
        write_tensors(*distinct_tensors(module), stream)


class Writable(Protocol):
    """What tensors can be written to."""

    def write(self, data: Any, /) -> int:
        """Take some bytes."""


def write_tensors(tensors: dict[str, Tensor], aliases: dict[str, str], stream: Writable) -> None:
    """Write what `distinct_tensors` returned in the safetensors format.

    The format is the length of a header in eight bytes, the header as JSON padded with spaces, and the tensors' bytes;
    the offsets in the header count from its end. It is written here, not by the library, which would first copy all
    tensors into one more piece of memory and puts its metadata in a random order: equal weights make equal files.

    Raises:
        CheckpointError: The format has no name for the type of a tensor.
        OSError: The file cannot be written.
    """
    # Wide types first, as the library does: every tensor then starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {"__metadata__": {ALIASES: json.dumps(aliases), "format": "pt"}}
    start = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in TYPES:
            raise CheckpointError(
                f"The tensor {name!r} is of type {tensor.dtype}.",
                f"Expected one of {', '.join(str(dtype).removeprefix('torch.') for dtype in TYPES)}.",
                "Keep it as another type, such as two real tensors for a complex one.",
            )
        entries[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    stream.write(len(header).to_bytes(8, "little") + header)
    for name in order:
        if tensors[name].numel():
            stream.write(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy())


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
