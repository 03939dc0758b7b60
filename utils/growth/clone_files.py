"""Clones on disk: the tensors that only the clone has, and its record; the parent is known by its hash."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.adapters.wrapping import unwrapped
from utils.growth.clone_record import CloneError, CloneRecord, DomainClone, build, freeze, own_tensors
from utils.runtime.files import sha256_file, write_json
from utils.training.weights import distinct_tensors, read_weights, weights_sha256, write_tensors

WEIGHTS, RECORD = "own.safetensors", "clone.json"
"""Names of a clone's files."""


def save_clone(clone: DomainClone, directory: Path | str) -> Path:
    """Write what a clone has of its own, and its record, into a directory.

    Buffers that equal the parent's are left out. The parent is not written: it must be kept as it is now.

    Returns:
        The directory.

    Raises:
        CloneError: The clone is put together otherwise than when it was made.
        OSError: The files cannot be written.
    """
    directory = Path(directory)
    own, theirs = clone.own_tensors(), clone.parent.state_dict()
    other = set(own) ^ set(clone.record.own)
    other |= {name for name in own.keys() & theirs.keys() if own[name].shape != theirs[name].shape}
    if other:
        raise CloneError(
            f"The clone for {clone.domain!r} has another {min(other)} than when it was made.",
            "Expected the tensors of its record: a clone that has grown can no longer be put together from its parent.",
            "Save the whole model with utils.export, or as a run.",
        )
    kept = {
        name: tensor
        for name, tensor in own.items()
        if isinstance(tensor, nn.Parameter) or name not in theirs or not torch.equal(tensor.cpu(), theirs[name].cpu())
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / WEIGHTS
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            write_tensors(*distinct_tensors(kept), stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    needs = weights_sha256(clone.parent)
    write_json(
        directory / RECORD,
        {"record": clone.record.to_dict(), "parent_sha256": needs, "weights_sha256": sha256_file(path)},
    )
    return directory


def load_clone(directory: Path | str, parent: Any) -> DomainClone:
    """Put a clone that `save_clone` wrote together with its parent.

    Args:
        directory: Where it was saved.
        parent: The model it was made from, as a module, a loaded model or an adapter, with the weights it had then.

    Raises:
        CloneError: The files are damaged or missing, or the parent is another.
    """
    directory = Path(directory)
    path = directory / WEIGHTS
    try:
        values = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        record, needs, whole = CloneRecord.from_dict(values["record"]), values["parent_sha256"], sha256_file(path)
        damaged = "" if whole == values["weights_sha256"] else f"{WEIGHTS} has the SHA-256 {whole}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        damaged = f"{type(error).__name__}: {error}"
    if damaged:
        raise CloneError(
            f"No clone can be read from {directory} ({damaged}).",
            f"Expected {RECORD} and the {WEIGHTS} that it describes, as save_clone writes them.",
            "Copy both from where they were saved.",
        )
    module = unwrapped(parent if isinstance(parent, nn.Module) else getattr(parent, "module", parent))
    given = weights_sha256(module)
    if given != needs:
        raise CloneError(
            f"The weights of the parent that was given have the SHA-256 {given}.",
            f"The clone for {record.domain!r} was saved with {record.parent}, whose weights have {needs}.",
            "Load those weights into the parent first.",
        )
    twin = build(module, record)
    tensors, own = read_weights(path), own_tensors(twin, module)
    parameters = {name for name, tensor in own.items() if isinstance(tensor, nn.Parameter)}
    other = (parameters - tensors.keys()) | (tensors.keys() - own.keys())
    other |= {name for name in tensors.keys() & own.keys() if tensors[name].shape != own[name].shape}
    if other:
        raise CloneError(
            f"The clone put together from {directory} has another {min(other)} than the one that was saved.",
            "Expected the parent's class and settings of then.",
            "Use the same source, and the version of peft that made a light clone.",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    freeze(module, record.shared if record.trunk == "frozen" else ())
    return DomainClone(twin, module, record)
