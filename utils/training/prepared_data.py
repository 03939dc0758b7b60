"""Data that is ready to train on, and its copy in a run directory.

A run keeps its prepared data, because the built-in texts differ between Python versions: a run that is continued on
another machine must see the very same batches.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.runtime.errors import DataError
from utils.runtime.files import (
    sha256_bytes,
    sha256_file,
    sync_file,
    tag_nonfinite,
    untag_nonfinite,
    write_atomic,
    write_json,
)
from utils.runtime.optional import require
from utils.runtime.resources import format_bytes
from utils.tokenization import TextTokenizer
from utils.training.data_report import DataReport, html_table

VERSION = 2
"""Layout of a saved `PreparedData`; version 1 knew no token file and no stream, and is read as well."""
TENSORS, TOKENS, TOKENIZER, MANIFEST = "data.safetensors", "tokens.bin", "tokenizer.json", "data.json"


@dataclass(frozen=True)
class TokenFile:
    """The training text of a large corpus as token ids on disk, in the order of its documents."""

    path: Path
    """Ids without a header."""
    dtype: str
    """``<u2`` or ``<i4``: 16 bits where the vocabulary fits into them, else 32."""
    count: int
    """How many ids."""
    length: int
    """Tokens in a window."""
    shifted: bool
    """Labels are the ids that follow (causal), not the ids themselves (masked)."""
    folder: tempfile.TemporaryDirectory[str] | None = None
    """Removed with this object, until the data is saved with a run."""

    def windows(self) -> dict[str, Tensor]:
        """Return inputs and labels ``(windows, length)`` as views of the file; nothing is read before it is used."""
        mapped = np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")  # batches are copies
            tokens = torch.from_numpy(mapped)
        rows = (self.count - self.shifted) // self.length
        end = rows * self.length
        labels = tokens[1 : end + 1] if self.shifted else tokens[:end]
        return {"input_ids": tokens[:end].view(rows, self.length), "labels": labels.view(rows, self.length)}

    def to_dict(self) -> dict[str, Any]:
        """Return what is needed to map the file again."""
        return {"dtype": self.dtype, "count": self.count, "length": self.length, "shifted": self.shifted}


@dataclass(frozen=True, repr=False)
class PreparedData:
    """Training and validation samples; the first dimension of every tensor counts samples.

    Text: ``input_ids`` and ``labels``, int64 of shape (windows, length), labels already aligned with the inputs and
    -100 where nothing is predicted. Images: ``pixel_values``, float32 of shape (samples, channels, height, width), and
    ``labels``, int64 of shape (samples,). Rows of tables: ``features``, float32 of shape (samples, columns), and
    ``labels``. Texts with a label: ``input_ids`` filled up to the longest text, ``lengths`` and ``labels``. Pairs of
    texts: also ``decoder_input_ids``, ``labels`` of the same shape and ``target_lengths``. Numbers to predict are
    float32 of shape (samples, targets), with mean 0 and deviation 1 over the training samples.
    `utils.training.batching.collate` makes batches.
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
    stream: Mapping[str, Any] | None = None
    """How to go on reading a text that is read while training; `train` then holds its first windows only."""
    tokens: TokenFile | None = None
    """The file that `train` is a view of, for a corpus too large for memory."""

    @property
    def train_samples(self) -> int:
        """Number of training samples."""
        return len(next(iter(self.train.values())))

    @property
    def pass_samples(self) -> int:
        """Samples that one pass over the training data hands out: more than there are where tasks share them."""
        return int(self.facts.get("pass_samples", self.train_samples))

    @property
    def validation_samples(self) -> int:
        """Number of held-out samples."""
        return len(next(iter(self.validation.values())))

    def fingerprint(self) -> str:
        """Return the SHA-256 of all tensors and the tokenizer: equal fingerprints mean equal training data."""
        digest = hashlib.sha256(f"{self.task}\n".encode())
        for name, tensor in sorted(self._held().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        if self.tokens is not None:
            digest.update(f"{self.tokens.to_dict()} {sha256_file(self.tokens.path)}\n".encode())
        if self.stream is not None:
            digest.update(json.dumps(self.stream, sort_keys=True).encode())
        if self.tokenizer is not None:
            digest.update(self.tokenizer.to_json().encode())
        return digest.hexdigest()

    def _held(self) -> dict[str, Tensor]:
        """Return the tensors that are in memory."""
        return {n: t for n, t in _flatten(self).items() if self.tokens is None or not n.startswith("train.")}

    @property
    def report(self) -> DataReport | None:
        """What was found while the data was prepared; None for data of an earlier version."""
        return DataReport.from_dict(self.facts["report"]) if "report" in self.facts else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the samples themselves."""
        return {
            "reference": self.reference,
            "task": self.task,
            "train_samples": self.train_samples,
            "validation_samples": self.validation_samples,
            "pass_samples": self.pass_samples,
            "shapes": {name: list(tensor.shape) for name, tensor in _flatten(self).items()},
            "dtypes": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in _flatten(self).items()},
            "tokenizer": None if self.tokenizer is None else self.tokenizer.to_dict(),
            "stream": None if self.stream is None else dict(self.stream),
            "tokens": None if self.tokens is None else self.tokens.to_dict(),
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
        if "zlib_bits_per_byte" in facts:
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
                ("zlib -9", f"{facts['zlib_bits_per_byte']:.3f} bits per byte on the held-out text"),
            ]
        else:
            rows.append(("samples", f"{self.train_samples:,} to train, {self.validation_samples:,} held out"))
        if "largest_class" in facts:
            rows.append(
                ("classes", f"{facts['classes']}, the largest {facts['largest_class']:.1%} of the held-out samples")
            )
        if "image_shape" in facts:
            rows.append(("image shape", " x ".join(map(str, facts["image_shape"]))))
        if self.tokenizer is not None:
            rows.append(("tokenizer", self.tokenizer.reason))
        if "boundaries" in facts:
            rows.append(("sequences", facts["boundaries"]))
        if self.stream is not None:
            rows.append(("stream", "read while training; these are its first windows"))
        if (report := self.report) is not None:
            shown = {name for name, _ in rows} | {report.unit}
            if "documents" in shown:
                shown.add("repetitions")
            rows += [(name, value) for name, value in report.rows() if name not in shown]
        rows.append(("SHA-256", facts["sha256"]))
        return rows

    def _repr_html_(self) -> str:
        """Show the data report in a notebook."""
        return html_table(self._rows()) + (self.report.pictures() if self.report is not None else "")

    def save(self, directory: str | Path) -> None:
        """Write the samples, the tokenizer and a manifest with their SHA-256 (the manifest last).

        Raises:
            OSError: The disk is full or the directory cannot be written; no manifest is left behind for partial data.
        """
        safetensors = require("safetensors.torch", "save prepared data")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST).unlink(missing_ok=True)
        contents = {TENSORS: safetensors.save({name: _compact(tensor) for name, tensor in self._held().items()})}
        if self.tokenizer is not None:
            contents[TOKENIZER] = self.tokenizer.to_json().encode("utf-8")
        for name, content in contents.items():
            write_atomic(directory / name, content)
        files = {name: {"sha256": sha256_bytes(content), "bytes": len(content)} for name, content in contents.items()}
        if self.tokens is not None:
            files[TOKENS] = _place(self.tokens.path, directory / TOKENS)
        write_json(directory / MANIFEST, tag_nonfinite({"version": VERSION, **self.to_dict(), "files": files}))


def planned_samples(told: Mapping[str, Any]) -> int:
    """Return the samples of one pass over the training data, given what a run's record tells of it."""
    return int(told.get("pass_samples", told.get("train_samples", 0)))


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
    loaded = safetensors.load_file(directory / TENSORS)
    # In the order in which they were made: the first one is the content.
    for name in manifest["shapes"]:
        if name in loaded:
            split, _, key = name.partition(".")
            dtype = manifest.get("dtypes", {}).get(name)
            tensor = loaded[name]
            wanted = getattr(torch, dtype) if dtype else tensor.dtype if tensor.is_floating_point() else torch.int64
            parts[split][key] = tensor.to(wanted)
    tokenizer = None
    if TOKENIZER in manifest["files"]:
        known = manifest["tokenizer"]
        tokenizer = TextTokenizer.load(directory / TOKENIZER, known["reason"], known.get("lossless", True))
    tokens = None
    if manifest.get("tokens") is not None:
        tokens = TokenFile(directory / TOKENS, **manifest["tokens"])
        parts["train"] = tokens.windows()
    return PreparedData(
        manifest["reference"],
        manifest["task"],
        parts["train"],
        parts["validation"],
        tokenizer,
        manifest["facts"],
        manifest.get("stream"),
        tokens,
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
        manifest = untag_nonfinite(json.loads(path.read_text(encoding="utf-8")))
        version, _ = (
            manifest["version"],
            [manifest[name] for name in ("files", "reference", "task", "facts", "shapes")],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}).", "Expected a manifest written by Seedbed.") from error
    if version not in (1, VERSION):
        raise DataError(f"{path} has layout version {version}.", f"This version of Seedbed reads 1 and {VERSION}.")
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


def _place(source: Path, target: Path) -> dict[str, Any]:
    """Put a large file where it stays, without a copy where the file system can; return its manifest entry."""
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        if source.resolve() != target.resolve():
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
            sync_file(temporary)
            os.replace(temporary, target)
            sync_file(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return {"sha256": sha256_file(target), "bytes": target.stat().st_size}
