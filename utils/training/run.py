"""A run directory: complete in itself, so that the run can be continued anywhere from it alone.

Layout::

    run.json       what was started: model, data, settings, versions; written last, so without it nothing was started
    model/         the model's source files and config, exactly as loaded
    data/          the prepared samples and the tokenizer
    checkpoints/   see `utils.training.checkpoint_manager`
    metrics.csv    every number that was measured
    growth.json    what the model grew through, if it did; growth.png shows it
    figures/       training.png
    report.html    the same in a browser, beside earlier runs
    summary.json   how it stands: status, step, last measurements, SHA-256 of the weights
"""

import fcntl
import html
import json
import os
import platform
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.loading import LoadedModel
from utils.runtime.errors import CheckpointError, RunError
from utils.runtime.files import null_nonfinite, sha256_file, tag_nonfinite, untag_nonfinite, write_json
from utils.runtime.project import VERSION
from utils.training.checkpoint_manager import CheckpointManager
from utils.training.config import TrainingConfig
from utils.training.growth_rows import LINEAGE, read_growth
from utils.training.migrations import FORMAT_VERSION, RECORDS, is_known, migrated
from utils.training.module_memory import ModuleMemory, frozen_names
from utils.training.prepared_data import PreparedData
from utils.training.sharding import is_sharded
from utils.training.weights import weights_sha256

RECORD, SUMMARY, METRICS, FIGURE = "run.json", "summary.json", "metrics.csv", "figures/training.png"
REPORT = "report.html"
GROWTH_PICTURE = "growth.png"
FILES = (METRICS, SUMMARY, REPORT, LINEAGE, GROWTH_PICTURE)
"""What a session writes beside `RECORD`, in no folder."""
LOCK, PROCESSES_LOCK = ".lock", ".lock-processes"
PARTS, UNFINISHED = ("model", "data", "checkpoints", "figures"), ".unfinished-run"
SPEC_FIELDS = ("task", "vocab_size", "max_length", "num_labels", "pad_token_id", "frozen")


