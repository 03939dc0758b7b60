"""A nearest-neighbour datastore on disk: tensors in a safetensors file, and a manifest in JSON that names it.

The manifest is replaced in one step when the tensors are whole, so that a save that is killed leaves the one before.
"""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.memory.datastore import SCALINGS, Datastore, Scaling
from utils.memory.key_reader import SIDES
from utils.memory.memory_files import own_hash
from utils.runtime.errors import CheckpointError
from utils.runtime.files import sha256_file, sync_file, write_json
from utils.training.weights import read_weights, write_tensors

FORMAT, VERSION = "seedbed nearest-neighbour datastore", 2
MANIFEST, STEM = "manifest.json", "datastore-"
NAMES = re.compile(rf"{STEM}[0-9a-f]{{16}}\.safetensors")
"""Whole names of the files that a save makes; no other file is ever deleted."""
COLUMNS = ("values", "windows", "positions")


def save_datastore(datastore: Datastore, directory: str | Path) -> Path:
    """Write a datastore, in place of the one that is there, and return its directory.

    Raises:
        CheckpointError: The directory holds something else, or cannot be written; what was there is untouched.
    """
    directory = Path(directory)
    tensors = {name: getattr(datastore, name) for name in ("keys", *COLUMNS, "source")}
    tensors |= {"mean": datastore.scaling.mean, "matrix": datastore.scaling.matrix}
    temporary = directory / f".{STEM}{os.getpid()}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / MANIFEST).exists():
            _manifest(directory)
        try:
            with temporary.open("wb") as stream:
                write_tensors(tensors, {}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            digest = sha256_file(temporary)
            path = directory / f"{STEM}{digest[:16]}.safetensors"
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_file(directory)
        about = {
            "layer": datastore.layer, "side": datastore.side, "scaling": datastore.scaling.kind,
            "seen": datastore.seen, "model": datastore.model, "tokenizer": datastore.tokenizer,
            "keys": len(datastore), "width": datastore.keys.shape[1],
        }  # fmt: skip
        file = {"name": path.name, "sha256": digest}
        manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, **about, "file": file}
        write_json(directory / MANIFEST, manifest | {"sha256": own_hash(manifest)})
    except OSError as error:
        raise CheckpointError(
            f"The datastore cannot be saved in {directory}: {error}.",
            "Expected a directory that can be written, with room for all keys.",
            "Make room or save elsewhere; what was saved there before is untouched.",
        ) from error
    for other in directory.iterdir():
        if NAMES.fullmatch(other.name) and other != path:
            with suppress(OSError):
                other.unlink()
    return directory


def load_datastore(directory: str | Path) -> Datastore:
    """Read a datastore that `save_datastore` wrote; `NearestNeighbourHead` refuses it for another model.

    Raises:
        CheckpointError: There is none, or it is torn, changed, of a later version or does not hold together.
    """
    directory = Path(directory)
    manifest = _manifest(directory)
    file = manifest.get("file")
    name, digest = (file.get("name"), file.get("sha256")) if isinstance(file, dict) else (None, None)
    if not isinstance(name, str) or Path(name).name != name or not (directory / name).is_file():
        raise _damaged(directory, f"its file {name!r} is missing")
    if sha256_file(directory / name) != digest:
        raise _damaged(directory, f"{name} was changed or torn after it was written: its hash is another")
    try:
        tensors = read_weights(directory / name)
        _check(manifest, tensors)
    except Exception as error:  # the library raises its own kind
        raise _damaged(directory, f"{type(error).__name__}: {error}") from error
    scaling = Scaling(manifest["scaling"], tensors["mean"], tensors["matrix"])
    columns = {column: tensors[column] for column in COLUMNS}
    return Datastore(
        keys=tensors["keys"], source=tensors["source"], scaling=scaling, layer=manifest["layer"],
        side=manifest["side"], seen=manifest["seen"], model=manifest["model"], tokenizer=manifest["tokenizer"],
        **columns,
    )  # fmt: skip


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"There is no datastore in {directory}.",
            f"Expected a directory with a {MANIFEST}.",
            "Give the directory that `save_datastore` wrote.",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(directory, f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no manifest of a datastore.",
            f"Expected the format {FORMAT!r}.",
            "Give another directory, one that `save_datastore` wrote or an empty one.",
        )
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"The datastore in {directory} is of version {manifest.get('version')!r}.",
            f"Expected version {VERSION}.",
            "Use the Seedbed that wrote it, or build it anew in another directory.",
        )
    if manifest.get("sha256") != own_hash(manifest):
        raise _damaged(directory, f"{MANIFEST} was changed after it was written: its hash is another")
    return manifest


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


def _damaged(directory: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"The datastore in {directory} is damaged: {how}.",
        "Expected the files of a datastore as they were saved.",
        "Load another copy, or build it anew.",
    )
