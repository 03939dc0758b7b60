"""A folder that others can use: weights, code, tokenizer, model card, and a script that runs with one package.

The script is run before the bundle counts as made: in a process of its own, in an empty directory, without this
project, against numbers that the original model gave.
"""

import html
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.roles import role_of
from utils.runtime.errors import ExportError
from utils.runtime.files import sha256_file, write_atomic, write_json
from utils.runtime.isolation import preserved
from utils.runtime.resources import format_bytes
from utils.training import inference_script
from utils.training.export_formats import tensors_of
from utils.training.export_report import ExportedFile, ExportReport, FormatResult
from utils.training.export_utilities import REPORT, adapter_of, check_formats, export_as_is
from utils.training.export_weights import chosen_weights
from utils.training.model_card import model_card

MANIFEST, CARD, SCRIPT, SETTINGS, CHECK = "bundle.json", "README.md", "inference.py", "inference.json", "check.json"
VERSION = 1
"""Layout of the manifest."""
RUNTIMES = {"onnx": "onnxruntime", "torch_export": "torch"}
"""The package that runs a format, the preferred format first."""
FILLED = {"mask": "ones", "padding": "zeros", "segments": "zeros", "positions": "positions"}
"""What the script gives for inputs beside the content, by their role."""
STORED = 20_000
"""Logits that the check keeps, at most."""
TEXTS = ("It's 12 o'clock,  said the cat.\n\n\tdef f(x): return x**2", "caf\u00e9 \u4f60\u597d \U0001f642 \u00a0end ")
"""What the script's tokenizer is compared on."""
PATIENCE = 300
"""Seconds that the script may take for its check."""


@dataclass(frozen=True)
class Bundle:
    """A folder made by `bundle`."""

    directory: Path
    """Where it is."""
    report: ExportReport
    """What was exported, and how far it is from the original."""
    runtime: str | None
    """The one package that ``inference.py`` needs; None when no format runs alone."""
    difference: float | None
    """Largest difference of the script's logits from the original's."""
    why: str
    """What a reader has to know about the script."""
    files: tuple[ExportedFile, ...]
    """All files with sizes and checksums."""

    @property
    def passed(self) -> bool:
        """The script gives the original's answers."""
        return self.runtime is not None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)

    def text(self) -> str:
        """Return what was made, for a terminal."""
        script = f"{SCRIPT} runs with {self.runtime} alone, difference {self.difference:.1e}." if self.passed else ""
        lines = [self.report.text(), " ".join(part for part in (script, self.why) if part)]
        lines.append(f"Bundle of {len(self.files)} files, {format_bytes(self.bytes)}, in {self.directory}")
        return "\n".join(lines)

    def __str__(self) -> str:
        """Return the text."""
        return self.text()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "version": VERSION,
            "model": self.report.model,
            "runtime": self.runtime,
            "difference": self.difference,
            "why": self.why,
            "bytes": self.bytes,
            "files": [vars(file) for file in self.files],
        }

    def _repr_html_(self) -> str:
        """Show the bundle in a notebook."""
        last = html.escape("\n".join(self.text().splitlines()[-2:]))
        return f"{self.report._repr_html_()}<pre>{last}</pre>"


