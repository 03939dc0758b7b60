"""A second copy of a run, on Drive or in any folder: new files under temporary names, renamed when they are whole.

The copy is a run directory like the original: `utils.resume` continues from it, and `mirror_run` with the two exchanged
brings it back onto a new machine's disk.
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.runtime.errors import RunError
from utils.runtime.files import sha256_file, sync_file, write_atomic
from utils.training.checkpoint_manager import MANIFEST, STEP_NAME, CheckpointManager, discard, require_space
from utils.training.prepared_data import MANIFEST as DATA
from utils.training.run import FIGURE, FILES, RECORD, UNFINISHED, make_empty

SMALL_FILES = (*FILES, FIGURE)
_at_work: set[Path] = set()
_guard = threading.Lock()


def mirror_run(directory: Path, target: Path, checkpoints: CheckpointManager | None = None) -> None:
    """Bring a copy of a run up to date.

    The newest checkpoint is copied, and read back, before older ones are removed, and ``run.json``, which makes the
    copy a run, comes last. Files that never change are taken as the same when their size is.

    Args:
        directory: The run.
        target: Its copy, made when missing.
        checkpoints: The manager that writes the run at the same time; it keeps what is being copied.

    Raises:
        RunError: The target holds another run, or something that is no run.
        OSError: The target cannot be written, or an earlier copy to it still hangs; what was whole there still is.
    """
    directory, target = Path(directory), Path(target)
    with _alone(target):
        _mirror(directory, target, checkpoints)


def _look(directory: Path, target: Path, steps: list[str]) -> None:
    """Make sure that what a copy needs has not vanished since it was written, before anything is removed.

    Raises:
        OSError: It has.
    """
    for name in steps:
        source, copied = directory / "checkpoints" / name, target / "checkpoints" / name
        if source.exists() and not _is_copied(source, copied):
            raise OSError(errno.EIO, f"{name} has vanished after it was written")
    if not (target / RECORD).exists():
        raise OSError(errno.EIO, f"{RECORD} has vanished after it was written")


def is_at_work(target: Path) -> bool:
    """Tell whether this process is copying to a folder now."""
    return Path(target) in _at_work


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Let one thread at a time write to a folder: one that hung in a mount may wake up at any time."""
    with _guard:
        if target in _at_work:
            raise OSError(errno.EBUSY, "an earlier copy has not come back from there")
        _at_work.add(target)
    try:
        yield
    finally:
        _at_work.discard(target)


