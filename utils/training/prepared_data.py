"""Data that is ready to train on, and its copy in a run directory.

A run keeps its prepared data, because the built-in texts differ between Python versions: a run that is continued on
another machine must see the very same batches.
"""

import hashlib
import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.runtime.errors import DataError
from utils.runtime.files import sha256_bytes, sha256_file, write_atomic, write_json
from utils.runtime.optional import require
from utils.runtime.resources import format_bytes
from utils.tokenization import TextTokenizer

VERSION = 1
"""Layout of a saved `PreparedData`."""
TENSORS, TOKENIZER, MANIFEST = "data.safetensors", "tokenizer.json", "data.json"


@dataclass(frozen=True, repr=False)
class PreparedData:
    """Training and validation samples; the first dimension of every tensor counts samples.

    Text: ``input_ids`` and ``labels``, int64 of shape (windows, length), labels already aligned with the inputs and
    -100 where nothing is predicted. Images: ``pixel_values``, float32 of shape (samples, channels, height, width), and
    ``labels``, int64 of shape (samples,).
    """

    reference: str
    """Where the data came from."""
    task: str
    """What it was prepared for."""
    train: dict[str, Tensor]
    """Samples to train on."""
    validation: dict[str, Tensor]
    """Held-out samples."""
    tokenizer: TextTokenizer | None = None
    """How text was turned into ids; None for images."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Counts, sizes and baselines; see `to_dict`."""

    @property
    def train_samples(self) -> int:
        """Number of training samples."""
        return len(next(iter(self.train.values())))

    @property
    def validation_samples(self) -> int:
        """Number of held-out samples."""
        return len(next(iter(self.validation.values())))

    def fingerprint(self) -> str:
        """Return the SHA-256 of all tensors and the tokenizer: equal fingerprints mean equal training data."""
        digest = hashlib.sha256(f"{self.task}\n".encode())
        for name, tensor in sorted(_flatten(self).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        if self.tokenizer is not None:
            digest.update(self.tokenizer.to_json().encode())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the samples themselves."""
        return {
            "reference": self.reference,
            "task": self.task,
            "train_samples": self.train_samples,
            "validation_samples": self.validation_samples,
            "shapes": {name: list(tensor.shape) for name, tensor in _flatten(self).items()},
            "tokenizer": None if self.tokenizer is None else self.tokenizer.to_dict(),
            "facts": dict(self.facts),
        }

    def text(self) -> str:
        """Return the data report as aligned text."""
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    __repr__ = text

    def _rows(self) -> list[tuple[str, str]]:
        """Return what a reader wants to know before training."""
        facts = self.facts
        rows = [("data", f"{self.reference} for {self.task}")]
        if self.tokenizer is not None:
            rows += [
                (
                    "documents",
                    f"{facts['documents']:,} ({facts['duplicates_removed']:,} duplicates removed), "
                    f"{facts['validation_documents']:,} held out",
                ),
                ("training text", f"{format_bytes(facts['train_bytes'])}, {facts['train_tokens']:,} tokens"),
                ("held-out text", f"{format_bytes(facts['validation_bytes'])}, {facts['validation_tokens']:,} tokens"),
                (
                    "windows",
                    f"{self.train_samples:,} to train, {self.validation_samples:,} held out, "
                    f"{facts['length']} tokens each",
                ),
                ("tokenizer", self.tokenizer.reason),
                ("zlib -9", f"{facts['zlib_bits_per_byte']:.3f} bits per byte on the held-out text"),
            ]
        else:
            rows += [
                ("samples", f"{self.train_samples:,} to train, {self.validation_samples:,} held out"),
                ("classes", f"{facts['classes']}, the largest {facts['largest_class']:.1%} of the held-out samples"),
                ("image shape", " x ".join(map(str, facts["image_shape"]))),
            ]
        rows.append(("SHA-256", facts["sha256"]))
        return rows

    def _repr_html_(self) -> str:
        """Show the data report in a notebook."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self._rows()
        )
        return f"<table>{rows}</table>"

    def save(self, directory: str | Path) -> None:
        """Write the samples, the tokenizer and a manifest with their SHA-256 (the manifest last).

        Raises:
            OSError: The disk is full or the directory cannot be written; no manifest is left behind for partial data.
        """
        safetensors = require("safetensors.torch", "save prepared data")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST).unlink(missing_ok=True)
        contents = {TENSORS: safetensors.save({name: _compact(tensor) for name, tensor in _flatten(self).items()})}
        if self.tokenizer is not None:
            contents[TOKENIZER] = self.tokenizer.to_json().encode("utf-8")
        for name, content in contents.items():
            write_atomic(directory / name, content)
        files = {name: {"sha256": sha256_bytes(content), "bytes": len(content)} for name, content in contents.items()}
        write_json(directory / MANIFEST, {"version": VERSION, **self.to_dict(), "files": files})


def load_prepared(directory: str | Path) -> PreparedData:
    """Read what `PreparedData.save` wrote and verify it.

    Raises:
        DataError: The manifest is missing or of another version, or a file is missing or changed.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    for name, expected in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise DataError(f"{path} is missing.", "The manifest beside it lists it.", "Prepare the data again.")
        if sha256_file(path) != expected["sha256"]:
            raise DataError(
                f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}.",
                f"Expected {expected['bytes']} bytes as they were written.",
                "Restore the file from a copy of the run, or prepare the data again.",
            )
    safetensors = require("safetensors.torch", "read prepared data")
    parts: dict[str, dict[str, Tensor]] = {"train": {}, "validation": {}}
    for name, tensor in safetensors.load_file(directory / TENSORS).items():
        split, _, key = name.partition(".")
        parts[split][key] = tensor if tensor.is_floating_point() else tensor.to(torch.int64)
    tokenizer = None
    if TOKENIZER in manifest["files"]:
        tokenizer = TextTokenizer.load(directory / TOKENIZER, manifest["tokenizer"]["reason"])
    return PreparedData(
        manifest["reference"], manifest["task"], parts["train"], parts["validation"], tokenizer, manifest["facts"]
    )


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of a data directory."""
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(
            f"There is no prepared data in {directory}.",
            f"Expected a {MANIFEST}, which is written last.",
            "Prepare the data again.",
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, _ = (
            manifest["version"],
            (manifest["files"], manifest["reference"], manifest["task"], manifest["facts"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}).", "Expected a manifest written by Seedbed.") from error
    if version != VERSION:
        raise DataError(f"{path} has layout version {version}.", f"This version of Seedbed reads {VERSION}.")
    return dict(manifest)


def _flatten(data: PreparedData) -> dict[str, Tensor]:
    """Return all tensors by dotted name."""
    return {
        f"{split}.{name}": tensor
        for split, tensors in (("train", data.train), ("validation", data.validation))
        for name, tensor in tensors.items()
    }


def _compact(tensor: Tensor) -> Tensor:
    """Return integers in half the space; token ids and labels fit into 32 bits."""
    return tensor.contiguous() if tensor.is_floating_point() else tensor.to(torch.int32)
