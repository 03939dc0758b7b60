"""Checkpoints that cannot be torn: a directory appears under its final name only when every byte is on disk.

Layout of one checkpoint, ``step-00000300/``::

    model.safetensors   weights and buffers, shared tensors once
    state.pt            the states of all other parts, loadable with weights_only=True
    manifest.json       format version, step, held-out loss, size and SHA-256 of each file; written last

A checkpoint is trusted only after its hashes were compared. One that does not verify is left where it is, named in a
warning, and the next older one is used.
"""

import errno
import json
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from utils.runtime.errors import CheckpointError
from utils.runtime.files import sha256_file, sync_file
from utils.runtime.resources import format_bytes
from utils.training.hashed_file import HashedFile
from utils.training.migrations import FORMAT_VERSION, STATES, is_known, migrated
from utils.training.weights import distinct_tensors, load_weights, write_tensors

WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
FILES = (WEIGHTS, STATE)
STEP_NAME = re.compile(r"^step-(\d{8,})$")
SPARE_BYTES = 16 << 20
"""Space that stays free beside a checkpoint, for the metrics and the manifest."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one step, apart from the run itself: training can go on while it is written."""

    step: int
    tensors: dict[str, Tensor]
    """Weights and buffers on the CPU, shared ones once."""
    aliases: dict[str, str]
    """Further names of shared tensors."""
    state: dict[str, Any]
    """The states of all other parts, with all tensors on the CPU."""
    loss: float | None = None
    """Held-out loss at this step, if it was measured; one that is not finite counts as none."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *_tensors(self.state)))


def take_snapshot(
    step: int, module: nn.Module | Mapping[str, Any], state: dict[str, Any], loss: float | None = None
) -> Snapshot:
    """Copy everything that a checkpoint holds into main memory; instead of a model its ``state_dict`` will do."""
    tensors, aliases = distinct_tensors(module, copy=True)
    return Snapshot(step, tensors, aliases, _copied(state), loss)


def _copied(value: Any) -> Any:
    """Return a value whose tensors are copies on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files match its manifest."""

    directory: Path
    step: int

    def load_into(self, module: nn.Module) -> dict[str, Any]:
        """Load the weights into a module and return the states of the other parts.

        Raises:
            CheckpointError: It belongs to another model, or its state cannot be read.
        """
        load_weights(module, self.directory / WEIGHTS)
        return self.states()

    def states(self) -> dict[str, Any]:
        """Return the states of all parts but the weights.

        Raises:
            CheckpointError: They cannot be read.
        """
        try:
            state = torch.load(self.directory / STATE, map_location="cpu", weights_only=True)
            version = json.loads((self.directory / MANIFEST).read_text(encoding="utf-8"))["format_version"]
            return migrated(dict(state), version, STATES)
        except Exception as error:
            raise CheckpointError(
                f"{self.directory.name}/{STATE} cannot be read ({type(error).__name__}).",
                "Expected a file that this version of Seedbed wrote.",
                "Delete this checkpoint to resume from the one before it.",
            ) from error


class CheckpointManager:
    """Writes, verifies, finds and removes the checkpoints of one run."""

    def __init__(self, directory: Path, keep: int = 2, keep_best: int = 0, keep_every_steps: int | None = None) -> None:
        """Manage a directory.

        Args:
            directory: Where the checkpoints are; created when the first is written.
            keep: How many of the newest stay.
            keep_best: How many of those with the lowest held-out loss stay too.
            keep_every_steps: Those of multiples of this step stay for ever; None for no such.
        """
        self.directory, self.keep = Path(directory), keep
        self.keep_best, self.keep_every_steps = keep_best, keep_every_steps
        self._trusted: list[Path] = []
        self._held: list[Path] = []
        self._lock = threading.Lock()

    def save(self, step: int, module: nn.Module, state: dict[str, Any], loss: float | None = None) -> Path:
        """Write a checkpoint of the present state and then remove those that are too old; see `write`."""
        tensors, aliases = distinct_tensors(module)
        return self.write(Snapshot(step, tensors, aliases, state, loss))

    def write(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint and then remove those that are too old.

        Args:
            snapshot: What it holds.

        Returns:
            The new checkpoint's directory.

        Raises:
            CheckpointError: It could not be written; earlier checkpoints are untouched.
        """
        step = snapshot.step
        target = self.directory / f"step-{step:08d}"
        temporary = self.directory / f".{target.name}.tmp-{os.getpid()}"
        try:
            self._remove_leftovers()
            temporary.mkdir(parents=True)
            require_space(self.directory, snapshot.nbytes)
            manifest = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "validation_loss": snapshot.loss if is_finite(snapshot.loss) else None,
                "files": _write_files(snapshot, temporary),
            }
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            sync_file(temporary / MANIFEST)
            sync_file(temporary)
            self._replace(temporary, target)
        except CheckpointError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        except (OSError, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._write_error(step, error) from error
        self._trust(target)
        # What cannot be removed now is removed after the next checkpoint; this one is written.
        with suppress(OSError):
            self._prune()
        return target

    def latest(self) -> Checkpoint:
        """Return the newest checkpoint that verifies; warn about each newer one that does not.

        Raises:
            CheckpointError: There is none.
        """
        failures = []
        directories = self._directories()
        for directory in directories:
            problem = self.problem(directory)
            if problem is None:
                self._trust(directory)
                return Checkpoint(directory, _step(directory))
            failures.append(f"{directory.name}: {problem}")
            older = "" if directory == directories[-1] else "; the next older one is used"
            warnings.warn(
                f"The checkpoint {directory.name} does not verify ({problem}){older}. "
                "It is left on disk; delete it when you do not need it.",
                stacklevel=2,
            )
        raise CheckpointError(
            f"No usable checkpoint in {self.directory} ({'; '.join(failures) or 'there is none'}).",
            "Expected at least one whose files match its manifest.",
            "Copy the checkpoints again from where the run was saved, or start a new run.",
        )

    def problem(self, directory: Path, hashes: bool = True) -> str | None:
        """Say what is wrong with a checkpoint's files, or None when all match the manifest.

        Args:
            directory: The checkpoint.
            hashes: Read the files and compare their hashes too, not only their sizes.
        """
        try:
            manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            if not is_known(manifest["format_version"]):
                return f"format version {manifest['format_version']}; this Seedbed reads up to {FORMAT_VERSION}"
            if f"step-{manifest['step']:08d}" != directory.name:
                return f"its manifest is of step {manifest['step']}"
            expected_files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        except FileNotFoundError:
            return f"{MANIFEST} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{MANIFEST} cannot be read"
        for name in FILES:
            if name not in expected_files:
                return f"{name} is not in the manifest"
        problems = [_size_problem(directory / name, expected_files[name][0]) for name in FILES]
        if hashes and not any(problems):
            # Hashing lets other threads run: the files are read side by side.
            with ThreadPoolExecutor(len(FILES), "verify") as pool:
                problems = list(pool.map(lambda name: _hash_problem(directory / name, expected_files[name][1]), FILES))
        return next(filter(None, problems), None)

    def _directories(self) -> list[Path]:
        """Return the directories of finished checkpoints, the newest first."""
        if not self.directory.is_dir():
            return []
        found = [path for path in self.directory.iterdir() if STEP_NAME.match(path.name)]
        return sorted(found, key=_step, reverse=True)

    @contextmanager
    def holding(self, directory: Path) -> Iterator[None]:
        """Keep a checkpoint from being removed while the block reads it."""
        with self._lock:
            self._held.append(directory)
        try:
            yield
        finally:
            with self._lock:
                self._held.remove(directory)

    def best(self) -> Checkpoint | None:
        """Return the checkpoint with the lowest held-out loss that verifies; None when no finite one was measured."""
        for directory in self._by_loss():
            if self.problem(directory) is None:
                return Checkpoint(directory, _step(directory))
        return None

    def stays(self, step: int) -> bool:
        """Tell whether the checkpoint of a step stays for ever; the very first state does not."""
        return self.keep_every_steps is not None and step > 0 and step % self.keep_every_steps == 0

    def _by_loss(self) -> list[Path]:
        """Return the checkpoints whose held-out loss is known, the lowest first, the earlier of equal ones first."""
        losses = {path: _loss(path) for path in self._directories()}
        known = [(loss, _step(path), path) for path, loss in losses.items() if loss is not None]
        return [path for _, _, path in sorted(known)]

    def _trust(self, directory: Path) -> None:
        """Remember a checkpoint that was written or verified in this session as the newest such one."""
        self._trusted = [*(path for path in self._trusted if path != directory), directory]

    def _prune(self) -> None:
        """Remove what is older than the checkpoints to keep; what was never verified counts for nothing."""
        newest = [path for path in self._trusted if self.problem(path, hashes=False) is None][-self.keep :]
        if len(newest) < self.keep:
            return
        oldest = min(_step(path) for path in newest)
        with self._lock:
            kept = {*newest, *self._held, *(self._by_loss()[: self.keep_best] if self.keep_best else ())}
            for path in self._directories():
                if path not in kept and _step(path) < oldest and not self.stays(_step(path)):
                    discard(path)

    def _remove_leftovers(self) -> None:
        """Remove what earlier, killed writers left under temporary names."""
        if self.directory.is_dir():
            for path in self.directory.glob(".step-*.tmp-*"):
                shutil.rmtree(path, ignore_errors=True)

    def _replace(self, temporary: Path, target: Path) -> None:
        """Give a finished directory its final name; one of the same step that does not verify makes way."""
        if target.exists():
            if self.problem(target) is None:
                shutil.rmtree(temporary)
                return
            discard(target)
        os.rename(temporary, target)
        sync_file(self.directory)
        # Mounts that are full or going away have been seen to take files without a word.
        problem = self.problem(target, hashes=False)
        if problem is not None:
            raise OSError(errno.EIO, problem)

    def _write_error(self, step: int, error: BaseException) -> CheckpointError:
        """Turn a failed write into words."""
        try:
            older = self._directories()
            free = shutil.disk_usage(self.directory.parent).free
        except OSError:  # The disk itself is gone.
            older, free = [], None
        kept = f"The checkpoint {older[0].name} is untouched." if older else "There is no earlier checkpoint."
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or (number is None and free is not None and free < 1 << 20):
            # torch.save reports a full disk as a RuntimeError without a number.
            left = "" if free is None else f" ({format_bytes(free)} free)"
            return CheckpointError(
                f"The disk is full: the checkpoint of step {step} could not be written{left}.",
                kept,
                "Free some space; the next checkpoint is tried as planned.",
            )
        if free is None:
            kept = "Earlier checkpoints cannot be seen either."
        return CheckpointError(
            f"The checkpoint of step {step} could not be written: {error}.",
            kept,
            "Check the directory and its disk; the next checkpoint is tried as planned.",
        )


def _size_problem(path: Path, expected: int) -> str | None:
    """Say how the size of a file differs from what the manifest says, or None when it does not."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if found == expected else f"{path.name} has {found} bytes, the manifest says {expected}"


def _hash_problem(path: Path, expected: str) -> str | None:
    """Say that the contents of a file differ from what the manifest says, or None when they do not."""
    try:
        return None if sha256_file(path) == expected else f"{path.name} does not match its SHA-256"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def _step(directory: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(directory.name.split("-")[1])


def _loss(directory: Path) -> float | None:
    """Return the held-out loss in a checkpoint's manifest; None for one that is not finite: it orders nothing."""
    try:
        loss = json.loads((directory / MANIFEST).read_text(encoding="utf-8")).get("validation_loss")
    except (OSError, ValueError, AttributeError):
        return None
    return float(loss) if is_finite(loss) else None


def is_finite(loss: Any) -> TypeGuard[float]:
    """Tell whether a held-out loss was measured and can be compared with others."""
    return isinstance(loss, (int, float)) and math.isfinite(loss)


def _write_files(snapshot: Snapshot, folder: Path) -> dict[str, dict[str, Any]]:
    """Write a snapshot's files to disk and return what the manifest says about them."""
    with HashedFile(folder / STATE, _tensors(snapshot.state)) as state, _without_checksums():
        torch.save(snapshot.state, state)  # type: ignore[arg-type]
    # The larger file is first: it is hashed and brought to the disk while the other is written.
    try:
        with HashedFile(folder / WEIGHTS, snapshot.tensors.values()) as weights:
            write_tensors(snapshot.tensors, snapshot.aliases, weights)
    finally:
        of_state = state.finish()
    return {WEIGHTS: weights.finish(), STATE: of_state}


def _without_checksums() -> AbstractContextManager[Any]:
    """Spare `torch.save` the CRC-32 of each record in this thread: nothing reads them, and the SHA-256 says more."""
    try:
        from torch.utils.serialization import config
    except ImportError:  # An older PyTorch always writes them.
        return nullcontext()
    return cast("AbstractContextManager[Any]", config.patch({"save.compute_crc32": False}))  # type: ignore[attr-defined]


def discard(directory: Path) -> None:
    """Remove a checkpoint; a kill in the middle leaves nothing incomplete under a final name."""
    removed = directory.with_name(f".{directory.name}.tmp-removed")
    shutil.rmtree(removed, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(directory, removed)
    shutil.rmtree(removed, ignore_errors=True)


def require_space(directory: Path, needed: int) -> None:
    """Make sure that so many bytes fit, before a part of them is written.

    Raises:
        OSError: They do not (with the number that a full disk has).
    """
    free = shutil.disk_usage(directory).free
    if free < needed + SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"{format_bytes(needed)} are needed and {format_bytes(free)} are free")