def _mirror(directory: Path, target: Path, checkpoints: CheckpointManager | None) -> None:
    manager = checkpoints or CheckpointManager(directory / "checkpoints")
    claim(directory, target)
    known = _known_hashes(directory / "data" / DATA)
    for part in ("model", "data"):
        for path in sorted((directory / part).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                hashed = known.get(path.name) if path.parent == directory / "data" else None
                _copy_if_new(path, target / path.relative_to(directory), hashed)
    steps = _checkpoints(directory)
    if newest_step(target) > newest_step(directory):
        # The copy is farther than this run, which was brought back from an older state: it catches up by itself.
        return
    for name in SMALL_FILES:
        if (directory / name).exists():
            write_atomic(target / name, (directory / name).read_bytes())
    if (target / "checkpoints").is_dir():
        for torn in (target / "checkpoints").glob(".step-*.tmp-*"):
            shutil.rmtree(torn, ignore_errors=True)
    for name in steps:
        source = directory / "checkpoints" / name
        with manager.holding(source):
            if source.exists() and not _is_copied(source, target / "checkpoints" / name):
                _copy_checkpoint(source, target / "checkpoints" / name)
    _copy_if_new(directory / RECORD, target / RECORD)
    _look(directory, target, steps[-1:])
    (target / UNFINISHED).unlink(missing_ok=True)
    if steps:
        for name in _checkpoints(target):
            if name not in steps and name < steps[-1]:
                discard(target / "checkpoints" / name)


def restore_run(copy: Path, directory: Path) -> None:
    """Bring a run back from its copy when the copy is farther, as on a new machine; otherwise do nothing.

    Raises:
        RunError: The directory holds another run, or the copy cannot be read.
    """
    if not (copy / RECORD).exists() or newest_step(copy) <= newest_step(directory):
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        mirror_run(copy, directory)
    except OSError as error:
        raise RunError(
            f"The run in {copy} cannot be brought to {directory}: {error}.",
            "Expected a readable copy and a disk with some space.",
            "Copy the folder by hand, or continue it in place with utils.resume.",
        ) from error


def claim(directory: Path, target: Path) -> None:
    """Make sure that a folder is the copy of this run, or can become it.

    Raises:
        RunError: It holds another run, or something that is no run: nothing is ever mixed or overwritten.
        OSError: It cannot be read or made.
    """
    record = Path(target) / RECORD
    if record.exists():
        if record.read_bytes() != (Path(directory) / RECORD).read_bytes():
            raise RunError(
                f"{target} holds a copy of another run than {directory}.",
                "Expected a new or empty folder, or the copy of this very run.",
                "Choose another folder for the copy.",
            )
        return
    make_empty(Path(target))
    # Its parent must be there: below a mount that vanished, folders would be made on the wrong disk.
    Path(target).mkdir(exist_ok=True)
    (Path(target) / UNFINISHED).touch()


def _checkpoints(directory: Path) -> list[str]:
    """Return the names of a run's checkpoints, the oldest first."""
    folder = directory / "checkpoints"
    return sorted(path.name for path in folder.iterdir() if STEP_NAME.match(path.name)) if folder.is_dir() else []


def newest_step(directory: Path) -> int:
    """Return the step of a run's newest checkpoint, -1 when there is none."""
    names = _checkpoints(directory)
    return int(names[-1].split("-")[1]) if names else -1


def _is_copied(directory: Path, target: Path) -> bool:
    """Tell whether all files of a checkpoint are in its copy, of their size and of the same state."""
    try:
        if (directory / MANIFEST).read_bytes() != (target / MANIFEST).read_bytes():
            return False
    except FileNotFoundError:
        return False
    return all(
        (target / path.name).exists() and (target / path.name).stat().st_size == path.stat().st_size
        for path in directory.iterdir()
    )


def _copy_if_new(path: Path, target: Path, known: str | None = None) -> None:
    """Copy a file that never changes once it is written, unless it is there; see `_copy_file`."""
    if not target.exists() or target.stat().st_size != path.stat().st_size:
        _copy_file(path, target, known)


def _copy_file(path: Path, target: Path, known: str | None = None) -> None:
    """Copy a file through a temporary name beside the target.

    Args:
        path: The file.
        target: Its copy.
        known: Its SHA-256 as it was when it was written; the file is not hashed again when the copy matches it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        shutil.copyfile(path, temporary)
        sync_file(temporary)
        # A mount that is full or gone may take the bytes without a word.
        same = temporary.stat().st_size == path.stat().st_size
        if same:
            found = sha256_file(temporary)
            # A file that was damaged since it was written is copied as it is: the original does not verify either.
            same = found == known or found == sha256_file(path)
        if not same:
            raise OSError(errno.EIO, f"{path.name} reads back differently from how it was written")
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _known_hashes(manifest: Path) -> dict[str, str]:
    """Return the SHA-256 of the files that a manifest describes; empty when it is missing or cannot be understood."""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return {name: str(entry["sha256"]) for name, entry in files.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _copy_checkpoint(directory: Path, target: Path) -> None:
    """Copy a checkpoint, its manifest last, and give it its name when all is there."""
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        require_space(temporary, sum(path.stat().st_size for path in directory.iterdir()))
        names = sorted((path.name for path in directory.iterdir()), key=lambda name: name == MANIFEST)
        known = _known_hashes(directory / MANIFEST)
        for name in names:
            _copy_file(directory / name, temporary / name, known.get(name))
        if target.exists():
            discard(target)
        os.rename(temporary, target)
        sync_file(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
