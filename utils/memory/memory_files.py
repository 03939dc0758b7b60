"""A long-term memory on disk: vectors in a safetensors file, metadata as lines of JSON, one manifest that names both.

The files of a save have names of their own; the manifest, replaced in one step when they are whole, says which count.
A save that is killed, or finds the disk full, leaves the one before it as it was. Nothing here needs FAISS: a memory
that was written with it is read without it.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.memory.saved_folder import LOCK, MANIFEST, SavedKind, Writer
from utils.runtime.errors import CheckpointError
from utils.runtime.files import saving, sync_file

NAMES = re.compile(r"(vectors-(\d+)\.safetensors|metadata-(\d+)\.jsonl)", re.ASCII)
"""Whole names of the files that a save makes; those are deleted that a manifest or a killed save has named."""
KIND = SavedKind("seedbed long-term memory", 1, "long-term memory", "`LongTermMemory.save`", NAMES)
KINDS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8"), "I32": np.dtype("<i4")}
"""Types of safetensors that are used."""
FIELDS: dict[str, type | tuple[type, ...]] = {
    "generation": int, "dimension": int, "metric": str, "count": int, "next_id": int, "described": int,
    "domains": list, "embedder": (dict, type(None)), "index": dict, "config": dict, "files": dict,
}  # fmt: skip
"""What a manifest says, beside its format, version and hash."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file."""

    path: Path
    """The file."""
    dtype: np.dtype[Any]
    """Little-endian."""
    shape: tuple[int, ...]
    """As saved."""
    offset: int
    """Bytes from the start of the file."""

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read rows, all by default, into memory of their own."""
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        width = math.prod(self.shape[1:])
        at = self.offset + start * width * self.dtype.itemsize
        rows = max(0, stop - start)
        return np.fromfile(self.path, self.dtype, rows * width, offset=at).reshape(rows, *self.shape[1:])


@dataclass(frozen=True)
class SavedMemory:
    """A saved memory whose files were verified."""

    manifest: dict[str, Any]
    """What it says of itself."""
    tensors: dict[str, StoredTensor]
    """``ids``, ``domains``, ``vectors``, and what the index has learned."""
    metadata: dict[int, dict[str, Any]]
    """By id; those without metadata are absent."""


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a directory; None where there is none.

    Raises:
        CheckpointError: It is damaged, changed by hand, of another kind or of another version.
    """
    manifest = KIND.read(directory)
    if manifest is not None:
        _check_fields(directory, manifest)
    return manifest


def write_memory(
    directory: Path,
    about: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    vectors: Callable[[], Iterable[np.ndarray]],
    metadata: Mapping[int, Mapping[str, Any]],
    known: str | None,
    overwrite: bool,
) -> str:
    """Write a memory, and return the hash of its manifest.

    Args:
        directory: Made where it does not exist.
        about: The manifest's entries, without generation and files.
        arrays: Tensors that are in memory.
        vectors: Yields those of all memories piece by piece, so that there is no second copy of them.
        metadata: By id.
        known: Hash of the manifest that the memory was loaded from or saved to here; None for neither.
        overwrite: Replace another memory, or a damaged one; the files of a manifest that cannot be used stay.

    Raises:
        CheckpointError: Another process is saving here, another memory is here, or files of something else, or the
            files cannot be written. What was here is untouched.
    """
    with saving(directory, "the long-term memory", folder=True):
        directory.mkdir(parents=True, exist_ok=True)
        # Every save leaves the file of the lock, those that were killed too.
        KIND.check_place(directory, overwrite, leftovers=(directory / LOCK).exists())
        with KIND.locked(directory) as writer:
            before = _replaced(directory, known, overwrite)
            return _written(writer, before, about, arrays, vectors, metadata)


def read_memory(directory: Path) -> SavedMemory:
    """Verify a saved memory and open it.

    Raises:
        CheckpointError: There is none, or a file of it is missing, torn, changed or does not fit the others.
    """
    while True:
        manifest = KIND.present(directory)
        _check_fields(directory, manifest)
        try:
            return _opened(directory, manifest)
        except CheckpointError:
            # A save that ended meanwhile has taken away the files of the one before it.
            if read_manifest(directory) == manifest:
                raise


def _opened(directory: Path, manifest: dict[str, Any]) -> SavedMemory:
    paths = {role: KIND.file(directory, manifest["files"].get(role), role) for role in ("vectors", "metadata")}
    tensors = _tensors(paths["vectors"])
    count, width = manifest["count"], manifest["dimension"]
    for name, shape in {"ids": (count,), "domains": (count,), "vectors": (count, width)}.items():
        if name not in tensors or tensors[name].shape != shape:
            raise KIND.damaged(paths["vectors"], f"holds no {name} of the shape {list(shape)}, as the manifest says")
    metadata = _metadata(paths["metadata"])
    described = np.array(list(metadata), dtype=np.int64)
    if len(described) != manifest["described"] or not np.isin(described, tensors["ids"].rows()).all():
        raise KIND.damaged(paths["metadata"], "is out of step with the vectors: it is about other memories")
    return SavedMemory(manifest, tensors, metadata)


