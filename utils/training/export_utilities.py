"""Export a model and prove it: every file is loaded back, run at several shapes and compared with the original.

An export can succeed and yet be wrong or fixed to one shape, so a format counts as ok only after its files gave the
original's answers at shapes other than the one it was exported with. One format's failure leaves the others alone, and
files of earlier exports too.
"""

import copy
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import ConfigError, ExportError
from utils.runtime.files import sha256_file, sync_file, write_json
from utils.runtime.isolation import preserved
from utils.runtime.progress import progress_bar
from utils.training.export_formats import FORMATS, INEXACT, Candidate, Inputs, Runner, explain, quiet, tensors_of
from utils.training.export_quality import held_out_quality
from utils.training.export_report import GOOD, ExportedFile, ExportReport, FormatResult, ShapeCheck
from utils.training.export_weights import chosen_weights
from utils.training.prepared_data import PreparedData

__all__ = ["ExportReport", "FormatResult", "export"]

RELATIVE_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference over the largest logit, by the type of the logits; 1e-4 for the others."""
LONGEST = 512
"""Longest sequence that parity is checked at."""
REPORT = "export.json"


def export(
    model_or_run: Any,
    directory: str | Path,
    formats: Iterable[str] = ("safetensors", "onnx", "torch_export"),
    *,
    spec: ModelSpec | None = None,
    config: Any = None,
    weights: str | None = None,
    progress: bool = True,
) -> ExportReport:
    """Write a model in several formats, each checked against the original.

    Args:
        model_or_run: A loaded model, an adapter, a module or a training run. It is left exactly as it was.
        directory: Where the files go; made when absent.
        formats: Which of ``safetensors``, ``onnx``, ``torch_export``, ``onnx_int8``, ``torchscript`` to write.
        spec: Facts about the model that override detection.
        config: Settings of the model.
        weights: Which weights of a run: ``last``, ``best`` (of the checkpoint with the lowest held-out loss) or
            ``average``; None takes the moving average where the run kept one, else the last.
        progress: Show a progress bar.

    Returns:
        A report with the largest difference from the original, in eval mode on the CPU, for each format and input
        shape. It is also saved as ``export.json``.

    Raises:
        ConfigError: A format is unknown, or the run has no such weights.
        ExportError: The model cannot run, or the directory cannot be written.
    """
    names = check_formats(formats)
    with chosen_weights(model_or_run, weights) as chosen:
        return export_as_is(model_or_run, Path(directory), names, spec, config, chosen.text, progress)


def export_as_is(
    model_or_run: Any,
    directory: Path,
    names: list[str],
    spec: ModelSpec | None,
    config: Any,
    weights: str,
    progress: bool,
) -> ExportReport:
    """Write and compare the formats of a model with the weights that it holds now; see `export`."""
    started = time.perf_counter()
    adapter, loaded = adapter_of(model_or_run, config, spec)
    run_data = None if isinstance(model_or_run, nn.Module) else getattr(model_or_run, "data", None)
    tokenizer = getattr(run_data, "tokenizer", None)
    if adapter.failure is not None:
        raise ExportError(f"{adapter.name} cannot be exported. {adapter.failure}")
    ours = _written_before(directory)
    staging = directory / f".export-{os.getpid()}"
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"The export directory {directory} cannot be written ({error.strerror}).",
            "Expected a directory, or a path where one can be made.",
        ) from error
    try:
        with preserved(adapter.module, "export"), torch.no_grad(), progress_bar(len(names), "Export", progress) as bar:
            adapter.module.eval()
            references = _references(adapter)
            axes = _axes([inputs for inputs, _ in references])
            data = run_data if isinstance(run_data, PreparedData) else None
            candidate = Candidate(adapter, references[0][0], axes, loaded, tokenizer, data)
            held_out = {} if data is None else held_out_quality(adapter, data)
            tolerance, reason = _tolerance([logits for _, logits in references])
            results = []
            for name in names:
                bar.set_description_str(f"Export {name}")
                results.append(_export_one(name, candidate, references, tolerance, staging / name, directory, ours))
                bar.update()
        report = ExportReport(
            model=adapter.name,
            task=adapter.task.value,
            parameters=adapter.num_parameters,
            directory=str(directory),
            results=tuple(results),
            tolerance=tolerance,
            tolerance_reason=reason,
            versions=_versions(names),
            seconds=time.perf_counter() - started,
            weights=weights,
            held_out=held_out,
        )
        try:
            write_json(directory / REPORT, report.to_dict())
        except OSError as error:
            raise ExportError(
                f"The report {directory / REPORT} cannot be written ({error.strerror}).",
                "Expected a directory with free space.",
                "Free some space and export again.",
            ) from error
        return report
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_formats(formats: Iterable[str]) -> list[str]:
    """Return the formats without repetitions."""
    known = ", ".join(FORMATS)
    if isinstance(formats, str):
        formats = (formats,)
    names = list(dict.fromkeys(formats))
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"The export format {name!r} is unknown.", f"Expected some of {known}.")
    if not names:
        raise ConfigError("No export format was asked for.", f"Expected some of {known}.")
    return names


def adapter_of(model_or_run: Any, config: Any, spec: ModelSpec | None) -> tuple[ModelAdapter, Any]:
    """Return an adapter on the CPU and the loaded model with its source files, if there is one."""
    loaded = None
    if not isinstance(model_or_run, (nn.Module, ModelAdapter)) and hasattr(model_or_run, "adapter"):
        loaded, model_or_run = getattr(model_or_run, "loaded", None), model_or_run.adapter
    elif hasattr(model_or_run, "save_source"):
        loaded = model_or_run
    adapter = ModelAdapter(model_or_run, config, spec)
    if adapter.device.type != "cpu":
        # The exported files run anywhere; constants captured on another device would not.
        moved = copy.deepcopy(adapter.module).to("cpu")
        other = ModelAdapter(moved, adapter.config, adapter.spec)
        other.factory = adapter.factory
        adapter = other
    return adapter, loaded


def _references(adapter: ModelAdapter) -> list[tuple[dict[str, Any], Tensor]]:
    """Return inputs of several shapes, the export's first, with the original's logits.

    Shapes that the original itself refuses are left out.
    """
    found: list[tuple[dict[str, Any], Tensor]] = []
    shapes: set[tuple[int, ...]] = set()
    problem = ""
    usual, others = _sizes(adapter)
    for seed, (batch, length) in enumerate([*usual, *others]):
        if seed >= len(usual) and len({shape[1:] for shape in shapes}) > 1:
            break
        try:
            inputs = adapter.example_inputs(batch, length, seed)
            shape = tuple(inputs[adapter.main_input].shape)
            if shape in shapes:
                continue
            logits = adapter.logits(inputs).detach().clone()
        except Exception as error:
            problem = problem or explain(error)
            continue
        shapes.add(shape)
        found.append((inputs, logits))
    if not found:
        raise ExportError(
            f"{adapter.name} could not run at any of the shapes to compare at.",
            f"The first failed with {problem}",
            "Validate the model first.",
        )
    # A size of 1 would be taken for a constant by the exporters, so another shape goes first.
    tokens = 2 if adapter.modality == "tokens" else 1
    first = min(range(len(found)), key=lambda index: 1 in found[index][0][adapter.main_input].shape[:tokens])
    found.insert(0, found.pop(first))
    if not found[0][1].is_floating_point():
        raise ExportError(
            f"{adapter.name} returns {found[0][1].dtype}, not real numbers.", "Expected logits to compare."
        )
    return found


def _sizes(adapter: ModelAdapter) -> tuple[list[tuple[int, int | None]], list[tuple[int, int | None]]]:
    """Return batch sizes and lengths to try, the export's first, and others for a model that refuses those."""
    if adapter.modality != "tokens":
        return [(2, None), (1, None), (3, None), (5, None)], []
    longest = min(adapter.max_length.value or 96, LONGEST)
    middle = min(24, max(2, longest // 2))
    odd = max(1, min(9, longest // 3) // 2 * 2 - 1)
    # For a model that runs at one length, or at multiples of it only.
    known = adapter.example_inputs()[adapter.main_input].shape[-1]
    others: list[tuple[int, int | None]] = [(2, known), (1, known), (3, known), (1, 2 * known)]
    return [(2, middle), (1, odd), (3, max(1, longest * 3 // 4)), (1, longest)], others


def _axes(all_inputs: list[dict[str, Any]]) -> dict[str, dict[int, str]]:
    """Return the axes along which legal inputs differ, by input."""
    axes: dict[str, dict[int, str]] = {}
    for name, tensor in tensors_of(all_inputs[0]).items():
        shapes = [inputs[name].shape for inputs in all_inputs]
        varying = [axis for axis in range(tensor.dim()) if len({shape[axis] for shape in shapes}) > 1]
        axes[name] = {axis: "batch" if axis == 0 else "sequence" for axis in varying}
    return axes


def _tolerance(logits: list[Tensor]) -> tuple[float, str]:
    """Return the largest difference that counts as equal, and how it was chosen."""
    relative = RELATIVE_TOLERANCE.get(logits[0].dtype, 1e-4)
    finite = [values[values.isfinite()].abs().double() for values in logits]
    scale = max((float(values.max()) for values in finite if values.numel()), default=0.0)
    dtype = str(logits[0].dtype).removeprefix("torch.")
    return relative * max(scale, 1e-6), f"{relative:g} of the largest {dtype} logit, {scale:.3g}"


def _export_one(
    name: str,
    candidate: Candidate,
    references: list[tuple[dict[str, Any], Tensor]],
    tolerance: float,
    staging: Path,
    directory: Path,
    ours: set[str],
) -> FormatResult:
    """Write one format, compare it, and publish its files if they are right.

    `ours` are the files that exports wrote, which may be replaced; those of this format are added.
    """
    started = time.perf_counter()
    checks: tuple[ShapeCheck, ...] = ()
    files: tuple[ExportedFile, ...] = ()
    held_out: dict[str, float] = {}
    try:
        staging.mkdir()
        run, remark = FORMATS[name](candidate, staging)
        main = candidate.adapter.main_input
        checks = tuple(_compare(run, inputs, logits, tuple(inputs[main].shape)) for inputs, logits in references)
        status, why = _judge(checks, tolerance, exact=name not in INEXACT)
        if candidate.data is not None and status in GOOD:
            with quiet():
                held_out = held_out_quality(candidate.adapter, candidate.data, run, list(candidate.axes))
        why = " ".join(part for part in (why, remark, _limits(candidate, references)) if part)
        if status != "failed":
            files = _publish(staging, directory, ours)
    except Exception as error:
        status, why = "failed", _failure(error)
    return FormatResult(name, status, why, files, checks, time.perf_counter() - started, held_out)


def _compare(run: Runner, inputs: Inputs, expected: Tensor, shape: tuple[int, ...]) -> ShapeCheck:
    """Run the exported model on one input and measure the largest difference."""
    try:
        with quiet():
            actual = run(inputs)
    except Exception as error:
        return ShapeCheck(shape, None, explain(error))
    if actual.shape != expected.shape:
        return ShapeCheck(
            shape, float("inf"), f"the output is {tuple(actual.shape)} and the original's {tuple(expected.shape)}"
        )
    a, b = actual.double(), expected.double()
    # Equal infinities and NaN in the same place are no difference; NaN in one only is the largest there is.
    difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )
    largest = float(difference.max()) if difference.numel() else 0.0
    same = float((a.argmax(-1) == b.argmax(-1)).double().mean()) if a.dim() and a.shape[-1] > 1 and a.numel() else None
    return ShapeCheck(shape, largest, "" if math.isfinite(largest) else "only one of the two is NaN or infinite", same)


def _judge(checks: tuple[ShapeCheck, ...], tolerance: float, exact: bool = True) -> tuple[str, str]:
    """Return the status that the comparisons prove, and why it is not ok.

    A format that is not exact may differ, by a finite number; by how much stands in the report.
    """
    for check in checks:
        if check.difference is not None and check.difference > (tolerance if exact else sys.float_info.max):
            return "failed", (
                f"The exported model differs from the original by {check.difference:.1e} at input shape {check.shape}, "
                f"more than {tolerance:.1e}. {check.why}".strip()
            )
    refused = [check for check in checks if check.difference is None]
    if checks[0].difference is None or len(refused) == len(checks):
        return "failed", f"The exported model does not run at the shape of the export. {checks[0].why}"
    if refused:
        return "fixed_shape", (
            f"The exported model is right at {checks[0].shape} and refuses {refused[0].shape}, which the original "
            f"takes: {refused[0].why}"
        )
    if exact:
        return "ok", ""
    largest = max(check.difference or 0.0 for check in checks)
    same = [check.same_choice for check in checks if check.same_choice is not None]
    chosen = f"; at least {min(same):.1%} of the largest logits are the same" if same else ""
    return "approximate", f"Fewer bits, other numbers: the logits differ by up to {largest:.1e}{chosen}."


def _limits(candidate: Candidate, references: list[tuple[dict[str, Any], Tensor]]) -> str:
    """Say which axes could not be varied because the original itself takes one size only."""
    main = candidate.adapter.main_input
    axes, shape = candidate.axes[main].values(), tuple(references[0][0][main].shape)
    limits = []
    if "batch" not in axes:
        limits.append(f"batches of {shape[0]}")
    if candidate.adapter.modality == "tokens" and "sequence" not in axes:
        limits.append(f"sequences of {shape[1]} tokens")
    return f"The original itself takes only {' and '.join(limits)}." if limits else ""


def _written_before(directory: Path) -> set[str]:
    """Return the names of the files that an earlier export wrote into a directory."""
    try:
        report = json.loads((directory / REPORT).read_text(encoding="utf-8"))
        return {str(file["name"]) for result in report["results"] for file in result["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _publish(staging: Path, directory: Path, ours: set[str]) -> tuple[ExportedFile, ...]:
    """Move the files of a format to their final names, each whole.

    Raises:
        ExportError: A file of that name is there and no export wrote it.
    """
    files = []
    names = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    foreign = [name.as_posix() for name in names if (directory / name).exists() and name.as_posix() not in ours]
    if foreign:
        raise ExportError(
            f"{directory} holds {', '.join(foreign)} already, and no export wrote that.",
            "Expected a directory of the exporter's own: nothing of yours is ever overwritten.",
            "Choose another directory.",
        )
    ours.update(name.as_posix() for name in names)
    for name in names:
        path = staging / name
        sync_file(path)
        files.append(ExportedFile(name.as_posix(), path.stat().st_size, sha256_file(path)))
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    sync_file(directory)
    return tuple(files)


def _failure(error: Exception) -> str:
    """Return why a format failed, as one paragraph."""
    if isinstance(error, OSError) and not isinstance(error, ImportError):
        return f"The files cannot be written ({error.strerror or error}). Files of earlier exports are untouched."
    return explain(error)


def _versions(names: list[str]) -> dict[str, str]:
    """Return the versions of what wrote and ran the files."""
    from importlib.metadata import PackageNotFoundError, version

    packages = ["torch"] + (["safetensors"] if "safetensors" in names else [])
    packages += ["onnx", "onnxscript", "onnxruntime"] if {"onnx", "onnx_int8"} & set(names) else []
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