def bundle(
    model_or_run: Any,
    directory: str | Path,
    formats: Iterable[str] = ("safetensors", "onnx"),
    *,
    weights: str | None = None,
    licence: str | None = None,
    spec: ModelSpec | None = None,
    config: Any = None,
    progress: bool = True,
) -> Bundle:
    """Write a folder with everything that others need to use a model, and prove that it runs.

    Args:
        model_or_run: A run, a loaded model, an adapter or a module; left exactly as it was.
        directory: Where the files go; made when absent. Files that are not from an earlier bundle are never replaced.
        formats: As for `utils.export`; ``torch_export`` is added where ONNX does not take every shape.
        weights: As for `utils.export`.
        licence: Identifier of the licence for the model card, such as ``"mit"``; the choice is yours.
        spec: Facts about the model that override detection.
        config: Settings of the model.
        progress: Show a progress bar.

    Raises:
        ConfigError: A format is unknown, or the run has no such weights.
        ExportError: The model cannot run, or the directory cannot be written or holds other files.
    """
    names, directory = check_formats(formats), Path(directory)
    run = model_or_run if hasattr(model_or_run, "metrics") and hasattr(model_or_run, "data") else None
    _check_foreign(directory)
    with chosen_weights(model_or_run, weights) as chosen:
        report = export_as_is(model_or_run, directory, names, spec, config, chosen.text, progress)
        if "torch_export" not in names and not any(r.format == "onnx" and r.status == "ok" for r in report.results):
            names.append("torch_export")
            report = export_as_is(model_or_run, directory, names, spec, config, chosen.text, progress)
        adapter, _ = adapter_of(model_or_run, config, spec)
        tokenizer = getattr(getattr(run, "data", None), "tokenizer", None)
        try:
            inference = _write_script(directory, adapter, report, tokenizer)
            write_atomic(directory / CARD, model_card(adapter, report, chosen, inference, run, licence))
            files = _all_files(directory, report)
            made = Bundle(directory, report, inference["runtime"], inference["difference"], inference["why"], files)
            write_json(directory / MANIFEST, made.to_dict())
        except OSError as error:
            raise ExportError(
                f"The bundle {directory} cannot be written ({error.strerror or error}).",
                "Expected a directory with free space.",
                "Free some space and make it again.",
            ) from error
    return made


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of a bundle.

    Raises:
        ExportError: There is none that can be read.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _ = [(file["name"], file["bytes"], file["sha256"]) for file in manifest["files"]]
        version = manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{directory} is no bundle: {MANIFEST} cannot be read ({type(error).__name__}).",
            "Expected a folder that utils.bundle made.",
            "Make one: utils.bundle(run, directory).",
        ) from error
    if version != VERSION:
        raise ExportError(f"{path} has layout version {version}.", f"This version of Seedbed reads {VERSION}.")
    return dict(manifest)


def _check_foreign(directory: Path) -> None:
    """Refuse to replace files that no bundle wrote."""
    present = [name for name in (CARD, SCRIPT, SETTINGS, CHECK) if (directory / name).exists()]
    if present and not (directory / MANIFEST).exists():
        raise ExportError(
            f"{directory} holds {', '.join(present)} already, and no bundle wrote that.",
            "Expected a directory of the bundle's own: nothing of yours is ever overwritten.",
            "Choose another directory.",
        )


def _write_script(directory: Path, adapter: ModelAdapter, report: ExportReport, tokenizer: Any) -> dict[str, Any]:
    """Write ``inference.py`` with its settings and its check, run it, and say how that went."""
    for name in (SCRIPT, SETTINGS, CHECK):
        (directory / name).unlink(missing_ok=True)
    chosen = _runnable(report)
    if chosen is None:
        why = "; ".join(f"{r.format}: {r.why}" for r in report.results if r.format in RUNTIMES)
        return {"runtime": None, "difference": None, "why": f"No format runs without the model's code. {why}"}
    settings = _settings(adapter, chosen, tokenizer)
    write_json(directory / SETTINGS, settings)
    write_json(directory / CHECK, _check(adapter, chosen, report.tolerance, tokenizer))
    write_atomic(directory / SCRIPT, Path(inference_script.__file__).read_text(encoding="utf-8"))
    answer = run_check(directory)
    if not answer.get("good"):
        for name in (SCRIPT, SETTINGS, CHECK):
            (directory / name).unlink(missing_ok=True)
        return {"runtime": None, "difference": None, "why": f"The script did not pass its check: {answer}."}
    why = ""
    if settings["fixed_shape"]:
        why = f"The file runs at the input shape {tuple(settings['fixed_shape'])} only."
    return {"runtime": settings["runtime"], "difference": answer["difference"], "why": why}