def _written(
    writer: Writer,
    before: Mapping[str, Any] | None,
    about: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    vectors: Callable[[], Iterable[np.ndarray]],
    metadata: Mapping[int, Mapping[str, Any]],
) -> str:
    directory, generation = writer.directory, _next_generation(writer.directory)
    shape = (about["count"], about["dimension"])
    names = {"vectors": f"vectors-{generation}.safetensors", "metadata": f"metadata-{generation}.jsonl"}
    lines = (
        (json.dumps({"id": key, "metadata": entry}, allow_nan=False) + "\n").encode()
        for key, entry in sorted(metadata.items())
    )
    writer.note(names.values())
    try:
        files = {
            "vectors": _hashed(directory / names["vectors"], _safetensors(arrays, shape, vectors)),
            "metadata": _hashed(directory / names["metadata"], lines),
        }
    except BaseException:
        for name in names.values():
            (directory / name).unlink(missing_ok=True)
        writer.note(())
        raise
    # From here on the files stay, whatever happens: the manifest may name them already.
    digest = KIND.write(directory, {"generation": generation, **about, "files": files})
    writer.clear(before["files"].values() if before else [], names.values())
    return digest


def _check_fields(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest that does not say all of `FIELDS`."""
    for name, kind in FIELDS.items():
        if not isinstance(manifest.get(name), kind) or isinstance(manifest[name], bool):
            raise KIND.damaged(directory / MANIFEST, f"says nothing usable about {name!r}")


def _replaced(directory: Path, known: str | None, overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest that a save replaces, after checking that its writer knows it."""
    try:
        present = read_manifest(directory)
    except CheckpointError:
        if not overwrite:
            raise
        present = None
    if present is not None and not overwrite and present["sha256"] != known:
        raise CheckpointError(
            f"{directory} holds a memory "
            + ("that was saved by another writer since." if known else "that this one was not loaded from."),
            "Expected an empty directory, or the save that this memory has come from.",
            "Load what is there and add to it, save elsewhere, or replace it with overwrite=True.",
        )
    return present


def _next_generation(directory: Path) -> int:
    """Return the number of a save."""
    # Also above the numbers of saves that were killed, and of a manifest that cannot be read.
    found = [match for path in directory.iterdir() if (match := NAMES.fullmatch(path.name))]
    return 1 + max([int(match[2] or match[3]) for match in found], default=0)


def _hashed(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file piece by piece and return its manifest entry."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as stream:
        for piece in pieces:
            stream.write(piece)
            digest.update(piece)
            size += len(piece)
        stream.flush()
        os.fsync(stream.fileno())
    sync_file(path.parent)
    return {"name": path.name, "bytes": size, "sha256": digest.hexdigest()}


def _safetensors(
    arrays: Mapping[str, np.ndarray], shape: tuple[int, int], vectors: Callable[[], Iterable[np.ndarray]]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file; those with the largest entries first, so that each lies aligned."""
    kinds = {kind: name for name, kind in KINDS.items()}
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()} | {"vectors": (shape, KINDS["F32"])}
    order = sorted(shapes, key=lambda name: (-shapes[name][1].itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        start, (size, dtype) = end, shapes[name]
        end += math.prod(size) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        for piece in vectors() if name == "vectors" else [arrays[name]]:
            if piece.size:
                yield np.ascontiguousarray(piece).data.cast("B")


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """Return where the tensors of a safetensors file lie."""
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, size)))
        tensors = {}
        for name, entry in header.items():
            dtype, shape, (start, end) = KINDS[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if not shape or any(type(number) is not int or number < 0 for number in (*shape, start, end)):
                raise ValueError(f"{name} has no shape or place in whole numbers")
            # Python's integers: a product of int64 may overflow to the size that is expected.
            if end - start != math.prod(shape) * dtype.itemsize or not all(shape[1:]):
                raise ValueError(f"{name} has another size than its shape")
            if 8 + length + end > size:
                raise ValueError(f"{name} lies outside of the file")
            tensors[name] = StoredTensor(path, dtype, shape, 8 + length + start)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KIND.damaged(path, f"is no safetensors file of a memory ({type(error).__name__}: {error})") from error
    return tensors


def _metadata(path: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    try:
        with path.open("rb") as stream:
            for line in stream:
                entry = json.loads(line)
                if not isinstance(entry["id"], int) or not isinstance(entry["metadata"], dict) or entry["id"] in found:
                    raise ValueError(f"a line is none of a memory's metadata: {line[:80]!r}")
                found[entry["id"]] = entry["metadata"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise KIND.damaged(path, f"cannot be read ({type(error).__name__}: {error})") from error
    return found
