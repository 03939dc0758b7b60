"""A nearest-neighbour datastore on disk: tensors in a safetensors file, and a manifest in JSON that names it.

The manifest is replaced in one step when the tensors are whole, so that a save that is killed leaves the one before.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.memory.datastore import SCALINGS, Datastore, Scaling
from utils.memory.key_reader import SIDES
from utils.memory.saved_folder import SavedKind, Writer
from utils.runtime.arguments import instance_of
from utils.runtime.files import checked_path, saving, sha256_file, sync_file
from utils.training.weights import read_weights, write_tensors

STEM = "datastore-"
NAMES = re.compile(rf"{STEM}[0-9a-f]{{16}}\.safetensors")
"""Whole names of the files that a save makes; those are deleted that a manifest or a killed save has named."""
KIND = SavedKind(
    "seedbed nearest-neighbour datastore", 2, "nearest-neighbour datastore", "`save_datastore`",
    re.compile(rf"{NAMES.pattern}|\.{STEM}\d+\.tmp", re.ASCII),
)  # fmt: skip
COLUMNS = ("values", "windows", "positions")


def save_datastore(datastore: Datastore, directory: str | Path) -> Path:
    """Write a datastore, in place of the one that is there, and return its directory.

    Raises:
        ConfigError: It is no datastore.
        CheckpointError: Another process is saving there, the directory holds something else, or it cannot be written;
            what was there is untouched.
    """
    instance_of(
        datastore, Datastore, "The datastore to save", "Expected what build_datastore returns.", "Build it first."
    )
    tensors = {name: getattr(datastore, name) for name in ("keys", *COLUMNS, "source")}
    tensors |= {"mean": datastore.scaling.mean, "matrix": datastore.scaling.matrix}
    about = {
        "layer": datastore.layer, "side": datastore.side, "scaling": datastore.scaling.kind,
        "seen": datastore.seen, "model": datastore.model, "tokenizer": datastore.tokenizer,
        "keys": len(datastore), "width": datastore.keys.shape[1],
    }  # fmt: skip
    with saving(directory, "the nearest-neighbour datastore", folder=True) as place:
        place.mkdir(parents=True, exist_ok=True)
        KIND.check_place(place)
        with KIND.locked(place) as writer:
            _write(writer, tensors, about)
    return place


def _write(writer: Writer, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    place = writer.directory
    before = KIND.read(place)
    temporary = place / f".{STEM}{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as stream:
            write_tensors(tensors, {}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        digest = sha256_file(temporary)
        path = place / f"{STEM}{digest[:16]}.safetensors"
        writer.note([path.name])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_file(place)
    KIND.write(place, {**about, "file": {"name": path.name, "sha256": digest}})
    writer.clear([before.get("file")] if before else [], [path.name])


def load_datastore(directory: str | Path) -> Datastore:
    """Read a datastore that `save_datastore` wrote; `NearestNeighbourHead` refuses it for another model.

    Raises:
        CheckpointError: There is none, or it is torn, changed, of a later version or does not hold together.
    """
    place = checked_path(directory, "the nearest-neighbour datastore")
    manifest = KIND.present(place)
    path = KIND.file(place, manifest.get("file"), "tensors")
    try:
        tensors = read_weights(path)
        _check(manifest, tensors)
    except Exception as error:  # the library raises its own kind
        raise KIND.damaged(path, f"does not hold together ({type(error).__name__}: {error})") from error
    scaling = Scaling(manifest["scaling"], tensors["mean"], tensors["matrix"])
    columns = {column: tensors[column] for column in COLUMNS}
    return Datastore(
        keys=tensors["keys"], source=tensors["source"], scaling=scaling, layer=manifest["layer"],
        side=manifest["side"], seen=manifest["seen"], model=manifest["model"], tokenizer=manifest["tokenizer"],
        **columns,
    )  # fmt: skip


def _check(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless manifest and tensors hold together."""
    keys, source = tensors["keys"], tensors["source"]
    count, width = keys.shape
    fits = {
        "keys": keys.dtype == torch.float32 and count == manifest["keys"] > 0 and width == manifest["width"],
        "finite keys": bool(torch.isfinite(keys).all()),
        "scaling": manifest["scaling"] in SCALINGS
        and tensors["mean"].shape == (width,)
        and tensors["matrix"].shape == (width, width)
        and all(tensors[name].dtype == torch.float32 for name in ("mean", "matrix")),
        "columns": all(tensors[n].dtype == torch.int32 and tensors[n].shape == (count,) for n in COLUMNS),
        "tokens": int(tensors["values"].min()) >= 0,
        "text": source.dtype == torch.int32 and source.dim() == 2,
        "layer": isinstance(manifest["layer"], str) and manifest["side"] in SIDES,
        "counts": isinstance(manifest["seen"], int) and manifest["seen"] >= count,
        "hashes": isinstance(manifest["model"], str) and isinstance(manifest["tokenizer"], (str, type(None))),
    }
    if len(source):
        for name, size in (("windows", source.shape[0]), ("positions", source.shape[1])):
            fits[name] = int(tensors[name].min()) >= 0 and int(tensors[name].max()) < size
    wrong = [name for name, right in fits.items() if not right]
    if wrong:
        raise ValueError(f"wrong: {', '.join(wrong)}")