def _runnable(report: ExportReport) -> FormatResult | None:
    """Return the format that the script runs: one that takes every shape before one of a fixed shape."""
    for status in ("ok", "fixed_shape"):
        for name in RUNTIMES:
            found = next((r for r in report.results if r.format == name and r.status == status), None)
            if found is not None:
                return found
    return None


def _settings(adapter: ModelAdapter, chosen: FormatResult, tokenizer: Any) -> dict[str, Any]:
    """Return what the script has to know."""
    inputs = []
    for name, value in tensors_of(adapter.example_inputs()).items():
        fill = "given" if name == adapter.main_input else FILLED.get(role_of(name) or "", "given")
        inputs.append({"name": name, "dtype": str(value.dtype).removeprefix("torch."), "fill": fill})
    ending = ".onnx" if chosen.format == "onnx" else ".pt2"
    tokens = adapter.modality == "tokens"
    known = [number for number in (adapter.vocab_size.value, tokenizer.vocab_size if tokenizer else None) if number]
    return {
        "runtime": RUNTIMES[chosen.format],
        "file": next(file.name for file in chosen.files if file.name.endswith(ending)),
        "task": adapter.task.value,
        "inputs": inputs,
        "max_length": adapter.max_length.value if tokens else None,
        "multiple": adapter.lengths.value.step if tokens else 1,
        "fixed_shape": list(chosen.checks[0].shape) if chosen.status == "fixed_shape" else None,
        "end_id": None if tokenizer is None else tokenizer.eos_id,
        "vocabulary": min(known) if known else None,
    }


def _check(adapter: ModelAdapter, chosen: FormatResult, tolerance: float, tokenizer: Any) -> dict[str, Any]:
    """Return inputs, and what the original model answers to them."""
    shapes = [check.shape for check in chosen.checks if check.difference is not None]
    shape = shapes[0] if chosen.status == "fixed_shape" else min(shapes, key=lambda s: (s[0], s[1:]))
    length = shape[1] if adapter.modality == "tokens" and len(shape) > 1 else None
    with preserved(adapter.module, "bundle"), torch.no_grad():
        adapter.module.eval()
        inputs = adapter.example_inputs(shape[0], length, seed=1)
        values = {name: _rounded(value.tolist()) for name, value in tensors_of(inputs).items()}
        given = {name: torch.tensor(values[name], dtype=value.dtype) for name, value in tensors_of(inputs).items()}
        logits = adapter.logits({**inputs, **given}).flatten().double()
    stride = -(-logits.numel() // STORED)
    texts = []
    if tokenizer is not None:
        texts = [(text, [int(n) for n in ids]) for text, ids in zip(TEXTS, tokenizer.encode(list(TEXTS)), strict=True)]
    return {
        "inputs": values,
        "stride": stride,
        "count": logits.numel(),
        "tolerance": tolerance,
        # JSON has no name for an infinity, such as the score of a class that is ruled out; `float` reads its text.
        "logits": [n if math.isfinite(n) else str(n) for n in logits[::stride].tolist()],
        "texts": texts,
    }


def _rounded(value: Any) -> Any:
    """Return nested lists with numbers short enough to read."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def run_check(directory: Path) -> dict[str, Any]:
    """Run a bundle's script on its check, in an empty directory and without this project; return what it says."""
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as empty:
        try:
            done = subprocess.run(
                [sys.executable, "-B", str((Path(directory) / SCRIPT).resolve()), "--check"],
                cwd=empty, env=surroundings, capture_output=True, text=True, timeout=PATIENCE, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"good": False, "why": f"no answer in {PATIENCE} s"}
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return {"good": False, "why": f"exit status {done.returncode}, {said}"}


def _all_files(directory: Path, report: ExportReport) -> tuple[ExportedFile, ...]:
    """List the files of the bundle: those of the export, and its own."""
    files = {file.name: file for result in report.results for file in result.files}
    for name in (CARD, SCRIPT, SETTINGS, CHECK, REPORT):
        path = directory / name
        if path.exists():
            files[name] = ExportedFile(name, path.stat().st_size, sha256_file(path))
    return tuple(files[name] for name in sorted(files))