@dataclass(repr=False)
class Run:
    """A training run and its directory."""

    directory: Path
    adapter: ModelAdapter
    data: PreparedData
    config: TrainingConfig
    loaded: LoadedModel | None = None
    status: str = "started"
    """``started``, ``finished``, or how it stopped: ``interrupted``, ``terminated``, ``stopped by its time budget``;
    ``, but not saved`` is added when the last state could not be written."""
    step: int = 0
    """Optimizer steps done."""
    total_steps: int = 0
    """Optimizer steps planned."""
    sessions: int = 0
    """How often the run was started or continued from a checkpoint that was kept."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """All rows of metrics.csv."""
    lost_checkpoints: int = 0
    """Checkpoints of this session that could not be written."""
    stop_requested: str | None = None
    """An observer sets this to stop the run cleanly after the step under way; it becomes the status."""
    notes: list[str] = field(default_factory=list)
    """What trackers have to say about this session, such as how to upload what was tracked offline."""
    checkpoints: CheckpointManager = field(init=False)
    """The checkpoints of this run."""

    def __post_init__(self) -> None:
        """Find the checkpoints."""
        config = self.config
        self.checkpoints = CheckpointManager(
            self.directory / "checkpoints", config.keep_checkpoints, config.keep_best, config.keep_every_steps
        )

    @property
    def model(self) -> nn.Module:
        """The model with its present weights."""
        return self.adapter.module

    @property
    def finished(self) -> bool:
        """All planned steps were done, or there was nothing left to gain (early stopping)."""
        return self.status in ("finished", "finished early")

    def last(self, split: str) -> dict[str, Any]:
        """Return the last row measured on ``train`` or ``validation``; empty when there is none."""
        return next((row for row in reversed(self.metrics) if row["split"] == split), {})

    def summary(self) -> dict[str, Any]:
        """Return how the run stands, as plain values; a measured number that is not finite is None."""
        validation = self.last("validation")
        baseline = self.data.facts.get("zlib_bits_per_byte")
        return {
            "status": self.status,
            "step": self.step,
            "total_steps": self.total_steps,
            "sessions": self.sessions,
            "model": self.adapter.name,
            "parameters": self.adapter.num_parameters,
            "task": self.adapter.task.value,
            "data": self.data.reference,
            "train_loss": null_nonfinite(self.last("train").get("loss")),
            "validation_loss": null_nonfinite(validation.get("loss")),
            "validation_accuracy": null_nonfinite(validation.get("accuracy")),
            "bits_per_byte": null_nonfinite(validation.get("bits_per_byte")),
            "zlib_bits_per_byte": baseline,
            "lost_checkpoints": self.lost_checkpoints,
            **({"growth_events": grown} if (grown := len(read_growth(self.directory).rows)) else {}),
            "weights_sha256": weights_sha256(self.model),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the summary with the settings and the place."""
        return {**self.summary(), "directory": str(self.directory), "config": self.config.to_dict()}

    def save_summary(self) -> None:
        """Write summary.json, with what trackers had to say: another process may have to tell it."""
        write_json(self.directory / SUMMARY, self.summary() | ({"notes": self.notes} if self.notes else {}))

    def __str__(self) -> str:
        """Say in one line how the run stands."""
        numbers = []
        validation = self.last("validation")
        if "loss" in validation:
            numbers.append(f"validation loss {validation['loss']:.3f} nats")
        if "bits_per_byte" in validation:
            zlib = self.data.facts["zlib_bits_per_byte"]
            numbers.append(f"{validation['bits_per_byte']:.3f} bits per byte (zlib -9: {zlib:.3f})")
        if "accuracy" in validation:
            numbers.append(f"accuracy {validation['accuracy']:.1%}")
        return (
            f"{self.adapter.name} on {self.data.reference}: {self.status} at step {self.step} of {self.total_steps}"
            + (", " + ", ".join(numbers) if numbers else "")
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show the summary in a notebook."""
        shown = {
            name: f"{value:.4f}" if isinstance(value, float) else str(value)
            for name, value in self.summary().items()
            if value is not None
        }
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in shown.items()
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<p><b>{html.escape(str(self))}</b></p><table>{rows}</table>{notes}"


def create_run(
    directory: Path,
    adapter: ModelAdapter,
    loaded: LoadedModel | None,
    data: PreparedData,
    config: TrainingConfig,
    found: Mapping[str, Any] | None = None,
    states: Mapping[str, Any] | None = None,
) -> Run:
    """Write everything that a run needs to be continued; ``run.json`` comes last.

    Args:
        directory: A new or empty directory.
        adapter: The model.
        loaded: Where it is from, if that is known.
        data: What it is trained on.
        config: How, in numbers.
        found: How those settings were found that had been ``auto``, by name.
        states: States of extensions that have acted on the model already, by name.

    Raises:
        RunError: The directory holds something already, or cannot be written.
    """
    directory = Path(directory)
    check_free(directory)
    make_empty(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / UNFINISHED).touch()
        if loaded is not None and loaded.kind != "module":
            loaded.save_source(directory / "model")
        data.save(directory / "data")
        run = Run(directory, adapter, data, config, loaded)
        # The weights to start from: without them a run that is killed before its first checkpoint could not go on.
        memory = {"memory": ModuleMemory(adapter.module).state_dict()}
        run.checkpoints.save(0, adapter.module, {**memory, **(states or {})})
        spec = {name: getattr(adapter.spec, name) for name in SPEC_FIELDS}
        record = {
            "format_version": FORMAT_VERSION,
            "id": secrets.token_hex(8),
            "seedbed": VERSION,
            "machine": machine(config),
            "model": {
                "class": adapter.name,
                "kind": loaded.kind if loaded else "module",
                "reference": loaded.reference if loaded else None,
                "revision": loaded.revision if loaded else None,
                "sha256": loaded.sha256 if loaded else None,
                "parameters": adapter.num_parameters,
                "files": source_hashes(directory),
                "config": loaded.config if loaded else None,
                "frozen": frozen_names(adapter.module),
            },
            "spec": spec,
            "data": data.to_dict(),
            "config": config.to_dict(),
            "found": {name: finding.to_dict() for name, finding in (found or {}).items()},
        }
        write_json(directory / RECORD, tag_nonfinite(record))
        (directory / UNFINISHED).unlink()
    except (TypeError, ValueError) as error:
        raise RunError(
            f"The run's settings cannot be kept as JSON: {error}.",
            "Expected a model config of numbers, texts, lists and dicts.",
            "Pass plain values in config=.",
        ) from error
    except (OSError, CheckpointError) as error:
        raise RunError(
            f"The run directory {directory} cannot be written: {getattr(error, 'strerror', None) or error}",
            "Expected a writable directory with some space.",
            "Choose another run_dir or free some space.",
        ) from error
    return run


def check_free(directory: Path) -> None:
    """Make sure that a run can be started in a directory, without touching it.

    Raises:
        RunError: It holds a run, or something that is none.
    """
    if (directory / RECORD).exists():
        raise RunError(
            f"{directory} holds a run already.",
            "Expected a new or empty directory.",
            f"Continue it with utils.resume({str(directory)!r}), or choose another run_dir.",
        )
    if directory.exists() and not (directory / UNFINISHED).exists():
        make_empty(directory)


def make_empty(directory: Path) -> None:
    """Remove what a start or a copy that was killed left; anything else in the way is the user's and stays.

    Raises:
        RunError: There is something else.
    """
    if (directory / UNFINISHED).exists():
        for name in PARTS:
            shutil.rmtree(directory / name, ignore_errors=True)
        for file in (*(directory / name for name in FILES), *directory.glob(".*.tmp-*")):
            file.unlink(missing_ok=True)
    harmless = {UNFINISHED, LOCK, PROCESSES_LOCK}
    if directory.exists() and (not directory.is_dir() or {path.name for path in directory.iterdir()} - harmless):
        raise RunError(
            f"{directory} is not empty and holds no run.",
            "Expected a new or empty directory: nothing of yours is ever overwritten.",
            "Choose another run_dir.",
        )


def read_record(directory: Path) -> dict[str, Any]:
    """Read ``run.json``; one of an older version is brought to the present layout, and stays as it is on disk.

    Raises:
        RunError: The directory is missing, empty, half-written or of a newer version.
    """
    path = Path(directory) / RECORD
    if not path.parent.is_dir():
        raise RunError(
            f"There is no directory {directory}.", "Expected the directory of a run.", "Check the path, or mount Drive."
        )
    if not path.exists():
        empty = not any(path.parent.iterdir())
        raise RunError(
            f"{directory} is {'empty' if empty else f'without {RECORD}'}.",
            f"Expected a run, whose {RECORD} is written before the first step.",
            "Nothing had been trained there; start the run again with utils.train.",
        )
    try:
        record = untag_nonfinite(json.loads(path.read_text(encoding="utf-8")))
        version = record["format_version"]
        if is_known(version):
            record = migrated(record, version, RECORDS)
            _ = [record[name] for name in ("id", "spec", "config")]
            _ = [record["machine"][name] for name in ("torch", "device", "threads", "precision")]
            _ = [record["data"][name] for name in ("reference", "facts")]
            _ = [
                record["model"][name] for name in ("class", "kind", "reference", "sha256", "config", "files", "frozen")
            ]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} cannot be read ({type(error).__name__}).",
            "Expected JSON that Seedbed wrote.",
            "Restore it from a copy.",
        ) from error
    if not is_known(version):
        raise RunError(
            f"{path} has format version {version}.",
            f"This version of Seedbed reads up to {FORMAT_VERSION}.",
            "Use the version that wrote it, or a newer one.",
        )
    return dict(record)


def machine(config: TrainingConfig) -> dict[str, Any]:
    """Return what bitwise equality depends on besides the run itself."""
    on_gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "devices": config.devices,
        "weights": "in parts" if is_sharded(config) else "whole",
        "precision": config.resolved_precision,
    }


def warn_if_elsewhere(record: dict[str, Any], config: TrainingConfig) -> None:
    """Warn when this machine differs from the one that a run was started on in what its bits depend on."""
    before, now = record["machine"], machine(config)
    changed = [
        f"{name} {before[name]} became {now[name]}"
        for name in now
        if name != "python" and name in before and before[name] != now[name]
    ]
    if changed:
        own = record["config"]
        recut = (own.get("devices", 1), own["batch_size"]) != (config.devices, config.batch_size)
        beyond = (
            " What is drawn or counted for a batch (dropout, masked tokens, batch normalization) differs by more: "
            "steps of the same samples are cut into other batches."
        )
        warnings.warn(
            f"This machine is not like the one that the run was started on: {', '.join(changed)}. The run continues "
            "from the same state; from here on its numbers agree within rounding, not bit by bit."
            + (beyond if recut else ""),
            stacklevel=3,
        )


@contextmanager
def session_lock(directory: Path, name: str = LOCK) -> Iterator[None]:
    """Keep a second process from training the same run; folders that know no locks, as some mounts, are not locked.

    Args:
        directory: The run.
        name: `LOCK`, or `PROCESSES_LOCK` for the first of several processes that the holder of `LOCK` has started: when
            that one is killed, it still needs a moment to save and stop.

    Raises:
        RunError: Another process is at it.
    """
    with ExitStack() as stack:
        _take(directory, name, stack)
        if name == LOCK and (Path(directory) / PROCESSES_LOCK).exists():
            with ExitStack() as others:
                _take(directory, PROCESSES_LOCK, others)
        yield


def _close_locks() -> None:
    """Close the files of the locks that this process holds, which does not release what its parent holds."""
    for stream in _LOCKS:
        stream.close()
    _LOCKS.clear()


_LOCKS: set[TextIO] = set()
os.register_at_fork(after_in_child=_close_locks)


def _take(directory: Path, name: str, stack: ExitStack) -> None:
    """Hold a lock until a stack of contexts is left."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        stream = stack.enter_context((Path(directory) / name).open("w"))
        # A lock belongs to every fork that has its file open: workers that outlive a killed session would keep the next
        # one out until they notice.
        _LOCKS.add(stream)
        stack.callback(_LOCKS.discard, stream)
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(
            f"Another process is training the run in {directory}.",
            "Expected to be the only one: two would overwrite each other's checkpoints.",
            "Wait for it to end, or stop it.",
        ) from None
    except OSError:
        pass


def source_hashes(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of the model's source in a run directory, by name; empty when there is none."""
    folder = Path(directory) / "model"
    if not folder.is_dir():
        return {}
    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def spec_of(record: dict[str, Any]) -> ModelSpec:
    """Return what the user had stated about the model."""
    stated = dict(record["spec"])
    return ModelSpec(**{**stated, "frozen": tuple(stated.get("frozen") or ())})
