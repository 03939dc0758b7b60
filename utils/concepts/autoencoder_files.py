"""A sparse autoencoder on disk: its tensors as safetensors, and a JSON file that names them by their hash.

The JSON file carries a hash of itself too, and is replaced in one step when the tensors are whole, so that a save that
is killed leaves the autoencoder before it.
"""

import io
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from utils.concepts.autoencoder import AutoencoderConfig, AutoencoderFit, SparseAutoencoder
from utils.concepts.features import check_fit
from utils.runtime.errors import CheckpointError, SeedbedError
from utils.runtime.files import (
    check_replaceable,
    checked_path,
    own_hash,
    saving,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
)
from utils.training.weights import distinct_tensors, read_weights, write_tensors

RECORD = "autoencoder.json"
NAMES = re.compile(r"autoencoder-[0-9a-f]{16}\.safetensors")
"""Whole names of the files of tensors; of these too only the one that the record before named is deleted."""
FORMAT = 2


def save_autoencoder(fit: AutoencoderFit, directory: str | Path) -> Path:
    """Write an autoencoder into a directory; one that is there already is replaced as a whole.

    Returns:
        The directory.

    Raises:
        ConfigError: It is no fitted autoencoder.
        CheckpointError: JSON of something else is there, or the files cannot be written; what was there is still there.
    """
    check_fit(fit)
    with saving(directory, "the autoencoder", folder=True) as folder:
        check_replaceable(folder / RECORD, "autoencoder", "save_autoencoder")
        _write(fit, folder)
    return folder


def _write(fit: AutoencoderFit, directory: Path) -> None:
    stream = io.BytesIO()
    write_tensors(*distinct_tensors(fit.autoencoder), stream)
    content = stream.getvalue()
    digest = sha256_bytes(content)
    path = directory / _file_name(digest)
    try:
        earlier = directory / _record(directory)["tensors"]["file"]
    except CheckpointError:
        earlier = path
    write_atomic(path, content)
    # The record comes last: until then a reader sees the old autoencoder, from then on the new one.
    record = {"format": FORMAT, **fit.to_dict(), "tensors": {"file": path.name, "sha256": digest}}
    write_json(directory / RECORD, record | {"sha256": own_hash(record)})
    if earlier != path:
        with suppress(OSError):
            earlier.unlink()


def load_autoencoder(directory: str | Path) -> AutoencoderFit:
    """Read what `save_autoencoder` wrote; nothing in it can run.

    Raises:
        CheckpointError: The files are missing, damaged, changed or of another version.
    """
    directory = checked_path(directory, "the autoencoder")
    record = _record(directory)
    name, digest = record["tensors"]["file"], record["tensors"]["sha256"]
    try:
        if (found := sha256_file(directory / name)) != digest:
            raise _unreadable(directory, f"{name} has the SHA-256 {found[:12]}... and not {digest[:12]}...")
        config = AutoencoderConfig.from_dict(record["config"])
        width, features = int(record["width"]), int(record["features"])
        tensors = read_weights(directory / name)
        shapes = {
            "encoder": (features, width), "decoder": (features, width), "bias": (width,), "mean": (width,), "scale": ()
        }  # fmt: skip
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
            raise _unreadable(directory, f"its tensors do not have the shapes of {features} features of width {width}")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()) or config.active > features:
            raise _unreadable(directory, "its values are not finite, or more features are active than there are")
        made = SparseAutoencoder(width, features, config.active)
        made.load_state_dict(tensors)
        losses = tuple((int(step), float(error), float(dead)) for step, error, dead in record["losses"])
        numbers = {name: float(record[name]) for name in ("explained_variance", "principal", "l0")}
        return AutoencoderFit(
            made.eval().requires_grad_(False), config, **numbers, dead=int(record["dead"]),
            vectors=(int(record["vectors"][0]), int(record["vectors"][1])), losses=losses, layer=str(record["layer"]),
            side=str(record["side"]), pool=str(record["pool"]),
        )  # fmt: skip
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError, SeedbedError) as error:
        raise _unreadable(directory, f"{type(error).__name__}: {error}") from error


def _record(directory: Path) -> dict[str, Any]:
    """Return the record of a folder, unchanged and of this version, which names a file as a save does."""
    try:
        record: dict[str, Any] = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise _unreadable(directory, f"it has the format {record['format']!r} and not {FORMAT}")
        if record["sha256"] != own_hash(record):
            raise _unreadable(directory, f"{RECORD} was changed after it was written: its hash is another")
        name, digest = record["tensors"]["file"], record["tensors"]["sha256"]
        if name != _file_name(digest) or not NAMES.fullmatch(name):
            raise _unreadable(directory, f"it names the file {str(name)[:80]!r}, not {_file_name(digest)}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(directory, f"{type(error).__name__}: {error}") from error
    return record


def _file_name(digest: str) -> str:
    return f"autoencoder-{digest[:16]}.safetensors"


def _unreadable(directory: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"No autoencoder can be read from {directory} ({why}).",
        f"Expected {RECORD} and the file of tensors that it names, as save_autoencoder writes them.",
        "Copy both from where they were saved, or fit it again.",
    )
