"""A sparse autoencoder on disk: its tensors as safetensors, and a JSON file that knows their hash."""

import io
import json
from pathlib import Path
from typing import Any

import torch

from utils.concepts.autoencoder import AutoencoderConfig, AutoencoderFit, SparseAutoencoder
from utils.runtime.errors import CheckpointError, SeedbedError
from utils.runtime.files import sha256_file, write_atomic, write_json
from utils.training.weights import distinct_tensors, read_weights, write_tensors

TENSORS, RECORD = "autoencoder.safetensors", "autoencoder.json"
"""Names of the files."""
FORMAT = 1


def save_autoencoder(fit: AutoencoderFit, directory: str | Path) -> Path:
    """Write an autoencoder into a directory, the JSON file last: without it there is none.

    Returns:
        The directory.

    Raises:
        OSError: The files cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # An older record must not stand beside newer tensors.
    (directory / RECORD).unlink(missing_ok=True)
    stream = io.BytesIO()
    write_tensors(*distinct_tensors(fit.autoencoder), stream)
    write_atomic(directory / TENSORS, stream.getvalue())
    record = {"format": FORMAT, **fit.to_dict(), "sha256": sha256_file(directory / TENSORS)}
    write_json(directory / RECORD, record)
    return directory


def load_autoencoder(directory: str | Path) -> AutoencoderFit:
    """Read what `save_autoencoder` wrote; nothing in it can run.

    Raises:
        CheckpointError: The files are missing, damaged, changed or of another version.
    """
    directory = Path(directory)
    try:
        record: dict[str, Any] = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise _unreadable(directory, f"it has the format {record['format']!r} and not {FORMAT}")
        if (found := sha256_file(directory / TENSORS)) != record["sha256"]:
            raise _unreadable(
                directory, f"{TENSORS} has the SHA-256 {found[:12]}... and not {record['sha256'][:12]}..."
            )
        config = AutoencoderConfig.from_dict(record["config"])
        width, features = int(record["width"]), int(record["features"])
        tensors = read_weights(directory / TENSORS)
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
    except (OSError, ValueError, KeyError, TypeError, IndexError, SeedbedError) as error:
        raise _unreadable(directory, f"{type(error).__name__}: {error}") from error


def _unreadable(directory: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"No autoencoder can be read from {directory} ({why}).",
        f"Expected {RECORD} and the {TENSORS} that it describes, as save_autoencoder writes them.",
        "Copy both from where they were saved, or fit it again.",
    )
